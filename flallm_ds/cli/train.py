"""`flallm train`; under a launcher `deepspeed launch/train.py`, or `--module
flallm_ds.cli.train`."""

from flallm_ds.cli.checks import check_run_folders, check_runs
from flallm_ds.command import main
from flallm_ds.command_help import table
from flallm_ds.recipes import FAMILIES, RECIPES, is_ablation, resolve, resolve_both
from flallm_ds.training.stop import StopRequest

STAGES = (
    ("visual", "train the visual encoder with a small translator (Light-T)"),
    ("llm", "freeze that encoder and fine-tune a language model on its features"),
    ("both", "visual, then llm, each scored on the test split"),
    ("joint", "encoder and language model together, for comparison"),
)


def train(*, stage: str | None = None, recipe: str | None = None, **overrides: str) -> None:
    """Train the stage of a recipe, with dotted overrides; resume it where its run folder exists.

    The help of the command is `train_help`.
    """
    both = stage == "both"
    configs = (
        resolve_both(recipe, overrides) if both else (resolve(stage, recipe, overrides),)
    )
    check_run_folders(configs)
    check_runs(configs)
    stop = StopRequest()
    # torch and deepspeed take seconds to import: only after the options are checked.
    from flallm_ds import dist
    from flallm_ds.training.build.engine import build_operators
    from flallm_ds.training.stages import next_commands, train_stages

    build_operators(configs)
    with dist.session() as world:
        if train_stages(configs, world, stop, recipe or "quickstart") and world.is_main:
            lines = "\n      ".join(next_commands(configs, recipe, overrides))
            print(f"next: {lines}", flush=True)


def train_help() -> str:
    """Return the help of `train`: stages, recipes, and where the other options are listed."""
    num_ablations = sum(map(is_ablation, RECIPES))
    families = [
        *FAMILIES.items(),
        (f"and {num_ablations} more", "ablations: flallm recipes"),
    ]
    return f"""Train a stage, or resume it: the same command continues from the last checkpoint.

stages (--stage)
{table(STAGES)}

recipes (--recipe; default quickstart)
{table(families)}

options
  --run=FOLDER           where the run is stored; runs/RECIPE_STAGE by default
  --SECTION.OPTION=VALUE any option of `flallm options`; with --stage both,
                         --stage1.OPTION and --stage2.OPTION set it in one stage

examples
  deepspeed launch/train.py --recipe mine --stage both --data.shards=data/my_shards
  deepspeed launch/train.py --recipe phoenix14t --stage llm --optim.llm_lr=2e-5
`deepspeed --quiet` leaves out the lines of the launcher."""


# `--help` prints the docstring of the function.
train.__doc__ = train_help()

if __name__ == "__main__":
    main(train)
