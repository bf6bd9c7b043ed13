"""The downsampling loader: from a plan to packed batches. Frames that are not kept are
not decoded.

Threads bring the clips straight into the batch's memory, a few steps ahead. What a rank
gets depends on the plan alone, never on threads or time.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flallm_ds.batch import Batch, EncodedBatch
from flallm_ds.data import mixture
from flallm_ds.data.index import Index
from flallm_ds.data.plan import EpochPlan, slices_of_rank
from flallm_ds.data.readers import Clip, ClipReader, FrameBuffers, content_of
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import RankError, UserError

STEPS_AHEAD = 2
# two windows of the plan; remote shards are fetched before they are needed
SHARDS_AHEAD = 32
IGNORED = -100  # a target that the loss leaves out


@dataclass
class BrokenClips:
    """Clips that this rank could not decode, by name; past `budget` of them the run stops.

    A clip of cached features counts once, however many views of it are broken.
    """

    budget: int
    reasons: dict[str, str] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)

    def add(self, shard: str, key: str, reason: str) -> None:
        """Count a clip and warn of it. Raises RankError past the budget."""
        if key in self.keys:
            return
        if self.budget == 0:
            raise RankError(
                f"every clip must decode here, but {key} in {shard} does not ({reason}). "
                "Run shards/verify.py on the shards; its --repair drops or rebuilds what "
                "is broken."
            )
        warning = (
            f"warning: clip {key} in {shard} is broken ({reason}); another takes its place"
        )
        print(warning, flush=True)
        self.keys.add(key)
        self.reasons[f"{shard}:{key}"] = reason
        if len(self.reasons) > self.budget:
            raise RankError(
                f"at most {self.budget} clips may be broken, but {len(self.reasons)} are; "
                f"the last is {key} in {shard}: {reason}. Run shards/verify.py on the "
                "shards, or raise --data.max_broken."
            )


@dataclass
class _Pending:
    """A micro-batch whose clips are being read."""

    rows: list[int]
    epochs: list[int]  # how often each clip came before
    real: bool
    num_kept: list[int]
    memory: torch.Tensor  # of all clips, packed
    jobs: list[Future[Clip]]

    def replace(
        self,
        position: int,
        row: int,
        num_kept: int,
        part: torch.Tensor,
        clip: Clip,
    ) -> None:
        """Put a clip that was read into `part` in the place of another."""
        parts = list(torch.split(self.memory, self.num_kept))
        parts[position] = part
        self.memory = torch.cat(parts)
        self.rows[position], self.num_kept[position] = row, num_kept
        self.jobs[position] = Future()
        self.jobs[position].set_result(clip)


class Loader:
    """One pass over an epoch plan.

    `for micro_batches in loader.steps(start)` yields a rank's share of each step; `for
    batch in loader` yields the same micro-batches one by one. Every rank yields the same
    number of steps with the same number of micro-batches. A broken clip is replaced by
    the next one of the index, the same on any rank, and counted in `broken`. The threads
    live only while one iterates: a loader can be pickled, and used after a fork. codec:
    without one, `target_ids_BL` has no columns. encoded: frames of video stay JPEGs, for
    `device.on_device` to decode; these batches are `EncodedBatch`es.
    """

    def __init__(
        self,
        reader: ClipReader,
        plan: EpochPlan,
        codec: TextCodec | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        broken: BrokenClips | None = None,
        encoded: bool = False,
    ) -> None:
        self.reader, self.plan, self.codec = reader, plan, codec
        self.content = content_of(reader, keep_jpegs=encoded)
        self.slices = slices_of_rank(plan.slices, rank, world_size)
        self.threads = threads
        self.broken = broken if broken is not None else BrokenClips(budget=0)

    def __len__(self) -> int:
        return self.plan.num_steps

    def __iter__(self) -> Iterator[Any]:
        for micro_batches in self.steps():
            yield from micro_batches

    def steps(self, start: int = 0) -> Iterator[list[Any]]:
        """Yield the micro-batches of step `start` and all after it, read a few steps ahead."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        buffers = FrameBuffers()
        shards = _ShardsAhead(self.reader.index, self.plan)
        ahead: deque[list[_Pending]] = deque()
        try:
            for step in range(start, self.plan.num_steps):
                shards.read_ahead(step)
                ahead.append(
                    [self._submit(pool, buffers, *one) for one in self._places(step)]
                )
                if len(ahead) > STEPS_AHEAD:
                    yield [self._finish(pending) for pending in ahead.popleft()]
            while ahead:
                yield [self._finish(pending) for pending in ahead.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _places(self, step: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the places of each micro-batch of this rank, and whether they count."""
        places_of_slice = self.plan.places_of(step)
        for number in self.slices:
            places = places_of_slice[number]
            if len(places):
                yield places, True
            else:  # fewer clips than slices: a dummy keeps this rank in step
                yield places_of_slice[0][:1], False

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        buffers: FrameBuffers,
        places: np.ndarray,
        real: bool,
    ) -> _Pending:
        """Have threads read the clips of a micro-batch, each into its part of the memory."""
        rows = self.plan.order[places].tolist()
        epochs = self.plan.passes[places].tolist()
        num_kept = self.plan.num_kept[rows].tolist()
        memory = self.content.memory(sum(num_kept), buffers)
        jobs = []
        for row, epoch, part in zip(
            rows, epochs, torch.split(memory, num_kept), strict=True
        ):
            jobs.append(pool.submit(self.content.load, row, epoch, part))
        return _Pending(rows, epochs, real, num_kept, memory, jobs)

    def _finish(self, pending: _Pending) -> Batch | EncodedBatch:
        """Wait for the clips of a micro-batch, replace broken ones, and add what the
        index says."""
        wait(pending.jobs)  # for all, before any is replaced: they share memory
        for position, job in enumerate(list(pending.jobs)):
            error = job.exception()
            if isinstance(error, UserError):
                # A store that gave up: the other ranks may not have met it.
                raise RankError(str(error)) from error
            if isinstance(error, ValueError | OSError):
                self._replace(pending, position, str(error))
            elif error is not None:
                raise error
        clips = [job.result() for job in pending.jobs]
        return self.content.batch(self._pack(pending, clips), clips)

    def _pack(self, pending: _Pending, clips: Sequence[Clip]) -> Batch:
        """Return the batch, with all of its memory as frames."""
        index, rows = self.reader.index, pending.rows
        sizes_2B = [index.arrays["height"][rows], index.arrays["width"][rows]]
        texts = self._strings("text", rows)
        return Batch(
            frames_NHWC=pending.memory,
            num_frames_B=torch.from_numpy(np.array(pending.num_kept, np.int64)),
            size_B2=torch.from_numpy(np.array(sizes_2B, np.float32).T),
            draws_B9=torch.from_numpy(np.array([clip.draws for clip in clips])),
            target_ids_BL=_padded([self._target_ids(text, pending.real) for text in texts]),
            keys=self._strings("key", rows),
            texts=texts,
            corpora=tuple(index.corpus_of(row) for row in rows),
            languages=self._strings("language", rows),
            real_B=(pending.real,) * len(rows),
        )

    def _target_ids(self, text: str, real: bool) -> list[int]:
        if self.codec is None:
            return []
        # A dummy has one place, which counts for nothing: the loss is not defined for
        # none.
        return self.codec.encode(text) if real else [IGNORED]

    def _strings(self, name: str, rows: list[int]) -> tuple[str, ...]:
        column = self.reader.index.strings(name)
        return tuple(column[row] for row in rows)

    def _replace(self, pending: _Pending, position: int, reason: str) -> None:
        """Put the next clip of the index that decodes in the broken one's place.

        Raises RankError if no clip does.
        """
        index = self.reader.index
        first = row = pending.rows[position]
        epoch = pending.epochs[position]
        while True:
            self.broken.add(index.tar(row, epoch).file, index.strings("key")[row], reason)
            row = (row + 1) % len(index)
            if row == first:
                raise RankError(
                    f"a clip of {index.root} must decode, but none of them does: {reason}.",
                )
            num_kept = int(self.plan.num_kept[row])
            part = pending.memory.new_empty(num_kept, *pending.memory.shape[1:])
            try:
                clip = self.content.load(row, epoch, part)
            except (ValueError, OSError) as error:
                reason = str(error)
                continue
            pending.replace(position, row, num_kept, part, clip)
            return


class _ShardsAhead:
    """Tells the store which shards come next, in the order of their first use."""

    def __init__(self, index: Index, plan: EpochPlan) -> None:
        self._index = index

        # The tars of the epoch, in the order of the first place that each is used at.
        tars, first_places = np.unique(
            index.tars(plan.order, plan.passes), return_index=True
        )
        by_first_use = np.argsort(first_places)
        self._tars = tars[by_first_use].tolist()

        # The step of that place.
        self._first_step = np.searchsorted(
            plan.ends, first_places[by_first_use], side="right"
        )
        self._begin = -1

    def read_ahead(self, step: int) -> None:
        """Ask for the tars that this step and those after it use first."""
        begin = int(np.searchsorted(self._first_step, step))
        if begin != self._begin:
            self._begin = begin
            coming = self._tars[begin : begin + SHARDS_AHEAD]
            self._index.store.want([self._index.shards[tar] for tar in coming])


def _padded(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return ids padded with -100, int64 (B, L)."""
    longest = max(map(len, ids))
    rows = [[*row, *[IGNORED] * (longest - len(row))] for row in ids]
    return torch.from_numpy(np.array(rows, np.int64))


def open_loader(
    shards: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    batch_clips: int = 8,
    sampling: FrameSampling | None = None,
    train: bool = True,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 2,
    weights: Sequence[float] = (),
    codec: TextCodec | None = None,
) -> Loader:
    """Open a loader for a loop of your own: `for batch in open_loader("data/mine"): ...`.

    shards: one shard folder (or address) or several. train: shuffled in each epoch, with
    random frame picks; otherwise longest first, each clip once. batch_clips: of one batch
    of this rank. sampling: without one, every frame of a video, and of features those
    that they were made of.
    """
    index = mixture.open_indexes(shards, split)
    if sampling is None:
        sampling = index.features[0].sampling if index.features else FrameSampling()
    reader = ClipReader(index, sampling, seed, train)
    plan = reader.plan(batch_clips * world_size, world_size, weights=weights)
    order = plan.epoch(epoch) if train else plan.in_length_order()
    # 1 %: data.max_broken
    broken = BrokenClips(budget=-(-len(index) // 100)) if train else None
    return Loader(
        reader,
        order,
        codec,
        rank=rank,
        world_size=world_size,
        threads=threads,
        broken=broken,
    )
