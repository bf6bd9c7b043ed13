"""Read the content of one clip into a batch: what the data-loading threads do.

`ClipReader` reads the bytes of a clip by offset and draws its random numbers. Its three
subclasses decide what a batch holds of a clip: `VideoReader` decoded frames, `JpegReader`
the stored JPEGs, `FeatureReader` cached features.
"""

import math
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flallm_ds.batch import Batch, FeatureBatch, JpegBatch, VideoBatch
from flallm_ds.data.codecs.decode import decode_frames, jpegs_of
from flallm_ds.data.index import FeatureIndex, Index
from flallm_ds.data.plan import Plan
from flallm_ds.data.sampling import FrameSampling, sample_rng
from flallm_ds.errors import RankError, UserError
from flallm_ds.features.facts import from_npy
from flallm_ds.features.sequences import resample, resampled_lengths

NUM_DRAWS = 9  # random numbers of a clip: crop and augmentation
# references to an unused buffer: that of the list, and the argument of getrefcount
_UNHELD = 2


class FrameBuffers:
    """Reusable memory for frames or features: fresh memory costs a page fault per 4 kB.

    A tensor of `take` may be kept for any time: each view of it holds a reference to its
    buffer. The memory is pinned on a machine with a GPU, so that copies to the GPU run in
    parallel to the other work. Not thread-safe.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._buffers)

    def take(self, shape: tuple[int, ...], dtype: str = "uint8") -> torch.Tensor:
        """Return a tensor of this shape with undefined content.

        Raises RankError if there is not enough memory.
        """
        # A view of a larger buffer: batches differ in size, buffers are reused.
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            buffer = self._buffer_of(num_bytes)
        except (MemoryError, RuntimeError) as error:
            # The canvas of a batch is as large as the largest frame of all clips.
            raise RankError(
                f"Cannot allocate a micro-batch of shape {shape}: it takes "
                f"{num_bytes / 1e9:,.0f} GB. Lower --data.batch_clips or "
                "--data.max_frames, or build shards of smaller frames (--short_side)."
            ) from error
        return torch.from_numpy(buffer[:num_bytes].view(dtype).reshape(shape))

    def _buffer_of(self, num_bytes: int) -> np.ndarray:
        """Return an unused buffer of at least this size, uint8."""
        buffers = self._buffers

        # Take the smallest unused buffer that is large enough.
        largest = len(buffers)  # the largest unused buffer; none: behind the last
        smallest = None  # that fits
        for n in range(len(buffers)):
            if sys.getrefcount(buffers[n]) != _UNHELD:
                continue
            size = len(buffers[n])
            if largest == len(buffers) or size > len(buffers[largest]):
                largest = n
            if size >= num_bytes and (smallest is None or size < len(buffers[smallest])):
                smallest = n
        if smallest is not None:
            return buffers[smallest]

        # Replace the largest unused buffer by a larger one.
        chosen = largest
        buffers[chosen : chosen + 1] = []
        # A quarter larger than needed, so that the next batch fits, too.
        pinned = torch.cuda.is_available()
        memory = torch.empty(
            num_bytes + num_bytes // 4, dtype=torch.uint8, pin_memory=pinned
        )
        buffers.insert(chosen, memory.numpy())
        return buffers[chosen]


_of_thread = threading.local()


def _memory_of_thread(size: int) -> bytearray:
    """Return the buffer of this thread: fresh memory costs as much as reading into it."""
    # It may be overwritten at the next clip: the content is decoded or copied by then.
    memory: bytearray = getattr(_of_thread, "memory", bytearray())
    if len(memory) < size:
        memory = _of_thread.memory = bytearray(size + size // 4)
    return memory


@dataclass(frozen=True)
class Clip:
    """What a thread returns for a clip, besides the content it wrote into the batch."""

    draws: np.ndarray  # float32 (9,)
    jpegs: Sequence[memoryview] = ()  # of a `JpegReader`


@dataclass(frozen=True)
class ClipReader(ABC):
    """Reads the clips of one split by their offsets in the tars.

    seed: of the random numbers, which are drawn from (seed, epoch, sample). train: keep a
    random frame of each group and draw an augmentation; else both are fixed.
    """

    index: Index
    sampling: FrameSampling
    seed: int
    train: bool

    @abstractmethod
    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        """Return memory for `num` packed frames or features. Raises RankError."""

    @abstractmethod
    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        """Read a clip into its part of that memory.

        Raises ValueError or OSError if the clip is damaged.
        """

    @abstractmethod
    def batch(
        self,
        memory: torch.Tensor,
        rows: Sequence[int],
        clips: Sequence[Clip],
        fields: dict[str, Any],
    ) -> Batch:
        """Return the batch of these clips. fields: those that every `Batch` has."""

    def num_places(self) -> np.ndarray:
        """Return the number of frames or features that a batch holds of each clip, int64
        (clips,)."""
        return self.sampling.num_kept(self.index.num_frames, self.index.arrays["fps"])

    def plan(
        self,
        batch_clips: int,
        num_micro_batches: int,
        *,
        batch_frames: int = 0,
        weights: Sequence[float] = (),
    ) -> Plan:
        """Return the plan of the order of these clips.

        The arguments are fields of `Plan`. Raises UserError as `num_places` does.
        """
        arrays = self.index.arrays
        return Plan(
            fingerprint=self.index.fingerprint,
            num_kept=self.num_places(),
            shard=arrays["shard"],
            seed=self.seed,
            batch_clips=batch_clips,
            num_micro_batches=num_micro_batches,
            batch_frames=batch_frames,
            corpus=arrays.get("corpus"),
            weights=tuple(weights),
            features=self.index.features_digest,
        )

    def draws(self, row: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the random numbers of a clip, float32 (9,), and the indices of its kept
        frames."""
        # In training from (seed, epoch, clip) alone: independent of ranks and threads.
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
        """Read the bytes of a clip into the buffer that `memory(size)` returns.

        epoch: of cached features, each epoch reads the next view. Raises OSError or
        ValueError if any byte is missing.
        """
        size = int(self.index.arrays["size"][row])
        offset = int(self.index.arrays["offset"][row])
        with self.index.store.open(self.index.tar(row, epoch)) as file:
            # Check the size before memory is allocated: the index may be wrong.
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


