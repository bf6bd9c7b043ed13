"""Measure how long a step waits for a checkpoint.

deepspeed --num_gpus=2 --module benchmarks.checkpoint --millions=500

A model of plain matrices is trained for one step under ZeRO-3 with offload, then saved in
two ways, alternately: by `checkpoint.Save` in the background, and as before it: by
`engine.save_checkpoint` of DeepSpeed, after which rank 0 reads and hashes every file. The
seconds are those of the slowest rank.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import OptimConfig
from flallm_ds.files import file_sha256
from flallm_ds.training import checkpoint
from flallm_ds.training import engine as ds
from flallm_ds.training.build.engine import DS_CONFIGS
from flallm_ds.training.deepspeed_json import complete

WIDTH = 4096


class Matrices(nn.Module):
    """Layers of WIDTH x WIDTH weights."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.language_model = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.language_model(inputs).square().mean()


def measure(*, millions: int = 500, rounds: int = 3) -> None:
    """Print the seconds of both ways and their ratio.

    Options:
        millions: trained parameters, in millions
        rounds: repetitions of each way; the smallest time counts
    """
    world = dist.start()
    ds.prepare()
    torch.manual_seed(0)
    model = Matrices(max(1, millions * 10**6 // WIDTH**2))
    json_config = ds.read_deepspeed_config(DS_CONFIGS / "zero3_offload.json")
    config = complete(json_config, world.device, 1, 1.0)
    groups = [{"params": list(model.parameters()), "lr": 1e-4}]
    engine = ds.Engine(model, groups, OptimConfig(), config, world)
    engine.backward(engine(torch.randn(1, WIDTH, device=world.device)))
    engine.micro_step_done([1e-4])
    waits: dict[str, list[float]] = {"before": [], "copy": [], "until committed": []}
    with TemporaryDirectory(dir=dist.main_first(lambda: str(Path.cwd()), world)) as name:
        folder = Path(dist.main_first(lambda: name, world))
        for step in range(rounds):
            waits["before"].append(save_before(engine, folder / f"before{step}", world))
            copy, total = save_now(engine, folder, step, world)
            waits["copy"].append(copy)
            waits["until committed"].append(total)
    if world.is_main:
        best = {way: min(seconds) for way, seconds in waits.items()}
        for way, seconds in best.items():
            print(f"{way}: {seconds:.2f} s")
        print(f"a step waits {best['before'] / best['copy']:.1f} times shorter")
    dist.stop()


def save_before(engine: ds.Engine, folder: Path, world: dist.World) -> float:
    """Save by DeepSpeed, then read every file on rank 0 while the others wait."""
    begin = time.perf_counter()
    engine._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def read() -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                file_sha256(path)

    dist.main_first(read, world)
    return slowest(begin, world)


def save_now(
    engine: ds.Engine, folder: Path, step: int, world: dist.World
) -> tuple[float, float]:
    """Return the seconds until training may continue, and until the commit."""
    begin = time.perf_counter()
    fragments = list(engine.fragments())
    saving = checkpoint.Save(folder, step, {}, fragments, world, background=True)
    copy = slowest(begin, world)
    saving.commit(keep=1)
    return copy, slowest(begin, world)


def slowest(begin: float, world: dist.World) -> float:
    return max(dist.gather_objects(time.perf_counter() - begin, world))


main(measure)
