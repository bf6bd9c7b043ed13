"""The order of an epoch as a pure function: which clips form which step, before a byte is read.

Shards are shuffled, windows of shards are mixed, clips are bucketed by length and cut
into global batches. A global batch is dealt into `slices` micro-batches of nearly equal
frames. Rank r of a world of W takes the slices r*slices/W to (r+1)*slices/W, so 1 rank x
4 micro-batches and 2 x 2 see the same micro-batches, and every rank has the same number
of steps.

A row is a clip of the index; a place is a position in the order of an epoch.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from flallm_ds.errors import UserError

VERSION = 4
# Least and most batches of a pool, in which clips are bucketed by length. Large pools pad
# less, small ones mix better; small corpora take the least.
POOL_BATCHES = (8, 64)
EPOCH_POOLS = 32  # an epoch has this many pools before its pools grow
WINDOW_SHARDS = 16  # shards whose clips are mixed
# Share of a length that is added at random, so that a clip has other neighbours in each
# epoch.
_JITTER = 0.1
_MAX_SWAPS = 8  # for each micro-batch, when the micro-batches of a step are evened out


@dataclass(frozen=True)
class PlanState:
    """Where a run is in its data: plain values that resume it to the bit, at any world size.

    batch_frames is 0 where `batch_clips` cuts the batches; weights are empty where every
    clip counts alike. features: the digest of cached features, empty for video.
    """

    version: int
    fingerprint: str
    features: str
    seed: int
    batch_clips: int
    batch_frames: int
    weights: tuple[float, ...]
    slices: int
    epoch: int
    step: int

    def check_same_plan(self, other: "PlanState") -> None:
        """Raise UserError that says what differs if `other` belongs to another plan."""
        mine, saved = asdict(self), asdict(other)
        for name in mine:
            if name not in ("epoch", "step") and mine[name] != saved[name]:
                raise UserError(
                    f"the data's {name} must be {saved[name]!r} as in the checkpoint, but "
                    f"is {mine[name]!r} now. Use the shards and options the run began "
                    "with, or start another run folder."
                )

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "PlanState":
        """Read what `asdict` gave and JSON kept.

        Raises UserError where another version wrote it.
        """
        names = {field.name for field in fields(cls)}
        if set(saved) != names:
            raise UserError(
                f"the data's version must be {VERSION}, but the checkpoint's is "
                f"{saved.get('version')}. Start another run folder, or go on with the "
                "version of flallm_ds that began the run."
            )
        return cls(**saved | {"weights": tuple(saved["weights"])})


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: `order[p]` is the row at place p; batch i ends before place `ends[i]`.

    passes[p] is how often that clip came before: its random draws come from there. It is
    the epoch, unless corpora are mixed by weights. num_kept: kept frames of each row, int
    (clips,).
    """

    order: np.ndarray
    passes: np.ndarray
    ends: np.ndarray
    num_kept: np.ndarray
    slices: int

    @property
    def num_steps(self) -> int:
        return len(self.ends)

    def batch(self, step: int) -> np.ndarray:
        """Return the rows of a global batch."""
        return self.order[self._begin(step) : self.ends[step]]

    def slices_of(self, step: int) -> list[np.ndarray]:
        """Return the rows of each micro-batch of a step."""
        return [self.order[places] for places in self.places_of(step)]

    def places_of(self, step: int) -> list[np.ndarray]:
        """Return the places of each micro-batch of a step, nearly equal in frames.

        With fewer clips than slices some micro-batches are empty.
        """
        kept = self.num_kept[self.batch(step)]

        # Deal the clips in serpentine order of length: with 3 slices 0 1 2 2 1 0 0 1 2
        # ...
        turn, position = np.divmod(np.arange(len(kept)), self.slices)
        dealt_to = np.where(turn % 2 == 0, position, self.slices - 1 - position)

        # Collect the clips of each micro-batch, longest first.
        by_length = np.argsort(-kept, kind="stable")
        micro_batches = [by_length[dealt_to == s] for s in range(self.slices)]

        # Ranks wait for the one with the most frames.
        _even_out(micro_batches, kept)
        begin = self._begin(step)
        return [begin + positions for positions in micro_batches]

    def _begin(self, step: int) -> int:
        return int(self.ends[step - 1]) if step else 0


