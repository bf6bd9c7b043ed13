"""Load the same clips in the ways of other projects, and measure an upper bound.

If a project leaves a choice, the cheaper one is used here; the docstrings say so. No way
loads texts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import ROOT, Amount
from benchmarks.ours import Index, decode_clip, jpegs, member, tar_of
from flallm_ds.data.codecs.avi import frame_spans
from flallm_ds.data.codecs.decode import FAST
from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError

RESIZE, CROP = 256, 224
SPDL_PACKAGES = ("spdl-io==0.8.0", "spdl-core==0.8.0", "av==18.0.0", "numpy")


def batches_of(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


# --- PNG files (GFSLT-VLP)


class PngFolders:
    """S2T_Dataset.load_imgs and collate_fn of GFSLT-VLP (datasets.py): PNG to float32.

    Each frame: cv2.imread, cvtColor, PIL.Image.fromarray, resize to 256 with the default of
    PIL (bicubic), ToTensor and Normalize (of torchvision, written out here). Then a 224 crop,
    the same for all frames of a clip, is copied into a zeroed tensor. Collating repeats the
    first frame 8 times and the last one up to a multiple of 4 plus 8 (one copy), and joins
    the clips (another copy). Cheaper than the original: no augmentation (the original
    rotates and scales every frame with PIL in training), no mask, no tokens. The original
    cannot keep 1 frame in 4; with `keep_every`, paths are dropped before they are read.
    """

    def __init__(self, clips: list[list[Path]], keep_every: int, batch_clips: int) -> None:
        self._clips = [paths[::keep_every] for paths in clips]
        self._batch_clips = batch_clips
        self._rng = np.random.default_rng(0)
        self._mean = torch.tensor(IMAGENET_MEAN).view(-1, 1, 1)
        self._std = torch.tensor(IMAGENET_STD).view(-1, 1, 1)

    def __call__(self) -> Amount:
        for rows in batches_of(range(len(self._clips)), self._batch_clips):
            self._collate([self._load(self._clips[row]) for row in rows])
        return Amount(sum(map(len, self._clips)), len(self._clips))

    def _load(self, paths: list[Path]) -> torch.Tensor:
        pixels_TCHW = torch.zeros(len(paths), 3, CROP, CROP)
        left, top = self._rng.integers(0, RESIZE - CROP, 2)
        images = []
        for path in paths:
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            images.append(Image.fromarray(image))
        for place, image in enumerate(images):
            image = image.resize((RESIZE, RESIZE))
            pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(
                RESIZE, RESIZE, 3
            )
            pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
            pixels = pixels.clone().sub_(self._mean).div_(self._std).unsqueeze(0)
            pixels_TCHW[place] = pixels[:, :, top : top + CROP, left : left + CROP]
        return pixels_TCHW

    def _collate(self, clips: list[torch.Tensor]) -> torch.Tensor:
        longest = max(map(len, clips))
        full = 8 + -(-longest // 4) * 4 + 8
        padded = []
        for clip in clips:
            first = clip[0][None].expand(8, -1, -1, -1)
            last = clip[-1][None].expand(full - len(clip) - 8, -1, -1, -1)
            whole = torch.cat((first, clip, last), dim=0)
            padded.append(whole[: -(-len(clip) // 4) * 4 + 16])
        return torch.cat(padded, 0)


# --- the bytes of the shards


class BareLoop:
    """Upper bound: decode the same JPEGs from memory into one small buffer per thread.

    It has as many threads as our loader, because busy cores that share caches do less work
    in a CPU-second.
    """

    def __init__(self, index: Index, keep_every: int, threads: int) -> None:
        self._clips = [jpegs(index, row)[::keep_every] for row in range(len(index))]
        self._hw, self._threads = index.frame_hw, threads

    def __call__(self) -> Amount:
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(self._decode, range(self._threads)))
        return Amount(sum(map(len, self._clips)), len(self._clips))

    def _decode(self, part: int) -> None:
        buffer = np.empty((*self._hw, 3), np.uint8)
        for clip in self._clips[part :: self._threads]:
            for jpeg in clip:
                simplejpeg.decode_jpeg(jpeg, "RGB", buffer=buffer, **FAST)


class _DecodedClips(Dataset[torch.Tensor]):
    def __init__(self, index: Index, keep_every: int) -> None:
        self._index, self._keep_every = index, keep_every

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> torch.Tensor:
        picks = np.arange(0, int(self._index.num_frames[row]), self._keep_every)
        return torch.from_numpy(decode_clip(self._index, row, picks))


class TorchDataLoader:
    """torch.utils.data.DataLoader: workers read clips by offset and decode kept frames.

    The decoder is ours; a batch contains joined clips, uint8. Workers persist between
    passes, so that starting them is not counted.
    """

    def __init__(
        self, index: Index, keep_every: int, batch_clips: int, workers: int
    ) -> None:
        self._num_clips = len(index)
        self._loader = DataLoader(
            _DecodedClips(index, keep_every),
            batch_size=batch_clips,
            shuffle=True,
            num_workers=workers,
            collate_fn=torch.cat,
            persistent_workers=True,
        )

    def __call__(self) -> Amount:
        return Amount(
            sum(len(frames_NHWC) for frames_NHWC in self._loader), self._num_clips
        )


class PlainWebdataset:
    """webdataset as usually used: a sample is a clip, a member `KEY.NNNN.jpg` a frame.

    webdataset reads all members. Our decoder decodes the kept ones, and the clips of a batch
    are joined.
    """

    def __init__(self, tar: Path, keep_every: int, batch_clips: int) -> None:
        self._tar, self._keep_every, self._batch_clips = str(tar), keep_every, batch_clips

    def __call__(self) -> Amount:
        num_frames = num_clips = 0
        waiting: list[np.ndarray] = []
        for sample in webdataset.WebDataset([self._tar], shardshuffle=False):
            names = sorted(name for name in sample if name.endswith(".jpg"))[
                :: self._keep_every
            ]
            frames_THWC = np.stack(
                [simplejpeg.decode_jpeg(sample[name], "RGB", **FAST) for name in names]
            )
            num_frames, num_clips = num_frames + len(frames_THWC), num_clips + 1
            waiting.append(frames_THWC)
            if len(waiting) == self._batch_clips:
                torch.from_numpy(np.concatenate(waiting))
                waiting = []
        return Amount(num_frames, num_clips)


# --- the videos themselves


class Mp4:
    """Decode mp4 files in training with PyAV; kept frames get a short side of 256.

    It uses one decoding thread, which costs the least CPU time, and bilinear scaling during
    the conversion to RGB. A batch contains joined clips, uint8.
    """

    def __init__(self, paths: list[Path], keep_every: int, batch_clips: int) -> None:
        self._paths, self._keep_every, self._batch_clips = paths, keep_every, batch_clips

    def __call__(self) -> Amount:
        num_frames = 0
        for rows in batches_of(range(len(self._paths)), self._batch_clips):
            clips = [self._decode(self._paths[row]) for row in rows]
            by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
            for clip in clips:
                by_shape.setdefault(clip.shape[1:], []).append(clip)
                num_frames += len(clip)
            for same in by_shape.values():
                torch.from_numpy(np.concatenate(same))
        return Amount(num_frames, len(self._paths))

    def _decode(self, path: Path) -> np.ndarray:
        kept = []
        with av.open(str(path.absolute())) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number % self._keep_every == 0:
                    scale = RESIZE / min(frame.width, frame.height)
                    small = frame.reformat(
                        round(frame.width * scale),
                        round(frame.height * scale),
                        format="rgb24",
                        interpolation="BILINEAR",
                    )
                    kept.append(small.to_ndarray())
        return np.stack(kept)


# --- SPDL


def spdl_python(folder: Path) -> Path:
    """Return the Python of an environment with SPDL and the FFmpeg of PyAV.

    It is created if it does not exist. Raises UserError if this fails.
    """
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.is_file() and ready.read_text().split() == list(SPDL_PACKAGES):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *SPDL_PACKAGES],
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            reason = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"Cannot install SPDL into {folder.name}: {reason}")
    # SPDL searches for FFmpeg libraries by their plain names, but the names in the wheel of
    # PyAV contain a hash.
    (libraries,) = folder.glob("lib/python*/site-packages/av.libs")
    links = folder / "ffmpeg"
    links.mkdir()
    for library in libraries.glob("lib*.so.*"):
        if library.name.startswith(("libav", "libsw")):
            stem, _, version = library.name.partition(".so.")
            (links / f"{stem.rsplit('-', 1)[0]}.so.{version.split('.')[0]}").symlink_to(
                library
            )
    ready.write_text("\n".join(SPDL_PACKAGES))
    return python


class Spdl:
    """The pipeline of SPDL over the same shards, in a separate process (spdl_child.py).

    The process persists, so that starting it is not counted. Clips are not joined to
    batches, which saves a copy.
    """

    def __init__(
        self, python: Path, index: Index, keep_every: int, threads: int, way: str
    ) -> None:
        folder = python.parents[1]
        (libraries,) = folder.glob("lib/python*/site-packages/av.libs")
        environment = os.environ | {
            "LD_LIBRARY_PATH": f"{(folder / 'ffmpeg').absolute()}:{libraries.absolute()}"
        }
        clips = [
            {
                "path": str(tar_of(index, row).absolute()),
                "offset": int(index.arrays["offset"][row]),
                "size": int(index.arrays["size"][row]),
                "spans": frame_spans(member(index, row))[::keep_every].tolist(),
            }
            for row in range(len(index))
        ]
        self._child = subprocess.Popen(
            [str(python), str(ROOT / "benchmarks" / "spdl_child.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._ask(
            {"clips": clips, "whole": keep_every == 1, "threads": threads, "way": way}
        )

    def __call__(self) -> Amount:
        return Amount(**self._ask({}))

    def close(self) -> None:
        # Closing its stdin is not enough: forked workers of DataLoader keep it open.
        self._child.kill()
        self._child.wait()

    def _ask(self, question: dict[str, object]) -> dict[str, int]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps(question) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise UserError(
                "Cannot load the shards with SPDL: its process ended. See its message above."
            )
        return dict(json.loads(answer))
