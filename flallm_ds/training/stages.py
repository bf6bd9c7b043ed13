"""Train one stage, or both in turn, and tell whether they are finished."""

import gc
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.dist import World, main_first
from flallm_ds.errors import UserError
from flallm_ds.inference.evaluate import Search, evaluate_run
from flallm_ds.preflight import preflight
from flallm_ds.quickstart import prepare
from flallm_ds.recipes import config_of
from flallm_ds.run_check import is_finished, open_run_folder
from flallm_ds.training import checkpoint
from flallm_ds.training.build import build_task
from flallm_ds.training.build.data import open_index
from flallm_ds.training.build.language import check_llm_of
from flallm_ds.training.build.visual import stage_1_export
from flallm_ds.training.opening import opening
from flallm_ds.training.run_folder import locked_run, run_folder
from flallm_ds.training.run_log import run_log
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.trainer import Trainer

SPLIT = "test"  # that --stage both ends with


def run_stage(config: RunConfig, world: World, stop: StopRequest, recipe: str = "") -> bool:
    """Train a stage from its last checkpoint; return False if it stopped at train.max_steps.

    The caller holds the run folder (`locked_run`). recipe: its name, to be printed. Raises
    UserError for options that do not fit, Preempted when asked to stop.
    """
    # Checkpoints are read once, and before the models: a damaged one ends the start at
    # once.
    saved = checkpoint_to_resume(config, world)
    state = None if saved is None else saved.state
    if main_first(lambda: is_finished(config, state), world):
        if world.is_main and state is not None:
            print(summary(config, state["position"]), flush=True)
        return True
    with run_log(Path(config.run), world) as log:
        with run_folder(config, world) as folder:
            task = build_task(config, folder, world)
        if world.is_main:
            print(opening(task, folder, recipe), flush=True)
        trainer = Trainer(task, folder, stop, log)
        trainer.run(saved)
        finished = trainer.is_over
        if world.is_main:
            limit = (
                f"stopped after step {trainer.at.global_step}, at train.max_steps; without "
                "it the run resumes."
            )
            ended = summary(config, asdict(trainer.at)) if finished else limit
            print(ended, flush=True)
    task.engine.close()
    del trainer, task
    gc.collect()  # its parts refer to one another; the next stage needs their memory
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return finished


def checkpoint_to_resume(config: RunConfig, world: World) -> checkpoint.Saved | None:
    """Return the checkpoint that the run resumes from, or None before the first one.

    Raises UserError where the folder belongs to another run, or none of its checkpoints
    is complete.
    """
    folder = Path(config.run)
    if not main_first(lambda: _is_open(config), world):
        return None
    return checkpoint.resumable(folder, world)


def _is_open(config: RunConfig) -> bool:
    """Whether the folder holds this run. Raises UserError if it holds another."""
    if not (Path(config.run) / "config.json").is_file():
        return False
    open_run_folder(config)
    return True


def summary(config: RunConfig, position: Mapping[str, Any]) -> str:
    """Return where a finished stage is stored, and the dev BLEU-4 of its best model.

    position: of the run, as a checkpoint stores it.
    """
    best = Path(config.run) / "best"
    scores = export.read_settings(best)["scores"]
    bleu4 = scores[config.eval.split]["bleu4"]
    text = (
        f"stage {config.stage} is finished: {config.run}\nbest {config.eval.split} BLEU-4 "
        f"{bleu4:.2f}, after epoch {scores['epoch']}: {best}"
    )
    if position["epoch"] < config.train.epochs:
        text += (
            f"\nended early, after epoch {position['epoch']} of {config.train.epochs}; "
            f"scorings without a better score: {position['scorings_since_best']} "
            "(train.patience)"
        )
    return text


def is_evaluated(config: RunConfig, split: str) -> bool:
    """Return whether the run's best export has been scored on this split of its shards."""
    return split in export.evaluated(Path(config.run) / "best", config.data.shards)


def train_stages(
    configs: tuple[RunConfig, ...], world: World, stop: StopRequest, recipe: str = ""
) -> bool:
    """Train one stage, or both and score each; return False if a stage stopped early.

    recipe: its name, to be printed. Raises UserError for options that do not fit,
    Preempted when asked to stop.
    """
    both = len(configs) > 1
    _check_and_prepare(configs, world)
    preflight(configs, world)
    for config in configs:
        if both and world.is_main:
            print(f"== stage {config.stage}: {config.run}", flush=True)
        with locked_run(config, world):
            if not run_stage(config, world, stop, recipe):
                return False
            if both and not main_first(partial(is_evaluated, config, SPLIT), world):
                search = Search(hub_code=config.llm.hub_code)
                with run_log(Path(config.run), world):
                    evaluate_run(
                        config.run, SPLIT, world, search, data=config.data, stop=stop
                    )
    return True


def next_commands(
    configs: tuple[RunConfig, ...], recipe: str | None, overrides: Mapping[str, str]
) -> list[str]:
    """Return what to run next: stage llm with the same options, or the use of a model."""
    run = configs[-1].run
    if configs[-1].stage != "visual":
        evaluate = f"deepspeed launch/evaluate.py --run {shlex.quote(run)} --split {SPLIT}"
        translate = f"flallm translate VIDEO --model {shlex.quote(run)}"
        # --stage both has scored its model already.
        return [evaluate, translate] if len(configs) == 1 else [translate]
    # The same command line with stage llm and the run of stage visual.
    options: dict[str, str] = {}
    if recipe is not None:
        options["recipe"] = recipe.removesuffix("_visual")
    options["visual_run"] = run
    options |= overrides
    if "run" in overrides:
        options["run"] = f"{run.removesuffix('_visual')}_llm"
    command = "deepspeed launch/train.py --stage llm"
    for name, value in options.items():
        command += f" {shlex.quote(f'--{name}={value}')}"
    return [command]


def _check_and_prepare(configs: tuple[RunConfig, ...], world: World) -> None:
    """Raise UserError for faults that would otherwise be found minutes or a stage later."""
    if configs[0].stage == "llm" and configs[0].visual_run != "none":
        stage_1_export(configs[0])
    # The quickstart's corpus takes minutes to make: only after the check above.
    quickstart = config_of("quickstart_visual")
    if any(config.data.shards == quickstart.data.shards for config in configs):
        main_first(prepare, world)
    for config in configs:
        main_first(partial(check_llm_of, config), world)
    if len(configs) == 1:
        return
    widths = [config.visual.width for config in configs]
    if widths[0] != widths[1]:
        raise UserError(
            f"visual.width must be the same in both stages, got {widths[0]} and {widths[1]}."
        )
    for config in configs:
        open_index(config.data, SPLIT, world)
