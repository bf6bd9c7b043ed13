"""The downsampling loader: from a plan to packed uint8 batches; only the frames that are kept are decoded.

Threads decode (simplejpeg releases the GIL) straight into the batch's memory, a few steps ahead. What a rank
gets depends on the plan alone, never on threads or time.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
import torch

from flallm_ds.contracts import Batch
from flallm_ds.data import sampling
from flallm_ds.data.clip_format import frame_spans
from flallm_ds.data.index import Index
from flallm_ds.data.plan import EpochPlan, slices_of_rank
from flallm_ds.data.text import TextCodec
from flallm_ds.errors import RankError

NUM_DRAWS = 9
STEPS_AHEAD = 2


@dataclass
class BrokenClips:
    """Clips that this rank could not decode, by name; past `budget` of them the run stops."""

    budget: int
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, shard: str, key: str, reason: str) -> None:
        if f"{shard}:{key}" not in self.reasons:
            print(f"warning: clip {key} in {shard} is broken ({reason}); another takes its place", flush=True)
        self.reasons[f"{shard}:{key}"] = reason
        if len(self.reasons) > self.budget:
            raise RankError(
                f"at most {self.budget} clips may be broken, but {len(self.reasons)} are; the last is {key} "
                f"in {shard}: {reason}. Run shards/verify.py on the shards, or raise --data.max_broken."
            )


@dataclass(frozen=True)
class ClipReader:
    """Reads clips of one split: their bytes by offset, then the kept frames alone.

    seed, train: with `train`, a random frame of each group is kept, drawn from (seed, epoch, sample).
    """

    index: Index
    keep_every: int
    max_frames: int
    seed: int
    train: bool

    def draws(self, row: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the clip's random numbers, float32 (9,); indices of its kept frames)."""
        rng = sampling.sample_rng(self.seed, epoch, row) if self.train else None
        draws = rng.random(NUM_DRAWS) if rng is not None else np.zeros(NUM_DRAWS)
        picks = sampling.keep_every(int(self.index.num_frames[row]), self.keep_every, rng)
        return draws.astype(np.float32), sampling.cap(picks, self.max_frames)

    def read_into(self, frames_THWC: np.ndarray, row: int, picks: np.ndarray) -> None:
        """Decode the picked frames into the canvases' top left corners. Raises ValueError if it cannot."""
        arrays = self.index.arrays
        size, offset = int(arrays["size"][row]), int(arrays["offset"][row])
        height, width = int(arrays["height"][row]), int(arrays["width"][row])
        path = self.index.shard_path(int(arrays["shard"][row]))
        with path.open("rb", buffering=0) as file:
            member = os.pread(file.fileno(), size, offset)
        if len(member) != size:
            raise ValueError(f"must hold {size} bytes at {offset}, but ends after {len(member)}")
        spans = frame_spans(member)
        if len(spans) != self.index.num_frames[row]:
            raise ValueError(f"must hold {self.index.num_frames[row]} frames, but holds {len(spans)}")
        view = memoryview(member)
        whole = frames_THWC.shape[1:3] == (height, width)
        for place, (begin, length) in zip(frames_THWC, spans[picks], strict=True):
            jpeg = view[begin : begin + length]
            frame = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=place if whole else None)
            if frame.shape[:2] != (height, width):
                raise ValueError(
                    f"frames must be {width}x{height}, but one is {frame.shape[1]}x{frame.shape[0]}"
                )
            if not whole:
                place[:] = 0
                place[:height, :width] = frame


@dataclass
class _Pending:
    """A micro-batch whose clips are being decoded."""

    rows: list[int]
    real: list[bool]
    draws: list[np.ndarray]
    picks: list[np.ndarray]
    frames: torch.Tensor
    jobs: list[Future[None]]


