"""Compare our loader with other ways to load clips of the size of PHOENIX and 720p videos.

python -m benchmarks.loader --out=benchmarks/results [--videos=FOLDER]
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

# Before torch is imported: its threads would spin while other threads decode.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch

from benchmarks import material, peers
from benchmarks.measure import (
    Amount,
    Rates,
    Report,
    Target,
    Way,
    interleave,
    num_cores,
    ratios,
    spread,
)
from benchmarks.ours import OurLoader, jpegs, load
from flallm_ds import command
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.errors import UserError

SPDL_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "spdl"
# Epochs of our loader that count as one pass.
EPOCHS = 32
# The same if preprocessing takes much longer than the work done once per epoch.
PIXEL_EPOCHS = 2
COLUMNS = ("way", "kept", "gives", "frames per CPU-second", "CPU-ms a clip", "ours / this")
PIXELS, FRAMES = "224 crops, float32", "packed frames, uint8"
CROPS = "224 crops, uint8"


class Ours:
    """Our loader alone, with 224 crops on the CPU, or with all preprocessing on the CPU.

    In training, the GPU cuts the crops as part of one resampling. Crops in uint8 are what the
    other loaders return; all preprocessing is that of our training step.
    """

    def __init__(self, loader: OurLoader, gives: str) -> None:
        self._loader, self._gives = loader, gives
        self._preprocess = Preprocess(peers.RESIZE, peers.CROP)

    def __call__(self) -> Amount:
        num_frames = num_clips = 0
        for batch in self._loader.batches():
            num_frames, num_clips = (
                num_frames + int(batch.num_frames_B.sum()),
                num_clips + len(batch.keys),
            )
            if self._gives == CROPS:
                crop(
                    batch.frames_NHWC.numpy(),
                    batch.num_frames_B.tolist(),
                    batch.draws_B9.numpy(),
                )
            elif self._gives == PIXELS:
                self._preprocess(batch, train=True, device=torch.device("cpu"))
        return Amount(num_frames, num_clips)


def crop(
    frames_NHWC: np.ndarray, num_frames_B: list[int], draws_B9: np.ndarray
) -> np.ndarray:
    """Resize each frame to 256x256 and cut a random 224 crop, the same within a clip."""
    crops_NHWC = np.empty((len(frames_NHWC), peers.CROP, peers.CROP, 3), np.uint8)
    square = np.empty((peers.RESIZE, peers.RESIZE, 3), np.uint8)
    offsets_B2 = (draws_B9[:, :2] * (peers.RESIZE - peers.CROP)).astype(int)
    for place, (top, left) in enumerate(
        np.repeat(offsets_B2, num_frames_B, axis=0).tolist()
    ):
        cv2.resize(
            frames_NHWC[place], square.shape[:2], dst=square, interpolation=cv2.INTER_LINEAR
        )
        crops_NHWC[place] = square[top : top + peers.CROP, left : left + peers.CROP]
    return crops_NHWC


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    videos: Path | None = None,
    clips: int = 32,
    frames: int = 116,
    mp4_clips: int = 6,
    batch_clips: int = 4,
    threads: int = 0,
    rounds: int = 5,
    seconds: float = 2.0,
    spdl: bool = True,
) -> str:
    """Load the same clips in every way, interleaved, and report frames per CPU-second.

    --out: folder for the report. --hardware: name of the machine in the file name; default: the CPU.
    --videos: folder with real 720p videos; default: synthetic videos.
    --clips, --frames: number of clips of the size of PHOENIX and of frames in each.
    --mp4_clips: number of videos. --batch_clips: clips of a batch.
    --threads: decoding threads of our loader and SPDL, and DataLoader workers; 0 for one per core.
    --rounds: number of rounds. --seconds: CPU time of each way in a round, at least one pass.
    --spdl: compare with SPDL, whose environment is created in .cache.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    threads = threads or num_cores()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        pngs = material.png_folders(folder / "png", clips, frames, videos)
        shards = material.build_shards(
            [paths[0].parent for paths in pngs], folder / "shards"
        )
        tar = material.frame_tar(shards, folder / "frames.tar")
        index = load(shards)

        python, no_spdl = None, "left out by --spdl=false"
        if spdl:
            try:
                python = peers.spdl_python(SPDL_FOLDER)
            except UserError as error:
                no_spdl = str(error)

        ways: dict[str, Way] = {}
        gives: dict[str, str] = {}

        def add(key: str, result: str, way: Way) -> None:
            ways[key], gives[key] = way, result

        for keep, name in ((1, "all"), (4, "4")):
            loader = OurLoader(shards, keep, batch_clips, threads, EPOCHS)
            add(f"ours {name}", FRAMES, Way("ours", Ours(loader, FRAMES)))
            add(
                f"crops {name}",
                CROPS,
                Way("ours, and crops cut on the CPU", Ours(loader, CROPS)),
            )
            slow = OurLoader(shards, keep, batch_clips, threads, PIXEL_EPOCHS)
            add(
                f"pixels {name}",
                PIXELS,
                Way("ours, and all preprocessing on the CPU", Ours(slow, PIXELS)),
            )
            for count in sorted({1, threads}):
                bare = Way(
                    f"bound: bare decode loop, threads: {count}",
                    peers.BareLoop(index, keep, count),
                )
                add(f"bound {count} {name}", "nothing", bare)
            workers = peers.TorchDataLoader(index, keep, batch_clips, threads)
            add(
                f"workers {name}",
                FRAMES,
                Way(f"DataLoader, {threads} workers, our decoder", workers),
            )
            add(
                f"members {name}",
                FRAMES,
                Way(
                    "webdataset, a member a frame",
                    peers.PlainWebdataset(tar, keep, batch_clips),
                ),
            )
            if python is not None:
                for way in ("video", "images"):
                    side = peers.Spdl(python, index, keep, threads, way)
                    stack.callback(side.close)
                    add(f"spdl {way} {name}", FRAMES, Way(f"SPDL, {way}", side))
            folders = peers.PngFolders(pngs, keep, batch_clips)
            add(f"png {name}", PIXELS, Way("PNG folders, as GFSLT-VLP loads", folders))
        rates = interleave(ways, rounds=rounds, seconds=seconds)
        png_kb = (
            sum(p.stat().st_size for paths in pngs for p in paths) / (clips * frames) / 1000
        )
        jpeg_kb = (
            sum(len(j) for row in range(clips) for j in jpegs(index, row))
            / (clips * frames)
            / 1000
        )

        mp4s = material.mp4_clips(folder / "mp4", mp4_clips, frames, videos)
        large = material.build_shards(mp4s, folder / "large")
        large_ways = {}
        for keep, name in ((1, "all"), (4, "4")):
            loader = OurLoader(large, keep, batch_clips, threads, EPOCHS)
            large_ways[f"ours {name}"] = Way(
                "ours, sharded by shards/build.py", Ours(loader, FRAMES)
            )
            large_ways[f"mp4 {name}"] = Way(
                "the mp4, by PyAV", peers.Mp4(mp4s, keep, batch_clips)
            )
        large_rates = interleave(large_ways, rounds=rounds, seconds=seconds)

    versions = (
        dict(package.split("==") for package in peers.SPDL_PACKAGES[:2]) if python else {}
    )
    report = Report(__file__, "Loading clips: ours and other ways", versions)
    report.text(
        "Kept frames per second of CPU time of all processes (real frames, no padding): "
        f"the median of {rounds} interleaved rounds, with the lowest and the highest. "
        "Ratios are taken round by round.",
        f"## {clips} clips of {frames} frames of 210x260",
        f"Frames: {'of real videos' if videos else 'synthetic (signsim)'}; a PNG takes "
        f"{png_kb:.1f} kB and a JPEG {jpeg_kb:.1f} kB (PNGs of the PHOENIX14T release: "
        f"about 40 kB). {batch_clips} clips a batch, {threads} threads.",
    )
    report.table(COLUMNS, rows(ways, rates, gives))
    if python is None:
        report.text(f"SPDL is not compared: {no_spdl}")
    report.text(f"## {len(mp4s)} clips of 720p H.264")
    report.text(
        f"Videos: {'real' if videos else 'synthetic'}. Both sides give frames of a short "
        "side of 256."
    )
    report.table(COLUMNS, rows(large_ways, large_rates, dict.fromkeys(large_ways, FRAMES)))
    report.text("## Targets")
    report.targets(targets(rates, large_rates))
    return report.finish(out, hardware)