@dataclass(frozen=True)
class VideoReader(ClipReader):
    """Decodes the kept frames of a video, uint8, in the data-loading threads."""

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        return buffers.take((num, *self.index.frame_hw, 3))

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        draws, picks = self.draws(row, epoch)
        self.read_into(part.numpy(), row, picks)
        return Clip(draws)

    def read_into(self, frames_THWC: np.ndarray, row: int, picks: np.ndarray) -> None:
        """Decode the picked frames into the top left corners of the canvases.

        Raises ValueError or OSError if the clip is damaged.
        """
        arrays = self.index.arrays
        hw = int(arrays["height"][row]), int(arrays["width"][row])
        member = self.read(row, _memory_of_thread)
        decode_frames(member, picks, int(arrays["num_frames"][row]), frames_THWC, hw)

    def batch(
        self,
        memory: torch.Tensor,
        rows: Sequence[int],
        clips: Sequence[Clip],
        fields: dict[str, Any],
    ) -> VideoBatch:
        return VideoBatch(frames_NHWC=memory, size_B2=self.size_B2(rows), **fields)

    def size_B2(self, rows: Sequence[int]) -> torch.Tensor:
        """Return height and width of the frames of each clip, float32, pixels."""
        arrays = self.index.arrays
        sizes_2B = [arrays["height"][rows], arrays["width"][rows]]
        return torch.from_numpy(np.array(sizes_2B, np.float32).T)


