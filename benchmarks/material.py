"""What the benchmarks load: the same clips as PNG folders, as shards, as tars of single
frames, and as mp4.

Frames come from the synthetic corpus, or, better, from real videos (`--videos=FOLDER`):
what a frame costs to decode depends on what is on it.
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
        raise UserError(
            f"--videos must be a folder with videos, but none is below {folder}."
        )
    return found


def frames(videos: Path | None) -> Iterator[np.ndarray]:
    """Endless frames, RGB uint8: of the videos, or of the synthetic corpus."""
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
    """The frame's middle part of PHOENIX's shape, scaled to its size."""
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
    """`clips` folders of `num_frames` PNGs of PHOENIX's size each; the paths."""
    stream = map(phoenix_size, frames(videos))
    folders = []
    for number in range(clips):
        place = folder / f"clip{number:04d}"
        place.mkdir(parents=True)
        paths = [place / f"images{n:04d}.png" for n in range(1, num_frames + 1)]
        for path, frame in zip(paths, islice(stream, num_frames), strict=True):
            # Level 6 and adaptive filters, as most writers of PNGs have it.
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
    """Videos of 1280x720 in H.264: the first of those given, or synthetic ones made here."""
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
                # A camera's noise, at half the resolution as after a phone's own
                # denoising.
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
    """A manifest of clips (videos or folders of frames), all of the split train, with
    made-up sentences."""
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
    """Shards of these clips by shards/build.py with its defaults."""
    table = write_manifest(sources, out.with_suffix(".csv"))
    command = [sys.executable, str(ROOT / "shards" / "build.py"), "manifest"]
    command += [f"--source={table}", f"--out={out}", "--language=de", "--splits=train"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(
            f"shards must be built, but were not: {made.stderr.strip().splitlines()[-1]}"
        )
    return out


def frame_tar(shards: Path, path: Path) -> Path:
    """A tar with one member a frame, as plain webdataset has it: the JPEGs of the shards,
    byte for byte."""
    # not above: it imports torch, which the builder's processes would wait for
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
