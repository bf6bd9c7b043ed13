"""The order of an epoch as a pure function: which clips form which step, before a byte is read.

Shards are shuffled, windows of shards mixed, clips bucketed by length and cut into global batches; a global
batch is dealt into `slices` micro-batches of nearly equal frames. Rank r of a world of W takes the slices
r*slices/W to (r+1)*slices/W, so 1 rank x 4 micro-batches and 2 x 2 see the same micro-batches, and every
rank has the same number of steps.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from flallm_ds.errors import UserError

VERSION = 4
# Batches that are bucketed by length together: more pad less, fewer mix better. Small corpora take the least.
POOL_BATCHES = (8, 64)
EPOCH_POOLS = 32  # that an epoch should have at least, before its pools grow
WINDOW_SHARDS = 16  # shards whose clips are mixed
_JITTER = 0.1  # of a length, so that neighbours in length are not the same in every epoch


@dataclass(frozen=True)
class PlanState:
    """Where a run is in its data, as a few plain values; enough to go on to the bit, at any world size.

    batch_frames is 0 where `batch_clips` cuts the batches; weights are empty where every clip counts alike.
    features: the digest of cached features, empty for video.
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
        mine, its = asdict(self), asdict(other)
        for name in (f.name for f in fields(self) if f.name not in ("epoch", "step")):
            if mine[name] != its[name]:
                raise UserError(
                    f"the data's {name} must be {its[name]!r} as in the checkpoint, but is {mine[name]!r} "
                    "now. Use the shards and options the run began with, or start another run folder."
                )

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "PlanState":
        """From what `asdict` gave and JSON kept. Raises UserError where another version wrote it."""
        names = {f.name for f in fields(cls)}
        if set(saved) != names:
            raise UserError(
                f"the data's version must be {VERSION}, but the checkpoint's is {saved.get('version')}. "
                "Start another run folder, or go on with the version of flallm_ds that began the run."
            )
        return cls(**saved | {"weights": tuple(saved["weights"])})


