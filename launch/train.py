"""Train: `deepspeed launch/train.py --stage visual`, then `--stage llm`; or `--stage both`, or `joint`.

Also `python launch/train.py …` for one process, `torchrun launch/train.py …`, and launch/slurm/train.sbatch.
Running the same command again goes on where the run was.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":  # the imports below take seconds
    from flallm_ds.command import answer_signals

    answer_signals(importing=True)

from evaluate import evaluate  # type: ignore[import-not-found]  # beside this file
from quickstart import ROOT, prepare  # type: ignore[import-not-found]

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.recipes import quickstart_visual, resolve, resolve_both
from flallm_ds.training.stop import StopRequest

SPLIT = "test"  # that --stage both ends with


def train(*, stage: str | None = None, recipe: str | None = None, **overrides: str) -> None:
    """Train by a recipe (default: quickstart) with dotted overrides.

    stage: visual, then llm; or both, one after the other, each scored on test; or joint.
    deepspeed launch/train.py --stage llm --recipe phoenix14t --data.shards=FOLDER --optim.llm_lr=2e-5

    With --stage both, options go to both stages, --stage1.OPTION and --stage2.OPTION to one, and --run=RUN
    means the folders RUN_visual and RUN_llm.
    """
    both = stage == "both"
    configs = resolve_both(recipe, overrides) if both else (resolve(stage, recipe, overrides),)
    stop = StopRequest()
    with dist.session() as world:
        _check_and_prepare(configs, world)
        # Slow imports come after the options are known to be right.
        from flallm_ds.training.run_folder import locked_run
        from flallm_ds.training.run_log import run_log
        from flallm_ds.training.stages import is_evaluated, run_stage

        for config in configs:
            if both and world.is_main:
                print(f"== stage {config.stage}: {config.run}", flush=True)
            with locked_run(config, world):
                if not run_stage(config, world, stop):
                    return
                if both and not dist.main_first(lambda run=config: is_evaluated(run, SPLIT), world):
                    with run_log(Path(config.run), world):
                        evaluate(stop, config.data, run=config.run, split=SPLIT, hub_code=config.llm.hub_code)
        if world.is_main:
            print("next: " + "\n      ".join(_next_commands(configs, recipe, overrides)), flush=True)


def _next_commands(
    configs: tuple[RunConfig, ...], recipe: str | None, overrides: Mapping[str, str]
) -> list[str]:
    """What to run after these stages: stage llm with the same options, or a model's scores and its use."""
    run = configs[-1].run
    if configs[-1].stage != "visual":
        scored = [f"deepspeed launch/evaluate.py --run {shlex.quote(run)} --split {SPLIT}"]
        translate = f"flallm translate VIDEO --model {shlex.quote(run)}"
        return [*(scored if len(configs) == 1 else []), translate]
    options = {"visual_run": run} | {name: value for name, value in overrides.items() if name != "run"}
    if recipe is not None:
        options = {"recipe": recipe.removesuffix("_visual")} | options
    if "run" in overrides:
        options["run"] = f"{run.removesuffix('_visual')}_llm"
    words = [shlex.quote(f"--{name}={value}") for name, value in options.items()]
    return [" ".join(["deepspeed launch/train.py --stage llm", *words])]


def _check_and_prepare(configs: tuple[RunConfig, ...], world: dist.World) -> None:
    """Raise UserError for what would only be found after minutes, or after a whole stage."""
    from flallm_ds.training.build import check_llm_of, open_index, stage_1_export

    if configs[0].stage == "llm" and configs[0].visual_run != "none":
        stage_1_export(configs[0])
    if any(config.data.shards == quickstart_visual().data.shards for config in configs):
        if Path.cwd() != ROOT:
            raise UserError(
                f"the quickstart's own corpus must be used from {ROOT}, but this is {Path.cwd()}. "
                "Change the folder, or give --data.shards=FOLDER."
            )
        dist.main_first(prepare, world)
    for config in configs:
        dist.main_first(lambda config=config: check_llm_of(config), world)
    if len(configs) == 1:
        return
    widths = [config.visual.width for config in configs]
    if widths[0] != widths[1]:
        raise UserError(f"visual.width must be the same in both stages, but is {widths[0]} and {widths[1]}.")
    for config in configs:
        open_index(config.data, SPLIT, world)


if __name__ == "__main__":
    main(train)
