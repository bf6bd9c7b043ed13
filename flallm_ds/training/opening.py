"""The first lines of a run: what is trained, on what, how much, where, and how to follow it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from flallm_ds.config import RunConfig
from flallm_ds.data.plan import micro_batches_per_rank
from flallm_ds.dist import World
from flallm_ds.training.deepspeed_json import precision, zero_stage
from flallm_ds.training.run_folder import EVENTS
from flallm_ds.training.task import Task


def opening(task: Task, folder: Path, recipe: str) -> str:
    """Return the five lines that rank 0 prints before the first step.

    recipe: its name; empty for a run that is called from Python.
    """
    config = task.config
    named = f" of recipe {recipe}" if recipe else ""
    lines = (
        ("train", f"stage {config.stage}{named}: {_models(config)}"),
        ("on", f"{_devices(task.world)}, {_engine(task.engine.config)}"),
        ("amount", f"{_steps(task)}, {_parameters(task)}{_idle(task)}"),
        ("run", str(folder)),
        (
            "follow",
            f"{folder / 'metrics.jsonl'}, or tensorboard --logdir={folder / EVENTS}",
        ),
    )
    # One name a line, so that log files can be searched for it.
    text = ""
    for name, line in lines:
        text += f"{name:7} {line}\n"
    return text.rstrip()


def _models(config: RunConfig) -> str:
    if config.stage == "visual":
        return f"backbone {config.visual.weights}, Light-T {config.light_t.size}"
    if config.stage == "llm":
        return f"LLM {config.llm.name}, tune={config.llm.tune}"
    return f"backbone {config.visual.weights}, LLM {config.llm.name}"


def _devices(world: World) -> str:
    # The GPU of rank 0; versions.json has that of every rank.
    device = "CPU"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    machines = ""
    if world.size > world.local_size:
        machines = f" ({world.local_size} on this machine)"
    return f"{world.size} rank{'s' if world.size > 1 else ''}{machines} on {device}"


def _engine(config: dict[str, Any]) -> str:
    return f"{precision(config)}, ZeRO stage {zero_stage(config)}"


def _steps(task: Task) -> str:
    """Return the size of the training split and the number of steps."""
    config = task.config
    num_steps = task.train.plan.epoch(0).num_steps
    limit = config.train.max_steps
    stop = "" if limit is None else f", at most {limit:,} steps in all"
    epochs = config.train.epochs
    return (
        f"{len(task.train.index):,} clips, {epochs} epoch{'s' if epochs > 1 else ''} of "
        f"{num_steps:,} steps{stop}"
    )


def _idle(task: Task) -> str:
    """Return the share of dummy micro-batches, and the numbers of ranks without any."""
    return idle_share(task.train.plan.num_micro_batches, task.world.size)


def idle_share(num_micro_batches: int, world_size: int) -> str:
    num_passes = world_size * micro_batches_per_rank(num_micro_batches, world_size)
    idle = 1 - num_micro_batches / num_passes
    if not idle:
        return ""
    even = [str(n) for n in range(1, num_micro_batches + 1) if num_micro_batches % n == 0]
    return f", {100 * idle:.0f} % of the work is idle (none with {', '.join(even)} ranks)"


def _parameters(task: Task) -> str:
    """Return how many parameters are trained, and how many there are, in millions."""
    parameters = list(task.engine.module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    # In stage llm, the frozen visual encoder is outside the engine.
    if task.frozen is not None:
        parameters += task.frozen.parameters()
    return f"{_millions(trained)} M of {_millions(parameters)} M parameters trained"


def _millions(parameters: Iterable[Any]) -> str:
    count = 0
    for parameter in parameters:
        # A parameter that ZeRO-3 has partitioned is empty here; ds_numel is its full size.
        count += getattr(parameter, "ds_numel", parameter.numel())
    # Tiny models of tests need more digits.
    return f"{count / 1e6:.1f}" if count >= 1e5 else f"{count / 1e6:.3f}"
