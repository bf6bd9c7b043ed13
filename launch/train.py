"""Train one stage: `deepspeed launch/train.py --stage visual`, then `deepspeed launch/train.py --stage llm`.

Also `python launch/train.py …` for one process, `torchrun launch/train.py …`, and launch/slurm/train.sbatch.
Running the same command again goes on where the run was.
"""

from quickstart import prepare  # type: ignore[import-not-found]  # beside this file

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.recipes import quickstart_visual, resolve
from flallm_ds.training.stop import StopRequest


def train(*, stage: str | None = None, recipe: str | None = None, **overrides: str) -> None:
    """Train a stage (visual or llm) by a recipe (default: quickstart) with dotted overrides.

    deepspeed launch/train.py --stage llm --recipe phoenix14t --data.shards=FOLDER --optim.llm_lr=2e-5
    """
    config = resolve(stage, recipe, overrides)
    stop = StopRequest()
    # Slow imports come after the options are known to be right.
    from flallm_ds.training.build import build_task, stage_1_export
    from flallm_ds.training.run_folder import run_folder
    from flallm_ds.training.trainer import Trainer

    world = dist.start()
    try:
        if config.stage == "llm":
            stage_1_export(config)  # before minutes of preparation
        if config.data.shards == quickstart_visual().data.shards:
            dist.main_first(prepare, world)
        with run_folder(config, world) as folder:
            task = build_task(config, folder, world)
        Trainer(task, folder, stop).run()
    finally:
        dist.stop()


if __name__ == "__main__":
    main(train)
