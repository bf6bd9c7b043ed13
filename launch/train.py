"""Train: `deepspeed launch/train.py --stage visual`, then `--stage llm`; or `--stage
both`, or `joint`.

Also `python launch/train.py …` for one process, `torchrun launch/train.py …`, and
launch/slurm/train.sbatch. Running the same command again goes on where the run was.
"""

from flallm_ds.cli.train import train
from flallm_ds.command import main

if __name__ == "__main__":
    main(train)
