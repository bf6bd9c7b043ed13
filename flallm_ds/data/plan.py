"""The order of an epoch as a pure function: the clips of each step, before any data is read.

Shards are shuffled, windows of shards are mixed, clips are bucketed by length and cut
into global batches. A global batch is dealt into M micro-batches of nearly equal frames.
Rank r of W ranks computes the micro-batches r*M/W to (r+1)*M/W, rounded if W does not
divide M. So one rank with 4 micro-batches sees the same micro-batches as two ranks with 2
each, and every rank makes the same number of steps.

A row is a clip of the index; a place is a position in the order of an epoch.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from flallm_ds.errors import UserError

VERSION = 4
# Minimum and maximum batches of a pool, in which clips are bucketed by length. Large pools
# pad less, small pools mix better; small corpora use the minimum.
POOL_BATCHES = (8, 64)
EPOCH_POOLS = 32  # pools of an epoch up to which pools have the minimum size
WINDOW_SHARDS = 16  # shards whose clips are mixed
# Maximum share of its length that is added to a clip at random, so that its neighbours
# differ between epochs.
_JITTER = 0.1
_MAX_SWAPS = 8  # per micro-batch, to balance the frames of the micro-batches of a step


@dataclass(frozen=True)
class PlanState:
    """The position of a run in its data: plain values to resume exactly, at any world size.

    batch_frames: 0 if `batch_clips` limits the batches. weights: empty if all clips have
    the same weight. features: the digest of cached features, empty for video.
    """

    version: int
    fingerprint: str
    features: str
    seed: int
    batch_clips: int
    batch_frames: int
    weights: tuple[float, ...]
    num_micro_batches: int
    epoch: int
    step: int

    def check_same_plan(self, other: "PlanState") -> None:
        """Raise UserError that names the first difference if `other` has another plan."""
        mine, saved = asdict(self), asdict(other)
        for name in mine:
            if name not in ("epoch", "step") and mine[name] != saved[name]:
                raise UserError(
                    f"The {name} of the data must be {saved[name]!r} as in the checkpoint, "
                    f"got {mine[name]!r}. Use the original shards and options, or start "
                    "another run folder."
                )

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "PlanState":
        """Read the values of `asdict` from the JSON of a checkpoint.

        Raises UserError if an incompatible version wrote them.
        """
        values = dict(saved)
        if "slices" in values:  # the name in checkpoints of version 0.1
            values["num_micro_batches"] = values.pop("slices")
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise UserError(
                f"The version of the data order must be {VERSION}, got "
                f"{saved.get('version')} in the checkpoint. Start another run folder, or "
                "resume with the version of flallm_ds that started the run."
            )
        return cls(**values | {"weights": tuple(saved["weights"])})


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: `order[p]` is the row at place p; batch i ends before place `ends[i]`.

    passes[p]: how often the clip came before; its random numbers are drawn from this
    count. It equals the epoch, unless corpora are mixed by weights. num_kept: kept frames
    of each row, int (clips,).
    """

    order: np.ndarray
    passes: np.ndarray
    ends: np.ndarray
    num_kept: np.ndarray
    num_micro_batches: int

    @property
    def num_steps(self) -> int:
        return len(self.ends)

    def batch(self, step: int) -> np.ndarray:
        """Return the rows of a global batch."""
        return self.order[self._begin(step) : self.ends[step]]

    def micro_batches_of(self, step: int) -> list[np.ndarray]:
        """Return the rows of each micro-batch of a step."""
        return [self.order[places] for places in self.places_of(step)]

    def places_of(self, step: int) -> list[np.ndarray]:
        """Return the places of each micro-batch of a step, nearly equal in frames.

        With fewer clips than micro-batches, some micro-batches are empty.
        """
        kept = self.num_kept[self.batch(step)]
        num = self.num_micro_batches

        # Deal the clips in serpentine order by length: to 0 1 2 2 1 0 0 1 2 ... of 3
        # micro-batches.
        turn, position = np.divmod(np.arange(len(kept)), num)
        dealt_to = np.where(turn % 2 == 0, position, num - 1 - position)

        # Collect the clips of each micro-batch, longest first.
        by_length = np.argsort(-kept, kind="stable")
        micro_batches = [by_length[dealt_to == number] for number in range(num)]

        # Balance the frames: all ranks wait for the rank with the most.
        _balance(micro_batches, kept)
        begin = self._begin(step)
        return [begin + positions for positions in micro_batches]

    def _begin(self, step: int) -> int:
        return int(self.ends[step - 1]) if step else 0