@dataclass(frozen=True)
class Plan:
    """All epochs of a run over one split.

    num_kept: kept frames of each row, int (clips,). shard: each row's shard number, int
    (clips,). batch_clips: clips of a global batch at most. batch_frames: kept frames of a
    global batch at most, instead; a clip with more is a batch of its own. corpus,
    weights: each row's corpus, int (clips,), and each corpus's share of an epoch; without
    weights an epoch holds every clip once. features: the digest of cached features, for
    the state; the order is that of the video.
    """

    fingerprint: str
    num_kept: np.ndarray
    shard: np.ndarray
    seed: int
    batch_clips: int
    slices: int
    batch_frames: int = 0
    corpus: np.ndarray | None = None
    weights: tuple[float, ...] = ()
    features: str = ""

    def state(self, epoch: int, step: int) -> PlanState:
        """Return what a checkpoint before this step keeps."""
        return PlanState(
            VERSION,
            self.fingerprint,
            self.features,
            self.seed,
            self.batch_clips,
            self.batch_frames,
            self.weights,
            self.slices,
            epoch,
            step,
        )

    def epoch(self, epoch: int) -> EpochPlan:
        """Return the training order of an epoch; without weights it has every clip
        exactly once."""
        rows, passes = self._drawn(epoch)
        rng = self._rng(epoch)

        # Mix the clips of WINDOW_SHARDS shards at a time, windows and shards in random
        # order. All sorts are stable: others leave equal keys in an order that depends on
        # the processor.
        num_shards = int(self.shard.max()) + 1
        window_of_shard = rng.permutation(num_shards).astype(np.int32) // WINDOW_SHARDS
        window = window_of_shard[self.shard[rows]]
        mixed = np.argsort(window + rng.random(len(rows)), kind="stable")

        # Sort each pool of the mixed order by length, with jitter. Up in one pool and
        # down in the next: a batch that two pools share is of one length, too.
        kept = self.num_kept[rows[mixed]].astype(np.float32)
        pool = self._pools(kept)
        jitter = 1 + _JITTER * rng.random(len(rows), np.float32)
        direction = (1 - 2 * (pool % 2)).astype(np.float32)
        length = kept * jitter * direction
        # below 1 / 2: the number of the pool is sorted by first
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
        return EpochPlan(rows[order], passes[order], new_ends, self.num_kept, self.slices)

    def in_length_order(self) -> EpochPlan:
        """Return the evaluation order: every clip exactly once, longest first.

        So padding, and the waiting of ranks for each other, are least.
        """
        order = np.argsort(-self.num_kept, kind="stable")
        ends = self._cut(self.num_kept[order])
        return EpochPlan(order, np.zeros_like(order), ends, self.num_kept, self.slices)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what, int(self.fingerprint, 16)])

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of an epoch before any shuffling, and how often each clip came before.

        With weights, a corpus gives a fixed number of clips to each epoch. They are taken
        one after another from an endless sequence of shuffles of the corpus: over the
        epochs all its clips come equally often.
        """
        num_clips = len(self.num_kept)
        if not self.weights:
            return np.arange(num_clips, dtype=np.int32), np.full(num_clips, epoch, np.int32)
        rows, passes = [], []
        for number, quota in enumerate(self.quotas):
            own = np.flatnonzero(self._corpus == number).astype(np.int32)

            # Where this epoch lies in the endless sequence, and which shuffles that
            # touches.
            begin, end = epoch * quota, (epoch + 1) * quota
            shuffle_of, position = np.divmod(np.arange(begin, end), len(own))
            touched = range(begin // len(own), -(-end // len(own)))

            # A shuffle's number is also how often each of its clips came before.
            for shuffle in touched:
                shuffled = self._rng(shuffle, number, 1).permutation(own)
                chosen = shuffled[position[shuffle_of == shuffle]]
                rows.append(chosen)
                passes.append(np.full(len(chosen), shuffle, np.int32))
        return np.concatenate(rows), np.concatenate(passes)

    @cached_property
    def quotas(self) -> list[int]:
        """How many clips each corpus gives to an epoch; their sum is the number of all clips."""
        shares = np.array(self.weights) / sum(self.weights)
        # Rounded where the corpora meet, not each by itself: so the sum is exact.
        ends = np.rint(np.cumsum(shares) * len(self.num_kept)).astype(int)
        quotas: list[int] = np.diff(ends, prepend=0).tolist()
        return quotas

    @property
    def _corpus(self) -> np.ndarray:
        """Each row's corpus, int (clips,)."""
        return (
            np.zeros(len(self.num_kept), np.int32) if self.corpus is None else self.corpus
        )

    def _pools(self, kept: np.ndarray) -> np.ndarray:
        """Return the pool in which each place of the mixed order is bucketed by length, int32.

        kept: kept frames at each place, float32.
        """
        # Number the batch of each place. This is near enough: `_cut` cuts the real ones.
        if self.batch_frames:
            batch = (np.cumsum(kept, dtype=np.float64) / self.batch_frames).astype(np.int32)
        else:
            num_batches = -(-len(kept) // self.batch_clips)
            batch = (np.arange(len(kept)) * num_batches // len(kept)).astype(np.int32)

        # Spread the batches over as many pools as the size of a pool allows.
        num_batches = int(batch[-1]) + 1
        pool_batches = int(np.clip(num_batches // EPOCH_POOLS, *POOL_BATCHES))
        num_pools = -(-num_batches // pool_batches)
        pool_of_batch = np.arange(num_batches, dtype=np.int32) * num_pools // num_batches
        return pool_of_batch[batch]

    def _cut(self, kept: np.ndarray) -> np.ndarray:
        """Return where each global batch of this order ends.

        kept: kept frames at each place, int. With batch_frames, the number of clips of a
        batch is a multiple of the slices where it can be.
        """
        if not self.batch_frames:
            return self._cut_by_clips(len(kept))
        frames_before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
        ends: list[int] = []
        begin = 0
        while begin < len(kept):
            # As many clips as batch_frames allows, one at least.
            limit = frames_before[begin] + self.batch_frames
            end = max(int(frames_before.searchsorted(limit, "right")) - 1, begin + 1)
            # Each slice the same number of clips; the clips left over begin the next
            # batch.
            if end < len(kept) and end - begin > self.slices:
                end -= (end - begin) % self.slices
            ends.append(end)
            begin = end
        return np.array(ends)

    def _cut_by_clips(self, num_clips: int) -> np.ndarray:
        """Return where each global batch ends, the remainder spread over all of them.

        It is spread in units that up to 64 slices share equally, so that no slice has a
        clip more to do.
        """
        unit = math.gcd(self.batch_clips, 64)
        num_units = -(-num_clips // unit)
        num_batches = -(-num_clips // self.batch_clips)
        end_units = np.arange(1, num_batches + 1) * num_units // num_batches
        return np.minimum(end_units * unit, num_clips)


def _even_out(micro_batches: list[np.ndarray], kept: np.ndarray) -> None:
    """Swap clips between the fullest and the emptiest micro-batch while that brings the
    two nearer.

    micro_batches: positions in `kept`, which are changed in place.
    """
    frames = np.array([kept[positions].sum() for positions in micro_batches])
    for _ in range(_MAX_SWAPS * len(micro_batches)):
        full, empty = int(frames.argmax()), int(frames.argmin())
        excess = frames[full] - frames[empty]
        if excess < 2 or not len(micro_batches[empty]):
            return

        # The pair of clips whose swap moves nearest to half of the excess.
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
    """Return each corpus's share of an epoch: its size to the power 1 / temperature.

    A temperature of 1 keeps the sizes, a higher one evens the corpora out. Source: mBART
    and M2M-100 (arXiv 2001.08210, 2010.11125).
    """
    raised = np.array(sizes, np.float64) ** (1 / temperature)
    return tuple((raised / raised.sum()).tolist())


def slices_of_rank(slices: int, rank: int, world_size: int) -> range:
    """Return the micro-batches that a rank computes, in order.

    Raises UserError if they cannot be dealt equally.
    """
    if slices % world_size:
        raise UserError(
            f"data.micro_batches must be a multiple of the number of ranks ({world_size}), "
            f"but is {slices}. Give "
            f"--data.micro_batches={-(-slices // world_size) * world_size}, or other ranks."
        )
    each = slices // world_size
    return range(rank * each, (rank + 1) * each)
