"""The downsampling loader: reads the clips of a plan into packed batches.

Only kept frames are decoded. Threads decode the clips directly into the memory of a
batch, a few steps ahead. The batches depend on the plan alone, not on threads or timing.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flallm_ds.batch import Batch
from flallm_ds.data import mixture
from flallm_ds.data.index import FeatureIndex, Index
from flallm_ds.data.plan import EpochPlan, micro_batches_of_rank, micro_batches_per_rank
from flallm_ds.data.readers import Clip, ClipReader, FrameBuffers, open_reader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import RankError, UserError

STEPS_AHEAD = 2
# Shards to fetch ahead of their use, if they are remote: two windows of the plan.
SHARDS_AHEAD = 32
IGNORED = -100  # a target without a loss


@dataclass
class BrokenClips:
    """The broken clips that this rank knows of; more than `budget` of them stop the run.

    reasons: by key, the shard and what is wrong. A clip counts once, even if several views
    of its cached features are broken, or several ranks have read it.
    """

    budget: int
    reasons: dict[str, str] = field(default_factory=dict)
    _num_shared: int = 0  # how many of them all ranks know of

    def add(self, shard: str, key: str, reason: str) -> None:
        """Count a clip and print a warning. Raises RankError above the budget."""
        if key in self.reasons:
            return
        if self.budget == 0:
            raise RankError(
                f"Cannot decode clip {key} in {shard}: {reason}. Run shards/verify.py on "
                "the shards; its --repair drops or rebuilds broken clips."
            )
        print(
            f"warning: clip {key} in {shard} is broken ({reason}); another clip replaces it",
            flush=True,
        )
        self.reasons[key] = f"{shard}: {reason}"
        self.check()

    def check(self) -> None:
        """Raise RankError above the budget."""
        if len(self.reasons) > self.budget:
            key, reason = list(self.reasons.items())[-1]
            raise RankError(
                f"The number of broken clips must be at most {self.budget}, got "
                f"{len(self.reasons)}; the last is {key} in {reason}. Run "
                "shards/verify.py on the shards, or raise --data.max_broken."
            )

    @property
    def num_new(self) -> int:
        """The number of clips that the other ranks may not know of."""
        return len(self.reasons) - self._num_shared

    def share(self, of_ranks: Iterable[Mapping[str, str]]) -> None:
        """Count the broken clips of all ranks as well."""
        # In the order of ranks, so that all ranks name the same clip as the last one.
        together: dict[str, str] = {}
        for reasons in of_ranks:
            together |= reasons
        self.reasons, self._num_shared = together, len(together)


@dataclass
class _Pending:
    """A micro-batch while its clips are read."""

    rows: list[int]
    epochs: list[int]  # how often each clip came before
    real: bool  # False: a dummy
    num_kept: list[int]
    memory: torch.Tensor  # the packed content of all clips
    jobs: list[Future[Clip]]

    def replace(
        self,
        position: int,
        row: int,
        num_kept: int,
        part: torch.Tensor,
        clip: Clip,
    ) -> None:
        """Replace a clip by another that was read into `part`."""
        # The new clip may have another length, so the memory is packed again.
        parts = list(torch.split(self.memory, self.num_kept))
        parts[position] = part
        self.memory = torch.cat(parts)
        self.rows[position], self.num_kept[position] = row, num_kept
        self.jobs[position] = Future()
        self.jobs[position].set_result(clip)


class Loader:
    """One pass over an epoch plan.

    `for micro_batches in loader.steps(start)` yields the micro-batches of this rank, step
    by step; `for batch in loader` yields the same micro-batches one by one. Every rank
    yields the same number of steps with the same number of micro-batches. A broken clip
    is replaced by the next clip of the index that decodes, the same on any rank, and
    counted in `broken`. Threads exist only during iteration, so a loader can be pickled,
    and used after a fork.

    codec: encodes the texts; without one, `target_ids_BL` has no columns.
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
    ) -> None:
        self.reader, self.plan, self.codec = reader, plan, codec
        num = plan.num_micro_batches
        self.micro_batches = micro_batches_of_rank(num, rank, world_size)
        self.num_per_step = micro_batches_per_rank(num, world_size)
        self.threads = threads
        self.broken = broken if broken is not None else BrokenClips(budget=0)

    def __len__(self) -> int:
        return self.plan.num_steps

    def __iter__(self) -> Iterator[Any]:
        for micro_batches in self.steps():
            yield from micro_batches

    def steps(self, start: int = 0) -> Iterator[list[Any]]:
        """Yield the micro-batches of step `start` and of all later steps."""
        # Threads, not processes: decoders release the GIL, and frames need no copy.
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        buffers = FrameBuffers()
        shards = _ShardsAhead(self.reader.index, self.plan)
        ahead: deque[list[_Pending]] = deque()
        try:
            for step in range(start, self.plan.num_steps):
                shards.read_ahead(step)
                # Start to read this step before an earlier one is finished.
                submitted = []
                for places, real in self._places(step):
                    submitted.append(self._submit(pool, buffers, places, real))
                ahead.append(submitted)
                del submitted  # `ahead` alone must refer to the frames
                if len(ahead) > STEPS_AHEAD:
                    yield list(map(self._finish, ahead.popleft()))
            while ahead:
                yield list(map(self._finish, ahead.popleft()))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _places(self, step: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield the places of each micro-batch of this rank, and whether it is real."""
        places_of = self.plan.places_of(step)
        for number in self.micro_batches:
            if len(places_of[number]):
                yield places_of[number], True
            else:  # fewer clips than micro-batches
                yield self._dummy(places_of), False
        # A rank with fewer micro-batches than others.
        for _ in range(self.num_per_step - len(self.micro_batches)):
            yield self._dummy(places_of), False

    def _dummy(self, places_of: list[np.ndarray]) -> np.ndarray:
        """Return the place of one clip, to keep this rank in step with the others."""
        return places_of[0][:1]

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        buffers: FrameBuffers,
        places: np.ndarray,
        real: bool,
    ) -> _Pending:
        """Start to read the clips of a micro-batch, each into its part of the memory."""
        # Lengths are known before any byte is read, so the memory is allocated once.
        rows = self.plan.order[places].tolist()
        epochs = self.plan.passes[places].tolist()
        num_kept = self.plan.num_kept[rows].tolist()
        memory = self.reader.memory(sum(num_kept), buffers)
        parts = torch.split(memory, num_kept)
        jobs = []
        for row, epoch, part in zip(rows, epochs, parts, strict=True):
            jobs.append(pool.submit(self.reader.load, row, epoch, part))
        return _Pending(rows, epochs, real, num_kept, memory, jobs)

    def _finish(self, pending: _Pending) -> Batch:
        """Wait for the clips of a micro-batch, replace broken clips, and pack the batch."""
        wait(pending.jobs)  # for all before any is replaced: they share memory
        for position, job in enumerate(list(pending.jobs)):
            error = job.exception()
            if isinstance(error, UserError):
                # A failing store: perhaps on this rank alone.
                raise RankError(str(error)) from error
            if isinstance(error, ValueError | OSError):
                self._replace(pending, position, str(error).rstrip("."))
            elif error is not None:
                raise error
        return self._pack(pending)

    def _pack(self, pending: _Pending) -> Batch:
        """Return the batch of the clips that were read, with their columns of the index."""
        index, rows = self.reader.index, pending.rows
        clips = [job.result() for job in pending.jobs]
        texts = self._strings("text", rows)
        target_ids = [self._target_ids(text, pending.real) for text in texts]
        fields = {
            "num_frames_B": torch.from_numpy(np.array(pending.num_kept, np.int64)),
            "draws_B9": torch.from_numpy(np.array([clip.draws for clip in clips])),
            "target_ids_BL": _padded(target_ids),
            "keys": self._strings("key", rows),
            "texts": texts,
            "corpora": tuple(map(index.corpus_of, rows)),
            "languages": self._strings("language", rows),
            "real_B": (pending.real,) * len(rows),
        }
        return self.reader.batch(pending.memory, rows, clips, fields)

    def _target_ids(self, text: str, real: bool) -> list[int]:
        if self.codec is None:
            return []
        # A dummy has one target, without a loss: the loss of no targets is undefined.
        return self.codec.encode(text) if real else [IGNORED]

    def _strings(self, name: str, rows: list[int]) -> tuple[str, ...]:
        column = self.reader.index.strings(name)
        return tuple(column[row] for row in rows)

    def _replace(self, pending: _Pending, position: int, reason: str) -> None:
        """Replace a broken clip by the next clip of the index that decodes.

        Raises RankError if no clip decodes.
        """
        # Search the index in order, not at random: every rank finds the same clip.
        index = self.reader.index
        first = row = pending.rows[position]
        epoch = pending.epochs[position]
        while True:
            self.broken.add(index.tar(row, epoch).file, index.strings("key")[row], reason)
            row = (row + 1) % len(index)
            if row == first:
                raise RankError(f"Cannot decode any clip of {index.root}: {reason}.")
            num_kept = int(self.plan.num_kept[row])
            part = pending.memory.new_empty(num_kept, *pending.memory.shape[1:])
            try:
                clip = self.reader.load(row, epoch, part)
            except (ValueError, OSError) as error:
                reason = str(error).rstrip(".")
                continue
            pending.replace(position, row, num_kept, part, clip)
            return


class _ShardsAhead:
    """Tells the store which shards to fetch next, in the order of their first use."""

    def __init__(self, index: Index, plan: EpochPlan) -> None:
        self._index = index

        # Sort the tars of the epoch by the first place that uses each.
        tars, first_places = np.unique(
            index.tars(plan.order, plan.passes), return_index=True
        )
        by_first_use = np.argsort(first_places)
        self._tars = tars[by_first_use].tolist()

        # Find the step of that place.
        self._first_step = np.searchsorted(
            plan.ends, first_places[by_first_use], side="right"
        )
        self._begin = -1

    def read_ahead(self, step: int) -> None:
        """Request the tars that this step and later steps use first."""
        # Most steps use no new tar: then there is nothing to request.
        begin = int(np.searchsorted(self._first_step, step))
        if begin != self._begin:
            self._begin = begin
            coming = self._tars[begin : begin + SHARDS_AHEAD]
            self._index.store.want([self._index.shards[tar] for tar in coming])


def _padded(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the ids as an int64 tensor (B, L), padded with -100."""
    longest = max(map(len, ids))
    padded_BL = np.full((len(ids), longest), IGNORED, np.int64)
    for row, of_clip in enumerate(ids):
        padded_BL[row, : len(of_clip)] = of_clip
    return torch.from_numpy(padded_BL)


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
    """Open a loader for your own loop: `for batch in open_loader("data/mine"): ...`.

    shards: one shard folder (or address) or several. train: shuffle in each epoch and
    keep random frames; else longest clip first, each clip once. batch_clips: clips of a
    batch of this rank. sampling: default every frame of a video, or the frames of cached
    features.
    """
    index = mixture.open_indexes(shards, split)
    if sampling is None:
        sampling = FrameSampling()
        if isinstance(index, FeatureIndex):
            sampling = index.features[0].sampling
    reader = open_reader(index, sampling, seed, train)
    plan = reader.plan(batch_clips * world_size, world_size, weights=weights)
    order = plan.epoch(epoch) if train else plan.in_length_order()
    # 1 % as the default of data.max_broken
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
