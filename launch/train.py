"""Train a stage, or both: `deepspeed launch/train.py --recipe quickstart --stage both`.

Also `python launch/train.py ...` for one process, `torchrun -- launch/train.py ...` (without
the `--`, torchrun takes --run for an option of its own), and launch/slurm/train.sbatch. Run
the same command again to resume.
"""

from flallm_ds.cli.train import train
from flallm_ds.command import main

if __name__ == "__main__":
    main(train)
