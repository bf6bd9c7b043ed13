"""Started under a launcher by test_engine.py: every case of the engine on two ranks, one JSON a rank."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import OptimConfig
from flallm_ds.training import engine as ds

ds.prepare()
FEATURES, STEPS, MICRO_BATCHES = 8, 4, 2
ZEROS: dict[str, dict[str, Any]] = {
    "none": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3},
    "zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


class Plain(nn.Module):
    """Two layers with a bias; `language_model` is a name that the engine looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(FEATURES, 7)
        self.language_model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        self.language_model[0].weight.requires_grad_(False)

    def forward(self, inputs_NF: torch.Tensor) -> torch.Tensor:
        return self.language_model(self.adapter(inputs_NF)).square().sum()


def groups_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    return {
        "adapter": list(model.adapter.parameters()),
        "first": list(model.language_model[0].parameters()),
        "last": list(model.language_model[2].parameters()),
        "all": list(model.parameters()),
    }


def make_engine(model: nn.Module, zero: dict[str, Any], world: dist.World) -> ds.Engine:
    config = ds.complete({"zero_optimization": zero}, world.device, MICRO_BATCHES, clip=1e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    return ds.Engine(model, [{"params": trained, "lr": 1e-2}], OptimConfig(), config, world)


def batches(world: dist.World, step: int) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a step, of unequal sizes."""
    for number in range(MICRO_BATCHES):
        place = world.rank * MICRO_BATCHES + number
        generator = torch.Generator().manual_seed(100 * step + place)
        yield torch.randn(3 + place, FEATURES, generator=generator)


def grad_norms(zero: dict[str, Any], world: dist.World) -> list[dict[str, Any]]:
    """The norms of each step beside those of plain PyTorch over the batches of all ranks."""
    torch.manual_seed(0)
    model = Plain()
    engine = make_engine(model, zero, world)
    found = []
    for step in range(2):
        plain = Plain()
        weights = dist.broadcast_object(dict(engine.state()), world)
        plain.load_state_dict(weights)
        for rank in range(world.size):
            for batch in batches(dist.World(rank, world.size, rank, world.size), step):
                (plain(batch) / 10).backward()
        for number, batch in enumerate(batches(world, step)):
            engine.backward(engine(batch) * (world.size / 10))
            if number == MICRO_BATCHES - 1:
                norms = engine.grad_norms(groups_of(model))
            engine.micro_step_done([1e-2])
        expected = {
            name: torch.cat([p.grad.flatten() for p in group if p.grad is not None]).norm().item()
            for name, group in groups_of(plain).items()
        }
        found.append({"norms": norms, "expected": expected, "grad_norm": engine.grad_norm()})
    return found


def engine_ranks(*, out: Path) -> None:
    """out: where rank-0.json and rank-1.json are written."""
    world = dist.start()
    cases: dict[str, Callable[[], Any]] = {}
    for name, zero in ZEROS.items():
        cases[f"grad_norms/{name}"] = lambda zero=zero: grad_norms(zero, world)
    results = {name: case() for name, case in cases.items()}
    (out / f"rank-{world.rank}.json").write_text(json.dumps(results))
    dist.stop()


main(engine_ranks)
