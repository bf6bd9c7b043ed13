"""Check the machines of a job: `deepspeed launch/doctor.py --run=RUN --shards=FOLDER`."""

from flallm_ds.cli.doctor import doctor
from flallm_ds.command import main

if __name__ == "__main__":
    main(doctor)