@dataclass(frozen=True)
class Plan:
    """All epochs of a run over one split.

    num_kept: kept frames of each row, int (clips,). shard: the shard of each row, int
    (clips,). batch_clips: maximum clips of a global batch. batch_frames: maximum kept
    frames of a global batch, instead of batch_clips; a longer clip forms a batch alone.
    corpus: the corpus of each row, int (clips,). weights: the share of each corpus in an
    epoch; without weights an epoch contains every clip once. features: the digest of
    cached features, for the state; the order is that of the video.
    """

    fingerprint: str
    num_kept: np.ndarray
    shard: np.ndarray
    seed: int
    batch_clips: int
    num_micro_batches: int
    batch_frames: int = 0
    corpus: np.ndarray | None = None
    weights: tuple[float, ...] = ()
    features: str = ""

    def state(self, epoch: int, step: int) -> PlanState:
        """Return the state that a checkpoint before this step stores."""
        return PlanState(
            VERSION,
            self.fingerprint,
            self.features,
            self.seed,
            self.batch_clips,
            self.batch_frames,
            self.weights,
            self.num_micro_batches,
            epoch,
            step,
        )

    def epoch(self, epoch: int) -> EpochPlan:
        """Return the training order of an epoch; without weights, it contains every clip
        exactly once."""
        rows, passes = self._drawn(epoch)
        rng = self._rng(epoch)

        # Mix the clips of WINDOW_SHARDS shards at a time, with windows and shards in random
        # order. All sorts are stable: an unstable sort orders equal keys differently on
        # different processors.
        num_shards = int(self.shard.max()) + 1
        window_of_shard = rng.permutation(num_shards).astype(np.int32) // WINDOW_SHARDS
        window = window_of_shard[self.shard[rows]]
        mixed = np.argsort(window + rng.random(len(rows)), kind="stable")

        # Sort each pool of the mixed order by length, with jitter. Ascending in one pool
        # and descending in the next, so that a batch across two pools has similar lengths.
        kept = self.num_kept[rows[mixed]].astype(np.float32)
        pool = self._pools(kept)
        jitter = 1 + _JITTER * rng.random(len(rows), np.float32)
        direction = (1 - 2 * (pool % 2)).astype(np.float32)
        length = kept * jitter * direction
        # Scale below 1 / 2, so that the sort is by pool first.
        length /= 4 * np.abs(length).max()
        order = mixed[np.argsort(pool + length, kind="stable")]

        # Cut that order into batches, and shuffle the batches of each pool.
        ends = self._cut(self.num_kept[rows[order]])
        begins = np.concatenate([[0], ends[:-1]])
        shuffled = np.lexsort((rng.random(len(ends)), pool[begins]))

        # Move the clips of each batch to the new place of the batch.
        new_sizes = (ends - begins)[shuffled]
        new_ends = np.cumsum(new_sizes)
        new_begins = new_ends - new_sizes
        moved_by = np.repeat(begins[shuffled] - new_begins, new_sizes)
        order = order[moved_by + np.arange(len(rows))]
        return self._epoch_plan(rows[order], passes[order], new_ends)

    def in_length_order(self) -> EpochPlan:
        """Return the evaluation order: every clip exactly once, longest first.

        This order minimises padding and the time that ranks wait for each other.
        """
        order = np.argsort(-self.num_kept, kind="stable")
        ends = self._cut(self.num_kept[order])
        return self._epoch_plan(order, np.zeros_like(order), ends)

    def _epoch_plan(
        self, order: np.ndarray, passes: np.ndarray, ends: np.ndarray
    ) -> EpochPlan:
        return EpochPlan(order, passes, ends, self.num_kept, self.num_micro_batches)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what, int(self.fingerprint, 16)])

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of an epoch before shuffling, and how often each clip came before.

        With weights, each epoch contains a fixed number of clips of a corpus, the next
        ones of an infinite sequence of reshuffles of the corpus. So all clips of a corpus
        come equally often over the epochs.
        """
        num_clips = len(self.num_kept)
        if not self.weights:
            return np.arange(num_clips, dtype=np.int32), np.full(num_clips, epoch, np.int32)
        rows, passes = [], []
        for number, quota in enumerate(self.quotas):
            own = np.flatnonzero(self._corpus == number).astype(np.int32)

            # Find the part of the sequence for this epoch, and the shuffles it spans.
            begin, end = epoch * quota, (epoch + 1) * quota
            shuffle_of, position = np.divmod(np.arange(begin, end), len(own))
            touched = range(begin // len(own), -(-end // len(own)))

            # The number of a shuffle is also how often each of its clips came before.
            for shuffle in touched:
                shuffled = self._rng(shuffle, number, 1).permutation(own)
                chosen = shuffled[position[shuffle_of == shuffle]]
                rows.append(chosen)
                passes.append(np.full(len(chosen), shuffle, np.int32))
        return np.concatenate(rows), np.concatenate(passes)

    @cached_property
    def quotas(self) -> list[int]:
        """Clips of each corpus in an epoch; the sum is the number of all clips."""
        shares = np.array(self.weights) / sum(self.weights)
        # Round the cumulative sums, not each share: so the total is exact.
        ends = np.rint(np.cumsum(shares) * len(self.num_kept)).astype(int)
        quotas: list[int] = np.diff(ends, prepend=0).tolist()
        return quotas

    @property
    def _corpus(self) -> np.ndarray:
        """The corpus of each row, int (clips,)."""
        if self.corpus is None:
            return np.zeros(len(self.num_kept), np.int32)
        return self.corpus

    def _pools(self, kept: np.ndarray) -> np.ndarray:
        """Return the pool of each place of the mixed order, int32.

        kept: kept frames at each place, float32.
        """
        # Estimate the batch of each place; `_cut` makes the actual batches later.
        if self.batch_frames:
            batch = (np.cumsum(kept, dtype=np.float64) / self.batch_frames).astype(np.int32)
        else:
            num_batches = -(-len(kept) // self.batch_clips)
            batch = (np.arange(len(kept)) * num_batches // len(kept)).astype(np.int32)

        # Spread the batches evenly over the pools.
        num_batches = int(batch[-1]) + 1
        pool_batches = int(np.clip(num_batches // EPOCH_POOLS, *POOL_BATCHES))
        num_pools = -(-num_batches // pool_batches)
        pool_of_batch = np.arange(num_batches, dtype=np.int32) * num_pools // num_batches
        return pool_of_batch[batch]

    def _cut(self, kept: np.ndarray) -> np.ndarray:
        """Return the end of each global batch of this order.

        kept: kept frames at each place, int. With batch_frames, the number of clips of a
        batch is a multiple of the number of micro-batches where possible.
        """
        if not self.batch_frames:
            return self._cut_by_clips(len(kept))
        frames_before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
        ends: list[int] = []
        begin = 0
        while begin < len(kept):
            # Take as many clips as batch_frames allows, at least one.
            limit = frames_before[begin] + self.batch_frames
            end = max(int(frames_before.searchsorted(limit, "right")) - 1, begin + 1)
            # Give each micro-batch the same number of clips; the remaining clips start the
            # next batch.
            if end < len(kept) and end - begin > self.num_micro_batches:
                end -= (end - begin) % self.num_micro_batches
            ends.append(end)
            begin = end
        return np.array(ends)

    def _cut_by_clips(self, num_clips: int) -> np.ndarray:
        """Return the end of each global batch; the batches differ by one unit at most.

        A unit is a number of clips that up to 64 micro-batches share equally, so that no
        micro-batch gets one clip more than another.
        """
        unit = math.gcd(self.batch_clips, 64)
        num_units = -(-num_clips // unit)
        num_batches = -(-num_clips // self.batch_clips)
        end_units = np.arange(1, num_batches + 1) * num_units // num_batches
        return np.minimum(end_units * unit, num_clips)


def _balance(micro_batches: list[np.ndarray], kept: np.ndarray) -> None:
    """Swap clips between the micro-batches with the most and the fewest frames while the
    difference shrinks.

    micro_batches: positions in `kept`; changed in place.
    """
    frames = np.array([kept[positions].sum() for positions in micro_batches])
    for _ in range(_MAX_SWAPS * len(micro_batches)):
        full, empty = int(frames.argmax()), int(frames.argmin())
        excess = frames[full] - frames[empty]
        if excess < 2 or not len(micro_batches[empty]):
            return

        # Find the pair of clips whose swap comes nearest to halving the difference.
        full_kept, empty_kept = kept[micro_batches[full]], kept[micro_batches[empty]]
        gain = full_kept[:, None] - empty_kept[None, :]
        i, j = np.unravel_index(np.abs(2 * gain - excess).argmin(), gain.shape)
        moved = gain[i, j]
        if not 0 < moved < excess:
            return

        from_full, from_empty = micro_batches[full][i], micro_batches[empty][j]
        micro_batches[full][i], micro_batches[empty][j] = from_empty, from_full
        frames[full] -= moved
        frames[empty] += moved


def temperature_weights(sizes: list[int], temperature: float) -> tuple[float, ...]:
    """Return the share of each corpus in an epoch: its size to the power 1 / temperature.

    A temperature of 1 keeps the proportions, a higher one makes them more equal. Source:
    mBART and M2M-100 (arXiv 2001.08210, 2010.11125).
    """
    raised = np.array(sizes, np.float64) ** (1 / temperature)
    return tuple((raised / raised.sum()).tolist())


def micro_batches_of_rank(num_micro_batches: int, rank: int, world_size: int) -> range:
    """Return the micro-batches of a global batch that a rank computes, in order.

    The ranks differ by one micro-batch at most. Raises UserError if a rank would get none.
    """
    if world_size > num_micro_batches:
        raise UserError(
            f"data.micro_batches must be at least the number of ranks ({world_size}), got "
            f"{num_micro_batches}. Use --data.micro_batches={world_size}, or fewer ranks."
        )
    begin = rank * num_micro_batches // world_size
    end = (rank + 1) * num_micro_batches // world_size
    return range(begin, end)


def micro_batches_per_rank(num_micro_batches: int, world_size: int) -> int:
    """Return the number of forward passes of each rank in a step.

    Ranks with fewer micro-batches fill up with dummies, because all ranks must make the
    same number of forward passes.
    """
    return -(-num_micro_batches // world_size)