@dataclass(frozen=True)
class EpochPlan:
    """One epoch as places: `order[p]` is the clip (row of the index) at place p; `ends[i]` closes batch i.

    passes[p] is how often that clip came before: its random draws come from there. It is the epoch, unless
    corpora are mixed by weights. num_kept: kept frames of each clip of the index.
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
        """The clips (rows of the index) of a global batch."""
        return self.order[self._begin(step) : self.ends[step]]

    def slices_of(self, step: int) -> list[np.ndarray]:
        """The clips (rows of the index) of each micro-batch of a step."""
        return [self.order[places] for places in self.places_of(step)]

    def places_of(self, step: int) -> list[np.ndarray]:
        """The batch dealt into micro-batches, as places; with fewer clips than slices some are empty.

        Dealt there and back again by length, then evened out by swaps: ranks wait for the fullest one.
        """
        kept = self.num_kept[self.batch(step)]
        place = np.arange(len(kept))
        lane = place % self.slices
        lane = np.where(place // self.slices % 2 == 0, lane, self.slices - 1 - lane)
        by_length = np.argsort(-kept, kind="stable")
        lanes = [by_length[lane == s] for s in range(self.slices)]
        _even_out(lanes, kept)
        return [self._begin(step) + lane for lane in lanes]

    def _begin(self, step: int) -> int:
        return int(self.ends[step - 1]) if step else 0


@dataclass(frozen=True)
class Plan:
    """All epochs of a run over one split.

    num_kept: kept frames of each clip, int (clips,). shard: each clip's shard, int (clips,).
    batch_clips: clips of a global batch at most. batch_frames: kept frames of a global batch at most,
    instead; a clip with more is a batch of its own.
    corpus, weights: each clip's corpus, int (clips,), and each corpus's share of an epoch; without weights an
    epoch holds every clip once. features: their digest, for the state; the order is that of the video.
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
        """Training order: shuffled anew each epoch; without weights every clip exactly once."""
        rows, passes = self._drawn(epoch)
        num = len(rows)
        rng = self._rng(epoch)
        window_of_shard = rng.permutation(int(self.shard.max()) + 1).astype(np.int32) // WINDOW_SHARDS
        # Stable sorts: others leave equal keys in an order that depends on the processor.
        mixed = np.argsort(window_of_shard[self.shard[rows]] + rng.random(num), kind="stable")
        kept = self.num_kept[rows[mixed]].astype(np.float32)
        pool = self._pools(kept)
        # Up in one pool and down in the next: a batch that two pools share is of one length, too.
        length = kept * (1 + _JITTER * rng.random(num, np.float32)) * (1 - 2 * (pool % 2)).astype(np.float32)
        length /= 4 * np.abs(length).max()  # so that it orders within a pool alone
        places = mixed[np.argsort(pool + length, kind="stable")]
        ends = self._cut(self.num_kept[rows[places]])
        begins = np.concatenate([[0], ends[:-1]])
        batch_order = np.lexsort((rng.random(len(ends)), pool[begins]))
        sizes = (ends - begins)[batch_order]
        ends = np.cumsum(sizes)
        places = places[np.repeat(begins[batch_order] - (ends - sizes), sizes) + np.arange(num)]
        return EpochPlan(rows[places], passes[places], ends, self.num_kept, self.slices)

    def in_length_order(self) -> EpochPlan:
        """Evaluation order: every clip exactly once, longest first, so that padding and waiting are least."""
        order = np.argsort(-self.num_kept, kind="stable")
        return EpochPlan(
            order, np.zeros_like(order), self._cut(self.num_kept[order]), self.num_kept, self.slices
        )

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what, int(self.fingerprint, 16)])

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of an epoch, before any shuffling; how often each came before).

        With weights, a corpus gives a fixed number of clips to each epoch, taken one after another from an
        endless row of its own shuffles: over the epochs all its clips come equally often.
        """
        num = len(self.num_kept)
        if not self.weights:
            return np.arange(num, dtype=np.int32), np.full(num, epoch, np.int32)
        rows, passes = [], []
        for number, quota in enumerate(self.quotas):
            own = np.flatnonzero(self._corpus == number).astype(np.int32)
            turns = np.arange(epoch * quota, (epoch + 1) * quota)
            for n in range(epoch * quota // len(own), -(-(epoch + 1) * quota // len(own))):
                shuffled = self._rng(n, number, 1).permutation(own)
                chosen = turns[turns // len(own) == n] % len(own)
                rows.append(shuffled[chosen])
                passes.append(np.full(len(chosen), n, np.int32))
        return np.concatenate(rows), np.concatenate(passes)

    @cached_property
    def quotas(self) -> list[int]:
        """Clips that each corpus gives to an epoch; their sum is the number of all clips."""
        shares = np.array(self.weights) / sum(self.weights)
        ends = np.rint(np.cumsum(shares) * len(self.num_kept)).astype(int)
        return [int(n) for n in np.diff(ends, prepend=0)]

    @property
    def _corpus(self) -> np.ndarray:
        return np.zeros(len(self.num_kept), np.int32) if self.corpus is None else self.corpus

    def _pools(self, kept: np.ndarray) -> np.ndarray:
        """For each place of the mixed order the pool in which it is bucketed by length."""
        if self.batch_frames:
            batch = (np.cumsum(kept, dtype=np.float64) / self.batch_frames).astype(np.int32)
        else:
            num_batches = -(-len(kept) // self.batch_clips)
            batch = (np.arange(len(kept)) * num_batches // len(kept)).astype(np.int32)
        num_batches = int(batch[-1]) + 1
        num_pools = -(-num_batches // int(np.clip(num_batches // EPOCH_POOLS, *POOL_BATCHES)))
        return (np.arange(num_batches, dtype=np.int32) * num_pools // num_batches)[batch]

    def _cut(self, kept: np.ndarray) -> np.ndarray:
        """Where each global batch of this order ends.

        With batch_clips the remainder is spread, in units that up to 64 slices share equally, so that none of
        them has a clip more to do. With batch_frames, each batch has as many clips for each slice.
        """
        if not self.batch_frames:
            unit = math.gcd(self.batch_clips, 64)
            num_units, num_batches = -(-len(kept) // unit), -(-len(kept) // self.batch_clips)
            return np.minimum(np.arange(1, num_batches + 1) * num_units // num_batches * unit, len(kept))
        sums = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
        ends: list[int] = []
        begin = 0
        while begin < len(kept):
            end = max(int(sums.searchsorted(sums[begin] + self.batch_frames, "right")) - 1, begin + 1)
            if end < len(kept) and end - begin > self.slices:
                end -= (end - begin) % self.slices
            ends.append(end)
            begin = end
        return np.array(ends)


def _even_out(lanes: list[np.ndarray], kept: np.ndarray) -> None:
    """Swap clips between the fullest and the emptiest lane while that brings the two nearer."""
    loads = np.array([kept[lane].sum() for lane in lanes])
    for _ in range(8 * len(lanes)):
        high, low = int(loads.argmax()), int(loads.argmin())
        excess = loads[high] - loads[low]
        if excess < 2 or not len(lanes[low]):
            return
        gain = kept[lanes[high]][:, None] - kept[lanes[low]][None, :]
        i, j = np.unravel_index(np.abs(2 * gain - excess).argmin(), gain.shape)
        moved = gain[i, j]
        if not 0 < moved < excess:
            return
        lanes[high][i], lanes[low][j] = lanes[low][j], lanes[high][i]
        loads[high] -= moved
        loads[low] += moved


def temperature_weights(sizes: list[int], temperature: float) -> tuple[float, ...]:
    """Each corpus's share of an epoch: its size to the power 1 / temperature.

    1 keeps the sizes, higher evens corpora out. Source: mBART and M2M-100 (arXiv 2001.08210, 2010.11125).
    """
    raised = np.array(sizes, np.float64) ** (1 / temperature)
    return tuple((raised / raised.sum()).tolist())


def slices_of_rank(slices: int, rank: int, world_size: int) -> range:
    """The micro-batches that a rank computes, in order. Raises UserError if they cannot be dealt equally."""
    if slices % world_size:
        raise UserError(
            f"data.micro_batches must be a multiple of the number of ranks ({world_size}), but is {slices}. "
            f"Give --data.micro_batches={-(-slices // world_size) * world_size}, or other ranks."
        )
    each = slices // world_size
    return range(rank * each, (rank + 1) * each)
