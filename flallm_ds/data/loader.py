"""The downsampling loader: from a plan to packed uint8 batches; only the frames that are kept are decoded.

Of a folder of features it packs these instead, and nothing is decoded.

Threads decode (simplejpeg releases the GIL) straight into the batch's memory, a few steps ahead. What a rank
gets depends on the plan alone, never on threads or time.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flallm_ds.batch import Batch, EncodedBatch
from flallm_ds.data import mixture
from flallm_ds.data.buffers import FrameBuffers
from flallm_ds.data.codecs.decode import decode_frames, jpegs_of
from flallm_ds.data.index import Index
from flallm_ds.data.plan import EpochPlan, Plan, slices_of_rank
from flallm_ds.data.sampling import FrameSampling, sample_rng
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import RankError, UserError
from flallm_ds.features.facts import from_npy
from flallm_ds.features.sequences import resample, resampled_lengths

NUM_DRAWS = 9
STEPS_AHEAD = 2
SHARDS_AHEAD = 32  # fetched before they are needed, where they are remote: two windows of the plan


@dataclass
class BrokenClips:
    """Clips that this rank could not decode, by name; past `budget` of them the run stops.

    A clip of cached features counts once, however many views of it are broken.
    """

    budget: int
    reasons: dict[str, str] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)

    def add(self, shard: str, key: str, reason: str) -> None:
        if key in self.keys:
            return
        if self.budget == 0:
            raise RankError(
                f"every clip must decode here, but {key} in {shard} does not ({reason}). "
                "Run shards/verify.py on the shards; its --repair drops or rebuilds what is broken."
            )
        print(f"warning: clip {key} in {shard} is broken ({reason}); another takes its place", flush=True)
        self.keys.add(key)
        self.reasons[f"{shard}:{key}"] = reason
        if len(self.reasons) > self.budget:
            raise RankError(
                f"at most {self.budget} clips may be broken, but {len(self.reasons)} are; the last is {key} "
                f"in {shard}: {reason}. Run shards/verify.py on the shards, or raise --data.max_broken."
            )


@dataclass(frozen=True)
class ClipReader:
    """Reads clips of one split: their bytes by offset, then the kept frames alone, or the features.

    seed, train: with `train`, a random frame of each group is kept, drawn from (seed, epoch, sample).
    Of features, each epoch reads the next view. feature_fps: the rate that they are brought to.
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
            return resampled_lengths(kept, self.sampling.rates(num_frames, fps), self.feature_fps)
        except ValueError as error:
            raise UserError(
                f"data.feature_fps cannot be {self.feature_fps} for {self.index.root}: {error}."
            ) from error

    def plan(
        self, batch_clips: int, slices: int, *, batch_frames: int = 0, weights: Sequence[float] = ()
    ) -> Plan:
        """Plan the order of these clips; the arguments are fields of `Plan`. Raises as `num_places`."""
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
        """(the clip's random numbers, float32 (9,); indices of its kept frames)."""
        arrays = self.index.arrays
        rng = sample_rng(self.seed, epoch, self.index.own_row(row)) if self.train else None
        draws = rng.random(NUM_DRAWS) if rng is not None else np.zeros(NUM_DRAWS)
        picks = self.sampling.picks(int(arrays["num_frames"][row]), float(arrays["fps"][row]), rng)
        return draws.astype(np.float32), picks

    def read(self, row: int, memory: Callable[[int], bytearray] = bytearray, epoch: int = 0) -> memoryview:
        """The clip's bytes, in what `memory(size)` gives. Raises OSError or ValueError if any is missing."""
        arrays = self.index.arrays
        size, offset = int(arrays["size"][row]), int(arrays["offset"][row])
        with self.index.store.open(self.index.tar(row, epoch)) as file:
            found = os.fstat(file.fileno()).st_size - offset
            if found < size:  # before memory is taken for what the index claims
                raise ValueError(f"must hold {size} bytes at {offset}, but ends after {max(found, 0)}")
            member = memoryview(memory(size))[:size]
            found = os.preadv(file.fileno(), [member], offset)
        if found != size:
            raise ValueError(f"must hold {size} bytes at {offset}, but ends after {found}")
        return member

    def read_into(self, frames_THWC: np.ndarray, row: int, picks: np.ndarray) -> None:
        """Decode the picked frames into the canvases' top left corners. Raises ValueError if it cannot."""
        arrays = self.index.arrays
        hw = int(arrays["height"][row]), int(arrays["width"][row])
        member = self.read(row, _memory_of_thread)
        decode_frames(member, picks, int(arrays["num_frames"][row]), frames_THWC, hw)

    def read_jpegs(self, row: int, picks: np.ndarray) -> list[memoryview]:
        """The picked frames as they are stored. Raises ValueError if the clip is broken or holds none."""
        return jpegs_of(self.read(row), picks, int(self.index.arrays["num_frames"][row]))

    def read_features(self, features_SD: np.ndarray, row: int, epoch: int, num_kept: int) -> None:
        """Copy the clip's features, at `feature_fps`. Raises ValueError if they are broken."""
        facts, arrays = self.index.features_of(row), self.index.arrays
        member = self.read(row, _memory_of_thread, epoch)
        stored = from_npy(member, (num_kept, facts.width), facts.dtype)
        if self.feature_fps is None:
            features_SD[:] = stored
            return
        rate = self.sampling.rates(arrays["num_frames"][row], arrays["fps"][row])
        stored_1TD = torch.from_numpy(stored.astype(np.float32))[None]
        length = torch.tensor([num_kept])
        features_SD[:] = resample(stored_1TD, length, float(rate), self.feature_fps)[0][0].numpy()

    def load(self, row: int, epoch: int, content: np.ndarray | None) -> "Clip":
        """Draw, then decode frames_THWC or copy features_SD into `content`, or without it keep the JPEGs."""
        draws, picks = self.draws(row, epoch)
        if content is None:
            return Clip(draws, self.read_jpegs(row, picks))
        if self.index.features:
            self.read_features(content, row, epoch, len(picks))
        else:
            self.read_into(content, row, picks)
        return Clip(draws, [])

    def content(self, num: int) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of `num` packed frames or features."""
        features = self.index.features
        if not features:
            return (num, *self.index.frame_hw, 3), "uint8"
        half = self.feature_fps is None and {facts.dtype for facts in features} == {"float16"}
        return (num, features[0].width), "float16" if half else "float32"


@dataclass(frozen=True)
class Clip:
    """What a job brings of a clip, besides what it wrote into the batch's memory."""

    draws: np.ndarray
    jpegs: list[memoryview]