@dataclass(frozen=True)
class JpegReader(VideoReader):
    """Reads the kept frames as stored JPEGs, for `device.on_device` to decode on a GPU."""

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        # Only the shape: the device allocates the memory of decoded frames.
        shape = (num, *self.index.frame_hw, 3)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        draws, picks = self.draws(row, epoch)
        return Clip(draws, jpegs_of(self.read(row), picks, int(self.index.num_frames[row])))

    def batch(
        self,
        memory: torch.Tensor,
        rows: Sequence[int],
        clips: Sequence[Clip],
        fields: dict[str, Any],
    ) -> JpegBatch:
        jpegs: list[memoryview] = []
        for clip in clips:
            jpegs += clip.jpegs
        size_B2 = self.size_B2(rows)
        return JpegBatch(frames_NHWC=memory, size_B2=size_B2, jpegs=jpegs, **fields)


@dataclass(frozen=True)
class FeatureReader(ClipReader):
    """Reads cached features of the frozen visual encoder, float32 or float16.

    feature_fps: resample the features to this rate; None keeps the stored rate.
    """

    index: FeatureIndex
    feature_fps: float | None = None

    def num_places(self) -> np.ndarray:
        """Return the number of features that a batch holds of each clip, int64 (clips,).

        Raises UserError if features cannot be resampled to `feature_fps`.
        """
        kept = super().num_places()
        if self.feature_fps is None:
            return kept
        rates = self.sampling.rates(self.index.num_frames, self.index.arrays["fps"])
        try:
            return resampled_lengths(kept, rates, self.feature_fps)
        except ValueError as error:
            raise UserError(
                f"Cannot resample the features of {self.index.root} to data.feature_fps="
                f"{self.feature_fps}: {error}."
            ) from error

    def memory(self, num: int, buffers: FrameBuffers) -> torch.Tensor:
        # Half precision only if no folder is float32 and no resampling takes place.
        features = self.index.features
        dtypes = {facts.dtype for facts in features}
        is_half = self.feature_fps is None and dtypes == {"float16"}
        return buffers.take((num, features[0].width), "float16" if is_half else "float32")

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        draws, picks = self.draws(row, epoch)
        self._read_into(part, row, epoch, len(picks))
        return Clip(draws)

    def _read_into(
        self, features_SD: torch.Tensor, row: int, epoch: int, num_kept: int
    ) -> None:
        """Copy the features of a clip, at `feature_fps`. Raises ValueError if they are
        damaged."""
        index = self.index
        facts = index.features_of(row)
        member = self.read(row, _memory_of_thread, epoch)
        stored_TD = from_npy(member, (num_kept, facts.width), facts.dtype)
        if self.feature_fps is None:
            features_SD.numpy()[:] = stored_TD
            return
        # Resample in float32, from the rate of the kept frames of this clip.
        rate = self.sampling.rates(index.num_frames[row], index.arrays["fps"][row])
        stored_1TD = torch.from_numpy(stored_TD.astype(np.float32))[None]
        length_1 = torch.tensor([num_kept])
        resampled_1SD, _ = resample(stored_1TD, length_1, float(rate), self.feature_fps)
        features_SD.numpy()[:] = resampled_1SD[0].numpy()

    def batch(
        self,
        memory: torch.Tensor,
        rows: Sequence[int],
        clips: Sequence[Clip],
        fields: dict[str, Any],
    ) -> FeatureBatch:
        return FeatureBatch(features_ND=memory, **fields)


def open_reader(
    index: Index,
    sampling: FrameSampling,
    seed: int,
    train: bool,
    *,
    feature_fps: float | None = None,
    keep_jpegs: bool = False,
) -> ClipReader:
    """Return the reader for the clips of an index.

    feature_fps: of cached features only. keep_jpegs: of video only; frames stay JPEGs, for
    `device.on_device` to decode.
    """
    if isinstance(index, FeatureIndex):
        return FeatureReader(index, sampling, seed, train, feature_fps)
    if keep_jpegs:
        return JpegReader(index, sampling, seed, train)
    return VideoReader(index, sampling, seed, train)