class Loader:
    """One pass over an epoch plan: `for micro_batches in loader.steps(start)` yields a rank's share of steps.

    Every rank yields the same number of steps with the same number of micro-batches. A broken clip is
    replaced by the next one of the index, the same on any rank, and counted in `broken`.
    """

    def __init__(
        self,
        reader: ClipReader,
        plan: EpochPlan,
        codec: TextCodec,
        *,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        broken: BrokenClips | None = None,
    ) -> None:
        self.reader, self.plan, self.codec, self.epoch = reader, plan, codec, epoch
        self.slices = slices_of_rank(plan.slices, rank, world_size)
        self.threads = threads
        self.broken = broken if broken is not None else BrokenClips(budget=0)
        self._texts, self._keys = reader.index.strings("text"), reader.index.strings("key")

    def __len__(self) -> int:
        return self.plan.num_steps

    def steps(self, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of step `start` and all after it, decoded a few steps ahead."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        ahead: deque[list[_Pending]] = deque()
        try:
            for step in range(start, self.plan.num_steps):
                ahead.append([self._submit(pool, rows) for rows in self._rows(step)])
                if len(ahead) > STEPS_AHEAD:
                    yield [self._finish(pending) for pending in ahead.popleft()]
            while ahead:
                yield [self._finish(pending) for pending in ahead.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, step: int) -> Iterator[tuple[list[int], list[bool]]]:
        slices = self.plan.slices_of(step)
        for s in self.slices:
            if len(slices[s]):
                yield slices[s].tolist(), [True] * len(slices[s])
            else:  # fewer clips than slices: a dummy keeps this rank in step
                yield [int(slices[0][0])], [False]

    def _submit(self, pool: ThreadPoolExecutor, rows_real: tuple[list[int], list[bool]]) -> _Pending:
        rows, real = rows_real
        draws, picks = zip(*(self.reader.draws(row, self.epoch) for row in rows), strict=True)
        ends = np.cumsum([len(p) for p in picks])
        shape = (int(ends[-1]), *self.reader.index.frame_hw, 3)
        frames = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        array = frames.numpy()
        jobs = [
            pool.submit(self.reader.read_into, array[end - len(p) : end], row, p)
            for row, p, end in zip(rows, picks, ends, strict=True)
        ]
        return _Pending(rows, real, list(draws), list(picks), frames, jobs)

    def _finish(self, pending: _Pending) -> Batch:
        errors = [job.exception() for job in pending.jobs]
        for position, error in enumerate(errors):
            if error is not None:
                if not isinstance(error, (ValueError, OSError)):
                    raise error
                self._replace(pending, position, str(error))
        arrays = self.reader.index.arrays
        texts = [self._texts[row] for row in pending.rows]
        sizes = np.stack([arrays["height"][pending.rows], arrays["width"][pending.rows]], axis=1)
        return Batch(
            frames_NHWC=pending.frames,
            num_frames_B=torch.tensor([len(p) for p in pending.picks]),
            size_B2=torch.from_numpy(sizes.astype(np.float32)),
            draws_B9=torch.from_numpy(np.stack(pending.draws)),
            target_ids_BL=_pad([self.codec.encode(t) for t in texts], pending.real),
            keys=tuple(self._keys[row] for row in pending.rows),
            texts=tuple(texts),
            real_B=tuple(pending.real),
        )

    def _replace(self, pending: _Pending, position: int, reason: str) -> None:
        """Put the next clip of the index that decodes in the broken one's place."""
        first = row = pending.rows[position]
        while True:
            shard = self.reader.index.shards[int(self.reader.index.arrays["shard"][row])].file
            self.broken.add(shard, self._keys[row], reason)
            if (row + 1) % len(self.reader.index) == first:
                raise RankError(
                    f"a clip of {self.reader.index.root} must decode, but none of them does: {reason}."
                )
            row = (row + 1) % len(self.reader.index)
            draws, picks = self.reader.draws(row, self.epoch)
            frames = np.empty((len(picks), *pending.frames.shape[1:]), dtype=np.uint8)
            try:
                self.reader.read_into(frames, row, picks)
                break
            except (ValueError, OSError) as error:
                reason = str(error)
        parts = list(torch.split(pending.frames, [len(p) for p in pending.picks]))
        parts[position] = torch.from_numpy(frames)
        pending.frames = torch.cat(parts)
        pending.rows[position], pending.draws[position], pending.picks[position] = row, draws, picks


def _pad(ids: Sequence[Sequence[int]], real: Sequence[bool]) -> torch.Tensor:
    """Ids padded with -100; a dummy's row is -100 throughout, so that it weighs nothing."""
    padded = torch.full((len(ids), max(map(len, ids))), -100)
    for row, sentence, counts in zip(padded, ids, real, strict=True):
        if counts:
            row[: len(sentence)] = torch.tensor(sentence)
    return padded
