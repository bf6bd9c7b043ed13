"""Make the clips for the benchmarks as PNG folders, shards, tars of frames, and mp4.

Frames come from the synthetic corpus or from real videos (`--videos=FOLDER`). Real videos
are better, because the decoding time of a frame depends on its content.
"""

import csv
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, count, cycle, islice
from pathlib import Path

import av
import cv2
import numpy as np

from benchmarks.measure import ROOT
from benchmarks.ours import Index, jpegs, load
from flallm_ds.data.codecs.video import VIDEO_SUFFIXES, read_frames
from flallm_ds.errors import UserError
from flallm_ds.signsim.corpus import plan_clip
from flallm_ds.signsim.render import render_clip
from flallm_ds.signsim.signer import clip_poses
from flallm_ds.signsim.signs import SIGNS

HEIGHT, WIDTH = 260, 210  # of a PHOENIX14T frame
FPS = 25


def video_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise UserError(f"--videos must be a folder with videos, got {folder} without any.")
    return found


def frames(videos: Path | None) -> Iterator[np.ndarray]:
    """Yield an infinite stream of frames, RGB uint8, of videos or the synthetic corpus."""
    if videos is not None:
        yield from chain.from_iterable(
            read_frames(path) for path in cycle(video_files(videos))
        )
    for number in count():
        clip, rng = plan_clip(number % 1000, 1000, number // 1000)
        poses = clip_poses(
            [SIGNS[gloss] for gloss in clip.sentence.glosses], clip.signer, rng
        )
        for frame in render_clip(poses, clip.signer, rng):
            yield np.ascontiguousarray(frame[:, :, ::-1])


def phoenix_size(frame: np.ndarray) -> np.ndarray:
    """Cut the centre of a frame to the aspect ratio of PHOENIX and scale it to its size."""
    height, width = frame.shape[:2]
    part_width, part_height = (
        min(width, height * WIDTH // HEIGHT),
        min(height, width * HEIGHT // WIDTH),
    )
    top, left = (height - part_height) // 2, (width - part_width) // 2
    part = frame[top : top + part_height, left : left + part_width]
    return np.asarray(cv2.resize(part, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))


def png_folders(
    folder: Path, clips: int, num_frames: int, videos: Path | None
) -> list[list[Path]]:
    """Write `clips` folders of `num_frames` PNGs of the size of PHOENIX. Return paths."""
    stream = map(phoenix_size, frames(videos))
    folders = []
    for number in range(clips):
        place = folder / f"clip{number:04d}"
        place.mkdir(parents=True)
        paths = [place / f"images{n:04d}.png" for n in range(1, num_frames + 1)]
        for path, frame in zip(paths, islice(stream, num_frames), strict=True):
            # Level 6 and adaptive filters are the defaults of most PNG writers.
            options = (
                cv2.IMWRITE_PNG_COMPRESSION,
                6,
                cv2.IMWRITE_PNG_FILTER,
                cv2.IMWRITE_PNG_ALL_FILTERS,
            )
            cv2.imwrite(str(path), frame[:, :, ::-1], options)
        folders.append(paths)
    return folders


def mp4_clips(folder: Path, clips: int, num_frames: int, videos: Path | None) -> list[Path]:
    """Return H.264 videos of 1280x720: the first of `videos`, or new synthetic ones."""
    if videos is not None:
        return video_files(videos)[:clips]
    folder.mkdir(parents=True)
    stream = frames(None)
    rng = np.random.default_rng(0)
    paths = [folder / f"clip{number:04d}.mp4" for number in range(clips)]
    for path in paths:
        with av.open(str(path), "w") as container:
            video = container.add_stream(
                "libx264", rate=Fraction(FPS), options={"crf": "20"}
            )
            video.width, video.height, video.pix_fmt = 1280, 720, "yuv420p"
            video.codec_context.thread_count = 1
            for frame in islice(stream, num_frames):
                large = cv2.resize(
                    frame, (1280, 720), interpolation=cv2.INTER_CUBIC
                ).astype(np.int16)
                # Camera noise at half the resolution, as after the denoising of a phone.
                noise = cv2.resize(
                    rng.normal(0, 4, (360, 640)).astype(np.float32), (1280, 720)
                )
                picture = (large + noise[:, :, None]).clip(0, 255).astype(np.uint8)
                container.mux(
                    video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
                )
            container.mux(video.encode(None))
    return paths


def write_manifest(sources: list[Path], path: Path) -> Path:
    """Write a manifest of videos or frame folders in split train, with random sentences."""
    words = [
        "am",
        "tag",
        "im",
        "norden",
        "regnet",
        "es",
        "und",
        "die",
        "sonne",
        "scheint",
        "viel",
        "wind",
    ]
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("video", "text", "split", "signer"))
        for number, source in enumerate(sources):
            text = " ".join(rng.choice(words, 12))
            table.writerow((source.resolve(), text, "train", f"signer{number % 5}"))
    return path


def build_shards(sources: list[Path], out: Path) -> Path:
    """Build shards of these clips with shards/build.py and its defaults."""
    table = write_manifest(sources, out.with_suffix(".csv"))
    command = [sys.executable, str(ROOT / "shards" / "build.py"), "manifest"]
    command += [f"--source={table}", f"--out={out}", "--language=de", "--splits=train"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(f"Cannot build shards: {made.stderr.strip().splitlines()[-1]}")
    return out


def frame_tar(shards: Path, path: Path) -> Path:
    """Write a tar with one member per frame, with the same JPEGs as the shards."""
    # Imported here, because it imports torch, which the processes of the build do not need.
    import webdataset

    index: Index = load(shards)
    keys = index.strings("key")
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for row in range(len(index)):
            members = {
                f"{n:04d}.jpg": bytes(jpeg) for n, jpeg in enumerate(jpegs(index, row))
            }
            tar.write({"__key__": keys[row]} | members)
    return path
