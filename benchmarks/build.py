"""Compare shards/build.py with an upper bound: bare loops that decode and encode frames.

python -m benchmarks.build --out=benchmarks/results [--videos=FOLDER]
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import cv2
import numpy as np
import simplejpeg

from benchmarks import material
from benchmarks.measure import Report, Target, cpu_seconds, num_cores, ratios, spread
from flallm_ds import command
from flallm_ds.data.codecs.sizes import fitted_size
from flallm_ds.sharding import build

COLUMNS = (
    "source",
    "side",
    "frames per second",
    "frames per CPU-second",
    "CPU share of all cores",
)


def encode_images(paths: list[Path], quality: int) -> int:
    """Decode and encode PNGs of the size of PHOENIX, without scaling. Return the number."""
    cv2.setNumThreads(1)
    for path in paths:
        frame = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
        simplejpeg.encode_jpeg(frame, quality, "RGB", "420")
    return len(paths)


def encode_video(path: Path, short_side: int, quality: int) -> int:
    """Decode, scale and encode a video in one thread. Return the number of frames.

    Frames are scaled during the conversion to RGB, as in the build.
    """
    num_frames = 0
    with av.open(str(path.absolute())) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        reformatter = av.video.reformatter.VideoReformatter()
        for frame in container.decode(stream):
            height, width = fitted_size(frame.height, frame.width, short_side)
            small = reformatter.reformat(
                frame, width, height, format="rgb24", interpolation="AREA", threads=1
            )
            simplejpeg.encode_jpeg(small.to_ndarray(), quality, "RGB", "420")
            num_frames += 1
    return num_frames


def bare_loops(work: list[Callable[[], int]], workers: int) -> int:
    """Process each clip in one of the worker processes. Return the number of frames."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(call, work))


def call(work: Callable[[], int]) -> int:
    return work()


def build_once(table: Path, out: Path, options: build.Options) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        build.build("manifest", table, out, options, language="de")
    shutil.rmtree(out)


@dataclass
class Side:
    """Measurements of one side, one value for each round."""

    work: Callable[[], object]
    frames_per_s: list[float] = field(default_factory=list)
    frames_per_cpu_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def measure(self, frames: int, workers: int) -> None:
        wall, cpu = time.perf_counter(), cpu_seconds()
        self.work()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        self.frames_per_s.append(frames / wall)
        self.frames_per_cpu_s.append(frames / cpu)
        self.busy.append(cpu / wall / workers)


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    videos: Path | None = None,
    clips: int = 192,
    frames: int = 116,
    mp4_clips: int = 32,
    workers: int = 0,
    rounds: int = 5,
) -> str:
    """Build shards with default options and run bare loops, interleaved; report the ratio.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --videos: folder with real 720p videos; default: synthetic videos.
    --clips, --frames: number of PNG folders and of frames in each. --mp4_clips: number of videos.
    --workers: processes of each side, 0 for one per core. Starting them is included.
    --rounds: number of measured rounds.
    """
    workers = workers or num_cores()
    sources: dict[str, tuple[int, Side, Side]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pngs = material.png_folders(folder / "png", clips, frames, videos)
        mp4s = material.mp4_clips(folder / "mp4", mp4_clips, frames, videos)
        options = build.Options(workers=workers, splits=("train",))
        loops: dict[str, tuple[list[Path], list[Callable[[], int]]]] = {
            "PNG folders, 210x260": (
                [paths[0].parent for paths in pngs],
                [partial(encode_images, paths, options.quality) for paths in pngs],
            ),
            "720p H.264": (
                mp4s,
                [
                    partial(encode_video, path, options.short_side, options.quality)
                    for path in mp4s
                ],
            ),
        }
        for number, (name, (paths, work)) in enumerate(loops.items()):
            table = material.write_manifest(paths, folder / f"{number}.csv")
            # A worker builds whole shards. Many small shards keep all workers busy until
            # the end, as in a real build.
            per_shard = max(1, min(options.clips_per_shard, len(paths) // (8 * workers)))
            own = build.Options(
                workers=workers, splits=("train",), clips_per_shard=per_shard
            )
            num_frames = bare_loops(work, workers)
            sources[name] = (
                num_frames,
                Side(partial(build_once, table, folder / f"shards{number}", own)),
                Side(partial(bare_loops, work, workers)),
            )
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for num_frames, ours, bound in sources.values():
                ours.measure(num_frames, workers)
                bound.measure(num_frames, workers)

    report = Report(__file__, "Building shards, and the bound")
    report.text(
        f"shards/build.py with its defaults on {workers} workers (decode, scale, encode, "
        "pack, checksum, write, sync), and bare loops that decode, scale and encode the "
        "same frames and write nothing. Wall-clock time, because all cores are used: the "
        f"median of {rounds} interleaved rounds, with the lowest and the highest.",
        f"Videos and PNGs are {'of real videos' if videos else 'synthetic'}: "
        + ", ".join(
            f"{num_frames:,} frames of {name}"
            for name, (num_frames, _, _) in sources.items()
        )
        + ".",
    )
    report.table(
        COLUMNS,
        [
            (name, what, spread(side.frames_per_s), spread(side.frames_per_cpu_s),
             spread([100 * share for share in side.busy], 0, " %"))
            for name, (_, ours, bound) in sources.items()
            for what, side in (("shards/build.py", ours), ("bare loops", bound))
        ],
    )  # fmt: skip
    report.text("## Targets")
    report.targets(
        Target(
            f"shards/build.py / bare loops, {name}",
            0.7,
            ratios(ours.frames_per_s, bound.frames_per_s),
        )
        for name, (_, ours, bound) in sources.items()
    )
    return report.finish(out, hardware)


if __name__ == "__main__":
    command.main(run)
