"""Score a run on a split with all ranks: `deepspeed launch/evaluate.py --run=RUN
--split=test`."""

from flallm_ds.cli.evaluate import evaluate
from flallm_ds.command import main

if __name__ == "__main__":
    main(evaluate)
