"""Measure on a GPU: loading of frames, waiting for data in stage 1, and the fused kernel.

python -m benchmarks.gpu --out=benchmarks/results [--videos=FOLDER]
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import MBartConfig

from benchmarks import material
from benchmarks.measure import Report, Target, spread
from benchmarks.ours import joined, small_codec
from flallm_ds import command, dist
from flallm_ds.batch import Batch
from flallm_ds.data import preprocess
from flallm_ds.data.device import check_nvjpeg, on_device
from flallm_ds.data.index import load_index
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve
from flallm_ds.training.build import build_task
from flallm_ds.training.build.data import make_reader
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.task import Task
from flallm_ds.training.trainer import Position, Trainer

# Steps until kernels are selected and buffers have their final size.
WARM_UP = 10
# Target: maximum share of the time of a step.
WAITING = 0.02
COLUMNS = ("decoder", "threads", "kept frames per second into the device")
STEP_COLUMNS = (
    "decoder",
    "threads",
    "ms a step",
    "kept frames per second",
    "share waiting for data",
)


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    videos: Path | None = None,
    clips: int = 64,
    frames: int = 116,
    steps: int = 100,
    rounds: int = 3,
    threads: tuple[int, ...] = (1, 2, 4, 8, 16),
) -> str:
    """Load clips of the size of PHOENIX onto the GPU, and train stage 1 of phoenix14t.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --videos: folder with videos; default: synthetic videos. --clips, --frames: number of clips and of
    frames in each. --steps: steps of a round. --rounds: number of rounds. --threads: numbers of
    threads of the loader, separated by commas.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "Cannot run benchmarks.gpu: PyTorch finds no CUDA device. Run it on a machine with "
            "a GPU."
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = stage_1(folder, clips, frames, videos)
        check_nvjpeg(task.world.device)
        trainer = Trainer(task, folder, StopRequest())
        trainer.progress.enabled = False
        trainer.progress.start(task.config.train.epochs)
        task.engine.module.train()
        loading: list[tuple[str, ...]] = []
        stepping: list[tuple[str, ...]] = []
        waiting: dict[tuple[str, int], list[float]] = {}
        for decoder, number, side in sides(task, threads):
            print(f"{decoder}, {number} threads", file=sys.stderr, flush=True)
            rates = [into_the_device(side, steps) for _ in range(rounds)]
            loading.append((decoder, str(number), spread(rates)))
            trained = [train_steps(trainer, side, steps) for _ in range(rounds)]
            ms, rates, shares = map(list, zip(*trained, strict=True))
            waiting[decoder, number] = shares
            percent = spread([100 * share for share in shares], 2, " %")
            stepping.append((decoder, str(number), spread(ms, 1), spread(rates), percent))
        kernel = kernel_times(task, rounds)
        dist.stop()

    report = Report(__file__, "On a GPU", {"GPU": torch.cuda.get_device_name()})
    data = task.config.data
    report.text(
        f"{clips} clips of {frames} frames of 210x260, stage 1 of the recipe phoenix14t "
        f"with random weights ({data.batch_clips} clips a step in {data.micro_batches} "
        f"micro-batches, 1 in {data.keep_every} frames). Seconds are of the clock; the "
        f"median of {rounds} rounds of {steps} steps, with the lowest and the highest.",
        "## Into the device",
        "A process has one nvJPEG decoder of torchvision: threads only read the JPEGs.",
    )
    report.table(COLUMNS, loading)
    report.text("## The stage-1 step")
    report.table(STEP_COLUMNS, stepping)
    report.text("## Preprocessing 256 frames, ms")
    report.table(("way", "ms"), [(way, spread(ms, 3)) for way, ms in kernel.items()])
    best = min(waiting, key=lambda key: sorted(waiting[key])[rounds // 2])
    what = (
        f"share of the step's time waiting for data, decoder {best[0]}, {best[1]} threads"
    )
    report.text("## Targets")
    report.targets([Target(what, WAITING, waiting[best], at_least=False, digits=4)])
    return report.finish(out, hardware)


def stage_1(folder: Path, clips: int, frames: int, videos: Path | None) -> Task:
    """Return the task of the recipe, without weights and texts from the hub."""
    pngs = material.png_folders(folder / "png", clips, frames, videos)
    shards = material.build_shards([paths[0].parent for paths in pngs], folder / "shards")
    tokenizer = small_codec(load_index(shards, "train")).tokenizer
    tokenizer.save_pretrained(folder / "llm")
    MBartConfig(vocab_size=len(tokenizer)).save_pretrained(folder / "llm")
    options = {
        "data.shards": str(shards),
        "run": str(folder / "run"),
        "llm.name": str(folder / "llm"),
    }
    options |= {"visual.weights": "none", "eval.split": "train"}
    config = resolve("visual", "phoenix14t", options)
    Path(config.run).mkdir()
    return build_task(config, Path(config.run), dist.start())


def sides(task: Task, numbers: tuple[int, ...]) -> Iterator[tuple[str, int, Task]]:
    """Yield (decoder, number of threads, task with both)."""
    for decoder in ("cpu", "nvjpeg"):
        for threads in numbers:
            data = replace(task.config.data, decoder=decoder)
            reader = make_reader(
                task.train.index, replace(task.config, data=data), train=True
            )
            train = replace(task.train, reader=reader, threads=threads)
            yield decoder, threads, replace(task, train=train)


def steps_of(task: Task, num_steps: int) -> Iterator[list[Batch]]:
    """Yield steps of several epochs as one, because these epochs have only a few steps."""
    plan = task.train.plan
    epochs = -(-num_steps // plan.epoch(0).num_steps)
    order = joined([plan.epoch(epoch) for epoch in range(epochs)])
    return on_device(task.train.loader(order).steps(), task.world.device)


def into_the_device(task: Task, num_steps: int) -> float:
    """Return frames per second that are loaded onto the device, without computation."""
    num_frames = 0
    for number, batches in enumerate(steps_of(task, num_steps + WARM_UP)):
        if number == WARM_UP:  # this step is already loaded
            torch.cuda.synchronize()
            begin = time.perf_counter()
        if number > WARM_UP:
            num_frames += sum(len(b.frames_NHWC) for b in batches)
    torch.cuda.synchronize()
    return num_frames / (time.perf_counter() - begin)


def train_steps(trainer: Trainer, task: Task, num_steps: int) -> tuple[float, float, float]:
    """Train and return (ms per step, frames per second, share of time waiting for data)."""
    trainer.task, trainer.at = task, Position()
    waited = spent = num_frames = 0.0
    since = time.perf_counter()
    for number, batches in enumerate(steps_of(task, num_steps + WARM_UP)):
        wait = time.perf_counter() - since
        # This reads the loss, so the GPU has finished the forward pass.
        trainer._step(batches, num_steps, wait)
        now = time.perf_counter()
        if number >= WARM_UP:
            waited, spent = waited + wait, spent + now - since
            num_frames += sum(len(b.frames_NHWC) for b in batches)
        since = now
    return 1000 * spent / (number + 1 - WARM_UP), num_frames / spent, waited / spent


def kernel_times(task: Task, rounds: int) -> dict[str, list[float]]:
    """Measure the fused kernel and the functions of PyTorch on the same frames."""
    device, crop = task.world.device, task.preprocess.crop_size
    frames = torch.randint(0, 256, (256, 260, 210, 3), dtype=torch.uint8, device=device)
    draws, sizes = torch.rand(8, 9), torch.tensor([[260.0, 210.0]]).repeat(8, 1)
    theta = task.preprocess.affine(draws, sizes, (260, 210), train=True).to(device)
    clips = torch.arange(8, dtype=torch.int32, device=device).repeat_interleave(32)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "PyTorch": lambda: preprocess.resample(frames, theta, clips, crop),
        "fused, float32": lambda: preprocess._fused(frames, theta, clips, crop),
        "fused, bfloat16": lambda: preprocess._fused(
            frames, theta, clips, crop, torch.bfloat16
        ),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, call in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                call()
            end.record()
            end.synchronize()
            if number:  # the first compiles
                times[way].append(begin.elapsed_time(end) / 20)
    return times


if __name__ == "__main__":
    command.main(run)
