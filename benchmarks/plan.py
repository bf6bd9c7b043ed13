"""Measure the plan of a million clips: time, memory, resume, padding, balance of ranks.

python -m benchmarks.plan --out=benchmarks/results
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.measure import Report, Target, cpu_seconds, spread
from benchmarks.ours import load, plan_of
from flallm_ds import command
from flallm_ds.data.index import Shard
from flallm_ds.data.plan import EpochPlan, micro_batches_of_rank
from flallm_ds.sharding.writer import write_index

Result = TypeVar("Result")
# Frames of the training clips of PHOENIX14T, and the standard deviation of the logarithm.
SHORTEST, LONGEST, MEAN = 16, 475, 116
SIGMA = 0.43
CLIPS_PER_SHARD = 128
EPOCH = 3
RANK_COLUMNS = (
    "ranks",
    "clips of a step",
    "steps",
    "padding",
    "max / mean frames of a rank, median step",
    "worst full step",
    "short step",
    "every rank has as many steps",
    "every clip once",
)


def lengths(clips: int) -> np.ndarray:
    """Return log-normal lengths, clipped to the range of PHOENIX, with its mean."""
    normal = np.random.default_rng(0).standard_normal(clips) * SIGMA

    def cut(mu: float) -> np.ndarray:
        return np.exp(mu + normal).round().clip(SHORTEST, LONGEST).astype(int)

    low, high = np.log(SHORTEST), np.log(LONGEST)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle).mean() < MEAN else (low, middle)
    return cut(high)


def write(folder: Path, clips: int) -> None:
    """Write an index like shards/build.py, with names and texts as long as in PHOENIX."""
    rng = np.random.default_rng(1)
    letters = (
        rng.integers(ord("a"), ord("z") + 1, 1 << 16, dtype=np.uint8).tobytes().decode()
    )
    begins, text_lengths = rng.integers(0, 1 << 15, clips), rng.integers(40, 140, clips)
    rows, offset = [], 0
    for number, num_frames in enumerate(lengths(clips).tolist()):
        offset = offset if number % CLIPS_PER_SHARD else 512
        size = 9_000 * num_frames
        name = f"{number:08d}_Monday_tagesschau-{number % 9000:04d}"
        begin = int(begins[number])
        rows.append(
            {
                "shard": number // CLIPS_PER_SHARD, "offset": offset, "size": size, "num_frames": num_frames,
                "height": 260, "width": 210, "fps": 25.0, "key": f"{number:08d}", "id": name,
                "text": letters[begin : begin + int(text_lengths[number])], "video": name,
                "signer": f"Signer{number % 9:02d}", "language": "de",
            }
        )  # fmt: skip
        offset += size + 2048
    num_shards = -(-clips // CLIPS_PER_SHARD)
    tars = [
        Shard(
            f"train-{n:06d}.tar",
            10**9,
            f"{n:064x}",
            min(CLIPS_PER_SHARD, clips - n * CLIPS_PER_SHARD),
        )
        for n in range(num_shards)
    ]
    write_index(
        folder,
        corpus="synthetic",
        language="de",
        options={},
        splits={"train": (rows, tars)},
    )


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float
    peak_mb: float


def cost_of(function: Callable[[], Any]) -> Cost:
    """Measure the time of a call and the maximum increase of memory."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the maximum of the kernel
    before_kb, wall, cpu = memory_kb("VmRSS"), time.perf_counter(), cpu_seconds()
    kept = function()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    del kept
    return Cost(wall, cpu, (memory_kb("VmHWM") - before_kb) / 1024)


def memory_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def plan_epoch(folder: Path, batch_clips: int, num_micro_batches: int) -> Cost:
    """Measure loading the index and planning an epoch."""
    return cost_of(
        lambda: plan_of(
            load(folder),
            keep_every=4,
            batch_clips=batch_clips,
            num_micro_batches=num_micro_batches,
        ).epoch(EPOCH)
    )