_of_thread = threading.local()


def _memory_of_thread(size: int) -> bytearray:
    """The same memory for one clip after the other: fresh memory costs as much as reading into it."""
    memory: bytearray = getattr(_of_thread, "memory", bytearray())
    if len(memory) < size:
        memory = _of_thread.memory = bytearray(size + size // 4)
    return memory


@dataclass
class _Pending:
    """A micro-batch whose clips are being decoded."""

    rows: list[int]
    epochs: list[int]  # how often each clip came before
    real: bool
    num_kept: list[int]
    content: torch.Tensor  # frames_NHWC, of device meta where they stay JPEGs, or features_ND
    jobs: list[Future[Clip]]


class Loader:
    """One pass over an epoch plan: `for micro_batches in loader.steps(start)` yields a rank's share of steps.

    `for batch in loader` yields the same micro-batches one by one. Every rank yields the same number of steps
    with the same number of micro-batches. A broken clip is replaced by the next one of the index, the same on
    any rank, and counted in `broken`. Its threads live only while one iterates: a loader can be pickled, and
    used after a fork. codec: without one, `target_ids_BL` has no columns. encoded: frames stay JPEGs, for
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
        self.encoded = encoded and not reader.index.features
        self.slices = slices_of_rank(plan.slices, rank, world_size)
        self.threads = threads
        self.broken = broken if broken is not None else BrokenClips(budget=0)

    def __len__(self) -> int:
        return self.plan.num_steps

    def __iter__(self) -> Iterator[Any]:
        for micro_batches in self.steps():
            yield from micro_batches

    def steps(self, start: int = 0) -> Iterator[list[Any]]:
        """The micro-batches of step `start` and all after it, decoded a few steps ahead."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        buffers = FrameBuffers()
        shards = _Shards(self.reader.index, self.plan)
        ahead: deque[list[_Pending]] = deque()
        try:
            for step in range(start, self.plan.num_steps):
                shards.read_ahead(step)
                ahead.append([self._submit(pool, buffers, *rows) for rows in self._rows(step)])
                if len(ahead) > STEPS_AHEAD:
                    yield [self._finish(pending) for pending in ahead.popleft()]
            while ahead:
                yield [self._finish(pending) for pending in ahead.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, step: int) -> Iterator[tuple[np.ndarray, bool]]:
        """(places of the plan, whether they count) of each micro-batch of this rank."""
        places = self.plan.places_of(step)
        for s in self.slices:
            if len(places[s]):
                yield places[s], True
            else:  # fewer clips than slices: a dummy keeps this rank in step
                yield places[0][:1], False

    def _submit(
        self, pool: ThreadPoolExecutor, buffers: FrameBuffers, places: np.ndarray, real: bool
    ) -> _Pending:
        rows, epochs = self.plan.order[places].tolist(), self.plan.passes[places].tolist()
        num_kept = self.plan.num_kept[rows].tolist()
        shape, dtype = self.reader.content(sum(num_kept))
        content = _on_meta(shape) if self.encoded else _take(buffers, shape, dtype)
        parts = self._parts(content, num_kept)
        jobs = [pool.submit(self.reader.load, *job) for job in zip(rows, epochs, parts, strict=True)]
        return _Pending(rows, epochs, real, num_kept, content, jobs)

    def _parts(self, content: torch.Tensor, num_kept: Sequence[int]) -> Sequence[np.ndarray | None]:
        """Each clip's share of the memory, none where frames stay JPEGs."""
        if self.encoded:
            return [None] * len(num_kept)
        return np.split(content.numpy(), np.cumsum(num_kept)[:-1])

    def _finish(self, pending: _Pending) -> Batch | EncodedBatch:
        wait(pending.jobs)  # for all, before any is replaced: they share memory
        errors = [job.exception() for job in pending.jobs]
        for position, error in enumerate(errors):
            if isinstance(error, UserError):  # a store that gave up: the other ranks may not have met it
                raise RankError(str(error)) from error
            if error is not None:
                if not isinstance(error, (ValueError, OSError)):
                    raise error
                self._replace(pending, position, str(error))
        index, rows, clips = self.reader.index, pending.rows, [job.result() for job in pending.jobs]
        texts = self._strings("text", rows)
        # A dummy has one place, which counts for nothing: the loss is not defined for none.
        ids = [[] if self.codec is None else self.codec.encode(t) if pending.real else [-100] for t in texts]
        sizes = np.array([index.arrays["height"][rows], index.arrays["width"][rows]], np.float32).T
        cached = bool(index.features)
        batch = Batch(
            frames_NHWC=torch.empty(0, *index.frame_hw, 3, dtype=torch.uint8) if cached else pending.content,
            features_ND=pending.content if cached else None,
            num_frames_B=torch.from_numpy(np.array(pending.num_kept, np.int64)),
            size_B2=torch.from_numpy(sizes),
            draws_B9=torch.from_numpy(np.array([clip.draws for clip in clips])),
            target_ids_BL=_pad(ids),
            keys=self._strings("key", rows),
            texts=texts,
            corpora=tuple(index.corpus_of(row) for row in rows),
            languages=self._strings("language", rows),
            real_B=(pending.real,) * len(rows),
        )
        if not self.encoded:
            return batch
        return EncodedBatch(batch, [jpeg for clip in clips for jpeg in clip.jpegs])

    def _strings(self, name: str, rows: list[int]) -> tuple[str, ...]:
        column = self.reader.index.strings(name)
        return tuple(column[row] for row in rows)

    def _replace(self, pending: _Pending, position: int, reason: str) -> None:
        """Put the next clip of the index that decodes in the broken one's place."""
        first = row = pending.rows[position]
        epoch = pending.epochs[position]
        while True:
            shard = self.reader.index.tar(row, epoch).file
            self.broken.add(shard, self.reader.index.strings("key")[row], reason)
            if (row + 1) % len(self.reader.index) == first:
                raise RankError(
                    f"a clip of {self.reader.index.root} must decode, but none of them does: {reason}."
                )
            row = (row + 1) % len(self.reader.index)
            num_kept = int(self.plan.num_kept[row])
            content = pending.content.new_empty(num_kept, *pending.content.shape[1:])
            done: Future[Clip] = Future()
            try:
                (part,) = self._parts(content, [num_kept])
                done.set_result(self.reader.load(row, epoch, part))
                break
            except (ValueError, OSError) as error:
                reason = str(error)
        parts = list(torch.split(pending.content, pending.num_kept))
        parts[position] = content
        pending.content = torch.cat(parts)
        pending.rows[position], pending.num_kept[position], pending.jobs[position] = row, num_kept, done


def _take(buffers: FrameBuffers, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Memory for a micro-batch. Raises RankError where there is too little: the largest frame counts."""
    try:
        return buffers.take(shape, dtype)
    except (MemoryError, RuntimeError) as error:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raise RankError(
            f"a micro-batch must fit into memory, but one of the shape {shape} takes {size / 1e9:,.0f} GB. "
            "Lower --data.batch_clips or --data.max_frames, or build shards of smaller frames (--short_side)."
        ) from error


class _Shards:
    """Tells the store which shards come next, in the order of their first use."""

    def __init__(self, index: Index, plan: EpochPlan) -> None:
        self._index = index
        shards, places = np.unique(index.tars(plan.order, plan.passes), return_index=True)
        by_place = np.argsort(places)
        self._order = shards[by_place].tolist()
        self._first_step = np.searchsorted(plan.ends, places[by_place], side="right")
        self._told = -1

    def read_ahead(self, step: int) -> None:
        begin = int(np.searchsorted(self._first_step, step))
        if begin != self._told:
            self._told = begin
            coming = self._order[begin : begin + SHARDS_AHEAD]
            self._index.store.want([self._index.shards[shard] for shard in coming])


def _on_meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _pad(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ids padded with -100."""
    longest = max(map(len, ids))
    return torch.from_numpy(np.array([[*row, *[-100] * (longest - len(row))] for row in ids], np.int64))


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
    """A loader for a loop of your own: `for batch in open_loader("data/mine"): ...`.

    shards: one shard folder (or address) or several. train: shuffled anew each epoch, with random frame
    picks; otherwise longest first, each clip once. batch_clips: of one batch of this rank. sampling: without
    one, every frame of a video, and of features those that they were made of.
    """
    index = mixture.open_indexes(shards, split)
    sampling = sampling or (index.features[0].sampling if index.features else FrameSampling())
    reader = ClipReader(index, sampling, seed, train)
    plan = reader.plan(batch_clips * world_size, world_size, weights=weights)
    order = plan.epoch(epoch) if train else plan.in_length_order()
    broken = BrokenClips(budget=-(-len(index) // 100)) if train else None  # 1 %, as in data.max_broken
    return Loader(reader, order, codec, rank=rank, world_size=world_size, threads=threads, broken=broken)
