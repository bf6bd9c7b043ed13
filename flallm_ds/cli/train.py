"""`flallm train`; under a launcher `deepspeed launch/train.py`, or `--module
flallm_ds.cli.train`."""

from flallm_ds.command import main
from flallm_ds.recipes import resolve, resolve_both
from flallm_ds.training.stop import StopRequest


def train(*, stage: str | None = None, recipe: str | None = None, **overrides: str) -> None:
    """Train by a recipe (default: quickstart) with dotted overrides.

    stage: visual, then llm. both runs the two in turn and scores each on test. joint trains
    the visual encoder and the LLM together.
    deepspeed launch/train.py --stage llm --recipe phoenix14t --data.shards=FOLDER
    --optim.llm_lr=2e-5

    With --stage both, options go to both stages, --stage1.OPTION and --stage2.OPTION to
    one, and --run=RUN means the folders RUN_visual and RUN_llm.
    """
    both = stage == "both"
    configs = (
        resolve_both(recipe, overrides) if both else (resolve(stage, recipe, overrides),)
    )
    stop = StopRequest()
    # torch and deepspeed take seconds to import: the options are known to be right by
    # now.
    from flallm_ds import dist
    from flallm_ds.training.stages import next_commands, train_stages

    with dist.session() as world:
        if train_stages(configs, world, stop) and world.is_main:
            print(
                "next: " + "\n      ".join(next_commands(configs, recipe, overrides)),
                flush=True,
            )


if __name__ == "__main__":
    main(train)