def resume(folder: Path, batch_clips: int, num_micro_batches: int) -> Cost:
    """Measure resuming: from loading the index to the clips of a step in mid-epoch."""

    def first_batch() -> list[list[int]]:
        plan = plan_of(
            load(folder),
            keep_every=4,
            batch_clips=batch_clips,
            num_micro_batches=num_micro_batches,
        ).epoch(EPOCH)
        return [rows.tolist() for rows in plan.micro_batches_of(plan.num_steps // 2)]

    return cost_of(first_batch)


@dataclass(frozen=True)
class Balance:
    """Balance of an epoch: max / mean over ranks of the kept frames of each step."""

    ranks: int
    batch_clips: int
    steps: int
    # Share of padding if each micro-batch is padded to its longest clip.
    padding: float
    median: float
    # Maximum over full steps.
    worst: float
    # Value of the last, smaller step; 1 if there is none.
    short: float
    # Whether all ranks have the same number of steps and micro-batches.
    same_steps: bool
    all_clips_once: bool


def balance(folder: Path, ranks: int, batch_clips: int, num_micro_batches: int) -> Balance:
    index = load(folder)
    plan: EpochPlan = plan_of(
        index, keep_every=4, batch_clips=batch_clips, num_micro_batches=num_micro_batches
    ).epoch(EPOCH)
    shares = [
        micro_batches_of_rank(num_micro_batches, rank, ranks) for rank in range(ranks)
    ]
    uneven, sizes = np.zeros(plan.num_steps), np.zeros(plan.num_steps, int)
    seen = np.zeros(len(index), int)
    real = padded = 0
    for step in range(plan.num_steps):
        dealt = plan.micro_batches_of(step)
        kept = [plan.num_kept[rows] for rows in dealt]
        frames = np.array([sum(int(kept[s].sum()) for s in share) for share in shares])
        uneven[step], sizes[step] = frames.max() / frames.mean(), sum(map(len, dealt))
        np.add.at(seen, np.concatenate(dealt), 1)
        real += int(frames.sum())
        padded += sum(len(k) * int(k.max()) for k in kept if len(k))
    full = sizes == sizes.max()
    return Balance(
        ranks=ranks,
        batch_clips=batch_clips,
        steps=plan.num_steps,
        padding=1 - real / padded,
        median=float(np.median(uneven)),
        worst=float(uneven[full].max()),
        short=float(uneven[~full].max(initial=1.0)),
        same_steps=len({len(share) for share in shares}) == 1,
        all_clips_once=bool((seen == 1).all()),
    )


def yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function in a spawned process, without caches of earlier measurements."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    clips: int = 1_000_000,
    rank_clips: int = 8,
    ranks: tuple[int, ...] = (8, 64),
    rounds: int = 5,
) -> str:
    """Plan an epoch of --clips clips with 1 frame in 4 kept; report costs and balance.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --ranks: world sizes. Each rank has one micro-batch of --rank_clips clips per step.
    --rounds: number of measured rounds, each in a separate process.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_new_process(write, folder, clips)
        table_mb = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        worlds = [(world, world * rank_clips) for world in ranks]
        first_world, first_batch = worlds[0]
        plans, resumes = [], []
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            plans.append(in_new_process(plan_epoch, folder, first_batch, first_world))
            resumes.append(in_new_process(resume, folder, first_batch, first_world))
        balances = [
            in_new_process(balance, folder, world, batch, world) for world, batch in worlds
        ]

    report = Report(__file__, f"The plan of {clips:,} clips")
    report.text(
        f"Lengths are log-normal, {SHORTEST} to {LONGEST} frames with a mean of {MEAN} as "
        f"in PHOENIX14T, and 1 frame in 4 is kept. The index takes {table_mb:.0f} MB on "
        f"the disk. Time and memory: median of {rounds} processes with the lowest and the "
        "highest, from opening the index, without imports. Memory is the maximum increase of "
        "the resident size.",
        "A rank computes one micro-batch per step. Its visual tokens are padded to its longest "
        "clip; ranks wait for the rank with most frames. All steps are full except the short "
        "step, which contains the remaining clips.",
    )
    report.table(
        ("what", "seconds", "CPU-seconds", "peak memory, MB"),
        [
            (what, spread([c.wall_s for c in costs], 2), spread([c.cpu_s for c in costs], 2),
             spread([c.peak_mb for c in costs]))
            for what, costs in (("index and plan of an epoch", plans), ("resume in the middle", resumes))
        ],
    )  # fmt: skip
    report.table(
        RANK_COLUMNS,
        [
            (f"{b.ranks}", f"{b.batch_clips}", f"{b.steps:,}", f"{100 * b.padding:.1f} %", f"{b.median:.3f}",
             f"{b.worst:.3f}", f"{b.short:.3f}", yes(b.same_steps), yes(b.all_clips_once))
            for b in balances
        ],
    )  # fmt: skip
    report.text("## Targets")
    found = [
        Target(
            "CPU-seconds of index and plan of an epoch",
            1,
            [c.cpu_s for c in plans],
            at_least=False,
        ),
        Target(
            "peak memory of it",
            200,
            [c.peak_mb for c in plans],
            False,
            digits=0,
            unit=" MB",
        ),
        Target(
            "CPU-seconds to the first batch in the middle",
            2,
            [c.cpu_s for c in resumes],
            at_least=False,
        ),
    ]
    for b in balances:
        uneven = 100 * (max(b.worst, b.short) - 1)
        found += [
            Target(
                f"padding of visual tokens, {b.ranks} ranks",
                15,
                [100 * b.padding],
                False,
                1,
                " %",
            ),
            Target(
                f"frames of a rank above the mean at any step, {b.ranks} ranks",
                3,
                [uneven],
                False,
                2,
                " %",
            ),
        ]
    report.targets(found)
    return report.finish(out, hardware)


if __name__ == "__main__":
    command.main(run)