def rows(
    ways: dict[str, Way], rates: dict[str, Rates], gives: dict[str, str]
) -> list[tuple[str, ...]]:
    table = []
    for key, way in ways.items():
        mine, its = rates[f"ours {key.split()[-1]}"], rates[key]
        table.append(
            (
                way.label,
                "all" if key.endswith("all") else "1 in 4",
                gives[key],
                spread(its.frames_per_cpu_s),
                spread(its.cpu_ms_per_clip, 1),
                spread(ratios(mine.frames_per_cpu_s, its.frames_per_cpu_s), 2),
            )
        )
    return table


def targets(rates: dict[str, Rates], large_rates: dict[str, Rates]) -> list[Target]:
    def times(mine: str, its: str, source: dict[str, Rates] = rates) -> list[float]:
        return ratios(source[mine].frames_per_cpu_s, source[its].frames_per_cpu_s)

    def cheaper(mine: str, its: str) -> list[float]:
        return ratios(rates[its].cpu_ms_per_clip, rates[mine].cpu_ms_per_clip)

    found = [
        Target(
            "frames per CPU-second, ours / PNG folders, all kept",
            20,
            times("ours all", "png all"),
        ),
        Target("the same, our crops cut on the CPU", 20, times("crops all", "png all")),
        Target(
            "CPU-ms a clip, PNG folders with all kept / ours at 1 in 4",
            60,
            cheaper("ours 4", "png all"),
        ),
        Target("the same, our crops cut on the CPU", 60, cheaper("crops 4", "png all")),
        *(
            Target(
                f"ours / bound on {key.split()[1]} threads, {kept}",
                0.85,
                times(f"ours {name}", key),
            )
            for name, kept in (("all", "all kept"), ("4", "1 in 4"))
            for key in rates
            if key.startswith("bound") and key.split()[-1] == name
        ),
        Target("ours / DataLoader, all kept", 1.5, times("ours all", "workers all")),
        Target("ours / DataLoader, 1 in 4", 1.5, times("ours 4", "workers 4")),
        Target(
            "ours / webdataset with a member a frame, 1 in 4",
            2.5,
            times("ours 4", "members 4"),
        ),
        Target("ours / mp4, all kept", 10, times("ours all", "mp4 all", large_rates)),
        Target("ours / mp4, 1 in 4", 10, times("ours 4", "mp4 4", large_rates)),
    ]
    if "spdl video all" in rates:
        for name, kept in (("all", "all kept"), ("4", "1 in 4")):
            ways = [f"spdl {way} {name}" for way in ("video", "images")]
            fastest = max(ways, key=lambda way: sum(rates[way].frames_per_cpu_s))
            what = f"ours / SPDL ({fastest.split()[1]}, its fastest), {kept}"
            found.append(Target(what, 1, times(f"ours {name}", fastest)))
    return found


if __name__ == "__main__":
    command.main(run)
