"""Started under a launcher by `launching.run_scenarios`: trains each scenario of a JSON
file in turn."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve
from flallm_ds.training import checkpoint
from flallm_ds.training.build import build_task
from flallm_ds.training.flops import step_flops
from flallm_ds.training.fragments import BUFFER
from flallm_ds.training.run_folder import open_run_folder
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.trainer import Trainer
from tests.helpers.counting import Counts

SLOW_S = 0.3  # a forward pass, of which a step has two
FAULTS = ("nan_at", "full_at", "refused")


def scenarios(*, file: Path) -> None:
    """file: a list of {"stage": …, "options": {…}}.

    "counted": a name: what each rank read of the checkpoint and owns is written to
    RUN.NAME.rank-0 and so on. "damaged": whether a byte of the newest checkpoint is flipped
    before the start. "slow_rank": the rank whose forward passes take longer. "peak": the
    peak FLOPS of all devices, which is not known for CPUs. "nan_at" or "full_at": the step
    before which one rank's gradient is NaN, or rank 0's files cannot grow. "refused":
    whether the run must end with an error. The error of each rank is written next to the
    run, to NAME.FAULT.rank-0 and so on.
    """
    world = dist.start()
    stop = StopRequest()
    for scenario in json.loads(file.read_text(encoding="utf-8")):
        config = resolve(scenario["stage"], None, scenario["options"])
        folder = dist.main_first(lambda config=config: open_run_folder(config), world)
        if scenario.get("damaged"):
            dist.main_first(lambda folder=folder: flip_a_byte(folder), world)
        with Counts() as counts:
            saved = checkpoint.resumable(folder, world)
            trainer = Trainer(build_task(config, folder, world), folder, stop)
            prepare(trainer, scenario)
            fault = next((name for name in FAULTS if name in scenario), None)
            if fault is None:
                trainer.run(saved)
            else:
                of_rank = f"{folder.name}.{fault}.rank-{world.rank}"
                run_to_the_error(trainer, saved, folder.with_name(of_rank))
        if "counted" in scenario and saved is not None:
            of_rank = f"{folder.name}.{scenario['counted']}.rank-{world.rank}"
            found = json.dumps(shares(trainer, saved, counts))
            folder.with_name(of_rank).write_text(found)
    dist.stop()


def prepare(trainer: Trainer, scenario: dict[str, Any]) -> None:
    """Give the run what the scenario asks for."""
    module = trainer.task.engine.module
    if "peak" in scenario:
        trainer.meter._peak = scenario["peak"]
        trainer.meter._flops = step_flops(trainer.task)
    if scenario.get("slow_rank") == trainer.world.rank:
        module.register_forward_pre_hook(lambda *_: time.sleep(SLOW_S))
    for fault in ("nan_at", "full_at"):
        if fault in scenario:
            parameter = next(p for p in module.parameters() if p.requires_grad)
            parameter.register_hook(Faults(trainer, scenario[fault], fault))


def run_to_the_error(trainer: Trainer, saved: checkpoint.Saved | None, out: Path) -> None:
    """Write the error that ends the run to a file."""
    try:
        trainer.run(saved)
    except UserError as error:
        out.write_text(str(error))
    finally:
        no_limit = resource.RLIM_INFINITY, resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)


def shares(trainer: Trainer, saved: checkpoint.Saved, counts: Counts) -> dict[str, Any]:
    """The bytes that this rank read of a checkpoint, and those that it owns."""
    engine = trainer.task.engine
    owned = 0
    for key, tensor in engine.fragments():
        owned += tensor.nbytes if key.kind != BUFFER else 0
    names = engine.module.state_dict().keys()
    buffers = 0
    for name, buffer in engine.module.named_buffers():
        buffers += buffer.nbytes if name in names else 0
    return {
        "files": [file.bytes for file in saved.files],
        "verified": counts.verified,
        "restored": counts.restored,
        "owned": owned,
        "buffers": buffers,
    }


class Faults:
    """Called with a parameter's gradient; misbehaves on one rank at one step."""

    def __init__(self, trainer: Trainer, step: int, fault: str) -> None:
        self.trainer, self.step, self.fault = trainer, step, fault

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if self.trainer.at.global_step + 1 != self.step:
            return None
        if self.fault == "nan_at":
            return gradient * math.nan if self.trainer.world.rank == 1 else None
        if self.trainer.world.is_main:
            size = (self.trainer.folder / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
        return None


def flip_a_byte(run: Path) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    file = max(newest.glob("rank-*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


main(scenarios)
