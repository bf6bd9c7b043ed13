"""What a loader's threads do for one clip: read its bytes and bring its content into a batch.

`ClipReader` knows the clips of a split: their random numbers, and their bytes by offset.
What a batch holds of a clip is one of three contents: decoded frames, JPEGs as they are
stored, or cached features. `content_of` chooses one, once for a loader; all else treats
them alike.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from flallm_ds.batch import Batch, EncodedBatch
from flallm_ds.data.codecs.decode import decode_frames, jpegs_of
from flallm_ds.data.index import Index
from flallm_ds.data.plan import Plan
from flallm_ds.data.sampling import FrameSampling, sample_rng
from flallm_ds.errors import RankError, UserError
from flallm_ds.features.facts import from_npy
from flallm_ds.features.sequences import resample, resampled_lengths

NUM_DRAWS = 9
# references to a buffer that nobody holds: the list's, and getrefcount's argument
_UNHELD = 2


class FrameBuffers:
    """Memory for frames or features that is used again: fresh memory costs a page fault
    each 4 kB.

    A tensor from here may be kept as long as anyone likes: every view of it holds its
    buffer. Pinned where there is a GPU, so that copies to it run next to everything else.
    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._buffers)

    def take(self, shape: tuple[int, ...], dtype: str = "uint8") -> torch.Tensor:
        """Return a tensor of this shape whose content is whatever was there before.

        Raises RankError where there is too little memory.
        """
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            buffer = self._buffer_of(num_bytes)
        except (MemoryError, RuntimeError) as error:
            # A batch's canvas is as large as the largest frame of all clips.
            raise RankError(
                f"a micro-batch must fit into memory, but one of the shape {shape} takes "
                f"{num_bytes / 1e9:,.0f} GB. Lower --data.batch_clips or "
                "--data.max_frames, or build shards of smaller frames (--short_side)."
            ) from error
        return torch.from_numpy(buffer[:num_bytes].view(dtype).reshape(shape))

    def _buffer_of(self, num_bytes: int) -> np.ndarray:
        """Return a buffer of at least this size that nobody holds, uint8."""
        buffers = self._buffers
        free = [n for n in range(len(buffers)) if sys.getrefcount(buffers[n]) == _UNHELD]
        fitting = [n for n in free if len(buffers[n]) >= num_bytes]
        if fitting:
            return buffers[min(fitting, key=lambda n: len(buffers[n]))]

        # The largest free one gives way to a larger one.
        chosen = max(free, key=lambda n: len(buffers[n]), default=len(buffers))
        buffers[chosen : chosen + 1] = []
        pinned = torch.cuda.is_available()
        memory = torch.empty(
            num_bytes + num_bytes // 4, dtype=torch.uint8, pin_memory=pinned
        )
        buffers.insert(chosen, memory.numpy())
        return buffers[chosen]


_of_thread = threading.local()


