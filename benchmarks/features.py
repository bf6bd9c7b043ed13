"""Measure the cost of an epoch of stage llm on video and on features, and of writing them.

python -m benchmarks.features --out=benchmarks/results
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.measure import ROOT, Report, cpu_seconds, ratios, spread
from flallm_ds import command, dist
from flallm_ds.config import RunConfig
from flallm_ds.recipes import resolve
from flallm_ds.training.stop import StopRequest

VIEWS = 2
COLUMNS = (
    "clips",
    "frames an epoch",
    "on video, CPU s an epoch",
    "on features, CPU s an epoch",
    "times cheaper",
    "writing, CPU s a view",
    "epochs until writing has paid, a view",
)


@dataclass(frozen=True)
class Setting:
    """A corpus and options of a training.

    short_side: of the stored frames in pixels. more: options that differ from the quickstart.
    """

    label: str
    clips: int
    short_side: int
    more: Mapping[str, object]


@dataclass(frozen=True)
class Costs:
    """CPU seconds, one value for each round. writing: for one view."""

    clips: int
    frames: int
    video: list[float]
    features: list[float]
    writing: float


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    clips: int = 240,
    large_clips: int = 40,
    rounds: int = 3,
) -> str:
    """Train epochs of stage llm alternately on video and on features, and write a report.

    --clips, --large_clips: clips of the corpora at 64 and at 256 pixels, over all splits.
    """
    settings = (
        Setting("quickstart: 64 px, ResNet-18 a quarter as wide", clips, 64, {}),
        Setting(
            "ResNet-18 at 224 px",
            large_clips,
            256,
            {
                "visual.width": 64,
                "data.frame_size": 256,
                "data.crop_size": 224,
                "data.augment": True,
                "data.batch_clips": 8,
            },
        ),
    )
    world = dist.start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        costs = []
        for setting in settings:
            place = folder / str(setting.short_side)
            material(setting, place)
            costs.append(measure(setting, place, rounds, world))
    dist.stop()
    report = Report(
        __file__, "Stage llm on cached features", {"deepspeed": "", "transformers": ""}
    )
    report.text(
        "CPU seconds of one process with one thread for each library: epochs on video and on "
        f"features alternate, {rounds} rounds after a warm-up round. Compare ratios; the "
        "seconds are valid for this machine and day. The LLM is the stand-in (d_model 256, two "
        "layers of encoder and decoder). With a larger LLM an epoch on features costs more, "
        "and the factor is smaller. Batches have 32 clips at 64 px and 8 clips at 224 px; 1 "
        "frame in 4 is kept. The engine is ZeRO-3 with offload. Its work in a step does not "
        "depend on the clips; at 64 px it is most of the time of an epoch on features."
    )
    rows = [(s.label, *row_of(cost)) for s, cost in zip(settings, costs, strict=True)]
    report.table(("setting", *COLUMNS), rows)
    return report.finish(out, hardware)


def row_of(costs: Costs) -> tuple[str, ...]:
    saved = sum(costs.video) / len(costs.video) - sum(costs.features) / len(costs.features)
    return (
        f"{costs.clips:,}",
        f"{costs.frames:,}",
        spread(costs.video, 1),
        spread(costs.features, 2),
        spread(ratios(costs.video, costs.features), 1),
        f"{costs.writing:.1f}",
        f"{costs.writing / saved:.1f}",
    )


def measure(setting: Setting, folder: Path, rounds: int, world: dist.World) -> Costs:
    """Measure one setting. folder: output of `material`."""
    import flallm_ds.training.trainer  # noqa: F401 - seconds that are no part of the writing
    from flallm_ds.features.writing import Writing

    video, cached = (options(setting, folder, name) for name in ("shards", "features"))
    begin = cpu_seconds()
    Writing.begin(
        video, world, folder / "features", VIEWS, "float32", ("train", "dev")
    ).run(StopRequest())
    writing = (cpu_seconds() - begin) / VIEWS
    ways = [Epochs(config, world) for config in (video, cached)]
    spent: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for way, found in zip(ways, spent, strict=True):
            seconds = way.epoch()
            if number:
                found.append(seconds)
    return Costs(ways[0].num_clips, ways[0].frames, *spent, writing)


class Epochs:
    """Train epochs of one run, without evaluation and checkpoints."""

    def __init__(self, config: RunConfig, world: dist.World) -> None:
        from flallm_ds.training.build import build_task
        from flallm_ds.training.run_folder import open_run_folder
        from flallm_ds.training.trainer import Trainer

        folder = open_run_folder(config)
        self._task = build_task(config, folder, world)
        self._trainer = Trainer(self._task, folder, StopRequest())
        self._trainer.progress.start(config.train.epochs)
        num_kept = self._task.train.plan.num_kept
        self.frames, self.num_clips = int(num_kept.sum()), len(num_kept)

    def epoch(self) -> float:
        """Train the next epoch. Return its CPU seconds."""
        at = self._trainer.at
        begin = cpu_seconds()
        self._trainer._epoch(self._task.train_loader(at.epoch))
        at.epoch, at.step = at.epoch + 1, 0
        return cpu_seconds() - begin


def options(setting: Setting, folder: Path, shards: str) -> RunConfig:
    """Return the options of the stage llm of the quickstart.

    The encoder has random weights, which cost as much time as trained weights.
    """
    given: dict[str, object] = {
        "run": folder / f"run_{shards}",
        "data.shards": folder / shards,
        "llm.name": folder / "llm",
        "visual_run": "none",
        "visual.weights": "none",
        "visual.frozen_stages": 0,
        "train.log_every_s": 1e9,
    }
    return resolve(
        "llm", None, {name: str(value) for name, value in (given | setting.more).items()}
    )


def material(setting: Setting, folder: Path) -> None:
    """Make corpus/, shards/ and llm/ in `folder` with the commands of the project."""
    corpus = folder / "corpus"
    make = [
        "-m",
        "flallm_ds",
        "signsim",
        "corpus",
        f"--out={corpus}",
        f"--clips={setting.clips}",
        "--monolingual=500",
    ]
    build = [
        "shards/build.py",
        "signsim",
        f"--source={corpus}",
        f"--out={folder / 'shards'}",
    ]
    llm = [
        "-m",
        "flallm_ds",
        "standin_llm",
        f"--texts={corpus / 'monolingual.txt'}",
        "--steps=5",
    ]
    for words in (
        make,
        [*build, f"--short_side={setting.short_side}"],
        [*llm, f"--out={folder / 'llm'}"],
    ):
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )


if __name__ == "__main__":
    command.main(run)
