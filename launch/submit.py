"""Train on a SLURM cluster: `python launch/submit.py --nodes=4 --gpus=8 --recipe=RECIPE
--stage=both`."""

from flallm_ds.cli.submit import submit
from flallm_ds.command import main

if __name__ == "__main__":
    main(submit)