def _memory_of_thread(size: int) -> bytearray:
    """Return the same memory for each clip: fresh memory costs as much as reading into it."""
    memory: bytearray = getattr(_of_thread, "memory", bytearray())
    if len(memory) < size:
        memory = _of_thread.memory = bytearray(size + size // 4)
    return memory


@dataclass(frozen=True)
class Clip:
    """What a thread brings of a clip, besides what it wrote into the batch's memory."""

    draws: np.ndarray  # float32 (9,)
    jpegs: list[memoryview]  # empty unless frames stay JPEGs


@dataclass(frozen=True)
class ClipReader:
    """Reads clips of one split by their offsets in the tars.

    seed, train: with `train`, a random frame of each group is kept, drawn from (seed,
    epoch, sample). feature_fps: the rate that cached features are brought to; none: their
    own.
    """

    index: Index
    sampling: FrameSampling
    seed: int
    train: bool
    feature_fps: float | None = None

    def num_places(self) -> np.ndarray:
        """Count the frames or features that a batch holds of each clip, int64 (clips,).

        Raises UserError where features cannot be brought to `feature_fps`.
        """
        num_frames, fps = self.index.num_frames, self.index.arrays["fps"]
        kept = self.sampling.num_kept(num_frames, fps)
        if self.feature_fps is None:
            return kept
        try:
            return resampled_lengths(
                kept, self.sampling.rates(num_frames, fps), self.feature_fps
            )
        except ValueError as error:
            raise UserError(
                f"data.feature_fps cannot be {self.feature_fps} for {self.index.root}: "
                f"{error}."
            ) from error

    def plan(
        self,
        batch_clips: int,
        slices: int,
        *,
        batch_frames: int = 0,
        weights: Sequence[float] = (),
    ) -> Plan:
        """Plan the order of these clips; the arguments are fields of `Plan`. Raises as
        `num_places`."""
        arrays = self.index.arrays
        return Plan(
            fingerprint=self.index.fingerprint,
            num_kept=self.num_places(),
            shard=arrays["shard"],
            seed=self.seed,
            batch_clips=batch_clips,
            slices=slices,
            batch_frames=batch_frames,
            corpus=arrays.get("corpus"),
            weights=tuple(weights),
            features=self.index.features_digest,
        )

    def draws(self, row: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clip's random numbers, float32 (9,), and the indices of its kept frames."""
        rng = sample_rng(self.seed, epoch, self.index.own_row(row)) if self.train else None
        draws = rng.random(NUM_DRAWS) if rng is not None else np.zeros(NUM_DRAWS)
        num_frames = int(self.index.num_frames[row])
        picks = self.sampling.picks(num_frames, float(self.index.arrays["fps"][row]), rng)
        return draws.astype(np.float32), picks

    def read(
        self,
        row: int,
        memory: Callable[[int], bytearray] = bytearray,
        epoch: int = 0,
    ) -> memoryview:
        """Return the clip's bytes, in what `memory(size)` gives. Each epoch reads the next view.

        Raises OSError or ValueError if any byte is missing.
        """
        size = int(self.index.arrays["size"][row])
        offset = int(self.index.arrays["offset"][row])
        with self.index.store.open(self.index.tar(row, epoch)) as file:
            # Before memory is taken for what the index claims.
            found = os.fstat(file.fileno()).st_size - offset
            if found < size:
                found = max(found, 0)
                raise ValueError(
                    f"must hold {size} bytes at {offset}, but ends after {found}"
                )
            member = memoryview(memory(size))[:size]
            found = os.preadv(file.fileno(), [member], offset)
        if found != size:
            raise ValueError(f"must hold {size} bytes at {offset}, but ends after {found}")
        return member

    def read_into(self, frames_THWC: np.ndarray, row: int, picks: np.ndarray) -> None:
        """Decode the picked frames into the canvases' top left corners. Raises ValueError."""
        arrays = self.index.arrays
        hw = int(arrays["height"][row]), int(arrays["width"][row])
        member = self.read(row, _memory_of_thread)
        decode_frames(member, picks, int(arrays["num_frames"][row]), frames_THWC, hw)

    def read_jpegs(self, row: int, picks: np.ndarray) -> list[memoryview]:
        """Return the picked frames as they are stored.

        Raises ValueError if the clip is broken or holds no JPEGs.
        """
        return jpegs_of(self.read(row), picks, int(self.index.num_frames[row]))

    def load(self, row: int, epoch: int, content: np.ndarray | None) -> Clip:
        """Draw, then decode the kept frames into `content`, or without it keep their JPEGs."""
        draws, picks = self.draws(row, epoch)
        if content is None:
            return Clip(draws, self.read_jpegs(row, picks))
        self.read_into(content, row, picks)
        return Clip(draws, [])


class Content(Protocol):
    """What the batches of a loader hold of each clip."""

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        """Return the memory of `num` packed frames or features. Raises RankError."""

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        """Bring a clip into its part of that memory.

        Raises ValueError or OSError if the clip is broken.
        """

    def batch(self, packed: Batch, clips: Sequence[Clip]) -> Batch | EncodedBatch:
        """Return the batch of these clips, whose memory comes as `packed.frames_NHWC`."""


def content_of(reader: ClipReader, keep_jpegs: bool = False) -> Content:
    """Choose what batches hold. keep_jpegs: of video, for `device.on_device` to decode."""
    if reader.index.features:
        return CachedFeatures(reader)
    return StoredJpegs(reader) if keep_jpegs else DecodedFrames(reader)


@dataclass(frozen=True)
class DecodedFrames:
    """Frames of video, uint8, decoded by the threads of the loader."""

    reader: ClipReader

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        return buffers.take((num, *self.reader.index.frame_hw, 3))

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        return self.reader.load(row, epoch, part.numpy())

    def batch(self, packed: Batch, clips: Sequence[Clip]) -> Batch:
        return packed


@dataclass(frozen=True)
class StoredJpegs:
    """Frames of video as JPEGs: the batch's frames have a shape, but no memory."""

    reader: ClipReader

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        shape = (num, *self.reader.index.frame_hw, 3)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        return self.reader.load(row, epoch, None)

    def batch(self, packed: Batch, clips: Sequence[Clip]) -> EncodedBatch:
        return EncodedBatch(packed, [jpeg for clip in clips for jpeg in clip.jpegs])


@dataclass(frozen=True)
class CachedFeatures:
    """Features of a frozen encoder, float32 or float16; the batch has no frames."""

    reader: ClipReader

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        features = self.reader.index.features
        dtypes = {facts.dtype for facts in features}
        is_half = self.reader.feature_fps is None and dtypes == {"float16"}
        return buffers.take((num, features[0].width), "float16" if is_half else "float32")

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        draws, picks = self.reader.draws(row, epoch)
        self._read_into(part, row, epoch, len(picks))
        return Clip(draws, [])

    def _read_into(
        self, features_SD: torch.Tensor, row: int, epoch: int, num_kept: int
    ) -> None:
        """Copy the clip's features, at `feature_fps`. Raises ValueError if they are broken."""
        reader, index = self.reader, self.reader.index
        facts = index.features_of(row)
        member = reader.read(row, _memory_of_thread, epoch)
        stored_TD = from_npy(member, (num_kept, facts.width), facts.dtype)
        if reader.feature_fps is None:
            features_SD.numpy()[:] = stored_TD
            return
        rate = reader.sampling.rates(index.num_frames[row], index.arrays["fps"][row])
        stored_1TD = torch.from_numpy(stored_TD.astype(np.float32))[None]
        length_1 = torch.tensor([num_kept])
        resampled_1SD, _ = resample(stored_1TD, length_1, float(rate), reader.feature_fps)
        features_SD.numpy()[:] = resampled_1SD[0].numpy()

    def batch(self, packed: Batch, clips: Sequence[Clip]) -> Batch:
        no_frames_NHWC = torch.empty(0, *self.reader.index.frame_hw, 3, dtype=torch.uint8)
        return replace(packed, frames_NHWC=no_frames_NHWC, features_ND=packed.frames_NHWC)
