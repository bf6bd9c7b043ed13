"""Check that memory, open files and threads stay constant over many epochs of the loader.

python -m benchmarks.memory --out=benchmarks/results [--videos=FOLDER]
"""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

from benchmarks import material
from benchmarks.measure import Report, num_cores
from benchmarks.ours import OurLoader
from flallm_ds import command

# Epochs until libraries and the allocator have reserved their memory.
WARM_UP = 3
COLUMNS = ("epoch", "memory, MB", "highest in the epoch, MB", "open files", "threads")


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    videos: Path | None = None,
    clips: int = 32,
    frames: int = 116,
    epochs: int = 20,
    keep_every: int = 4,
    batch_clips: int = 4,
    threads: int = 0,
) -> str:
    """Load the same clips in each epoch and report the memory after each, with its slope.

    --out: folder for report and plot. --hardware: name of the machine in the file names.
    --videos: folder with videos; default: synthetic videos. --clips, --frames: number of clips and of
    frames in each. --threads: data-loading threads, 0 for one per core.
    """
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pngs = material.png_folders(folder / "png", clips, frames, videos)
        shards = material.build_shards(
            [paths[0].parent for paths in pngs], folder / "shards"
        )
        loader = OurLoader(shards, keep_every, batch_clips, threads or num_cores())
        after, highest, files, num_threads = [], [], [], []
        for _ in range(epochs):
            top = 0
            for _batch in loader.batches():
                top = max(top, process.memory_info().rss)
            del _batch
            gc.collect()
            after.append(process.memory_info().rss / 1e6)
            highest.append(top / 1e6)
            files.append(process.num_fds())
            num_threads.append(process.num_threads())

    first = min(WARM_UP, epochs - 2)
    slope, begin = np.polyfit(np.arange(first, epochs), after[first:], 1)
    report = Report(__file__, f"Memory over {epochs} epochs of the loader")
    report.text(
        f"{clips} clips of {frames} frames of 210x260, 1 frame in {keep_every} kept, "
        f"{batch_clips} clips a batch. After {first} epochs the resident memory changes by "
        f"**{slope:+.2f} MB an epoch** (line of least squares), {100 * slope / begin:+.2f} "
        f"% of it; open files by {files[-1] - files[first]:+d} and threads by "
        f"{num_threads[-1] - num_threads[first]:+d} over all of them."
    )
    if out is not None:
        picture = report.path(out, hardware, ".png")
        plot(picture, after, highest, slope, first)
        report.text(f"![memory]({picture.name})")
    report.table(
        COLUMNS,
        [
            (
                f"{n + 1}",
                f"{after[n]:.1f}",
                f"{highest[n]:.1f}",
                f"{files[n]}",
                f"{num_threads[n]}",
            )
            for n in range(epochs)
        ],
    )
    return report.finish(out, hardware)


def plot(
    path: Path, after: list[float], highest: list[float], slope: float, first: int
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    numbers = range(1, len(after) + 1)
    axes.plot(
        numbers, highest, marker=".", color="tab:gray", label="highest within the epoch"
    )
    axes.plot(numbers, after, marker="o", color="tab:blue", label="after the epoch")
    axes.set_title(f"{slope:+.2f} MB an epoch from epoch {first + 1} on")
    axes.set_xlabel("epoch")
    axes.set_ylabel("resident memory, MB")
    axes.set_ylim(0, max(highest) * 1.15)
    axes.set_xticks(numbers)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    command.main(run)
