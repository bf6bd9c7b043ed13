"""The order of an epoch as a pure function: which clips form which step, before a byte is read.

Shards are shuffled, windows of shards mixed, clips bucketed by length and cut into global batches; a global
batch is dealt into `slices` micro-batches of nearly equal frames. Rank r of a world of W takes the slices
r*slices/W to (r+1)*slices/W, so 1 rank x 4 micro-batches and 2 x 2 see the same micro-batches, and every
rank has the same number of steps.
"""

from dataclasses import asdict, dataclass

import numpy as np

from flallm_ds.errors import UserError

VERSION = 2
POOL_BATCHES = 8  # batches that are bucketed by length together: more pad less, fewer mix better
WINDOW_SHARDS = 16  # shards whose clips are mixed


@dataclass(frozen=True)
class PlanState:
    """Where a run is in its data, as a few plain values; enough to go on to the bit."""

    version: int
    fingerprint: str
    seed: int
    batch_clips: int
    slices: int
    epoch: int
    step: int

    def check_same_plan(self, other: "PlanState") -> None:
        """Raise UserError that says what differs if `other` belongs to another plan."""
        mine, its = asdict(self), asdict(other)
        for name in ("version", "fingerprint", "seed", "batch_clips", "slices"):
            if mine[name] != its[name]:
                raise UserError(
                    f"the data's {name} must be {its[name]!r} as in the checkpoint, but is {mine[name]!r} "
                    "now. Use the shards and options the run began with, or start another run folder."
                )


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: `order` lists every clip once; `ends[i]` closes global batch i."""

    order: np.ndarray
    ends: np.ndarray
    num_kept: np.ndarray
    slices: int

    @property
    def num_steps(self) -> int:
        return len(self.ends)

    def batch(self, step: int) -> np.ndarray:
        """The clips (rows of the index) of a global batch."""
        return self.order[self.ends[step - 1] if step else 0 : self.ends[step]]

    def slices_of(self, step: int) -> list[np.ndarray]:
        """The batch dealt into micro-batches; some are empty where there are fewer clips than slices."""
        clips = self.batch(step)
        by_length = clips[np.argsort(-self.num_kept[clips], kind="stable")]
        place = np.arange(len(clips))
        lane = place % self.slices
        lane = np.where(place // self.slices % 2 == 0, lane, self.slices - 1 - lane)  # there and back again
        return [by_length[lane == s] for s in range(self.slices)]


@dataclass(frozen=True)
class Plan:
    """All epochs of a run over one split.

    num_kept: kept frames of each clip, int (clips,). shard: each clip's shard, int (clips,).
    """

    fingerprint: str
    num_kept: np.ndarray
    shard: np.ndarray
    seed: int
    batch_clips: int
    slices: int

    def state(self, epoch: int, step: int) -> PlanState:
        return PlanState(VERSION, self.fingerprint, self.seed, self.batch_clips, self.slices, epoch, step)

    def epoch(self, epoch: int) -> EpochPlan:
        """Training order: every clip exactly once, shuffled anew each epoch."""
        num = len(self.num_kept)
        rng = np.random.default_rng([self.seed, epoch, int(self.fingerprint, 16)])
        window_of_shard = rng.permutation(int(self.shard.max()) + 1) // WINDOW_SHARDS
        mixed = np.lexsort((rng.random(num), window_of_shard[self.shard]))
        place = np.arange(num)
        pool = place // (POOL_BATCHES * self.batch_clips)
        jitter = 1 + 0.1 * rng.random(num)  # so that neighbours in length are not the same in every epoch
        bucketed = mixed[np.lexsort((self.num_kept[mixed] * jitter, pool))]
        batch = place // self.batch_clips
        batch_order = np.lexsort((rng.random(batch[-1] + 1), np.arange(batch[-1] + 1) // POOL_BATCHES))
        sizes = np.bincount(batch)[batch_order]
        ends = np.cumsum(sizes)
        begins = batch_order * self.batch_clips
        order = bucketed[np.repeat(begins - (ends - sizes), sizes) + place]
        return EpochPlan(order, ends, self.num_kept, self.slices)

    def in_length_order(self) -> EpochPlan:
        """Evaluation order: every clip exactly once, longest first, so that padding and waiting are least."""
        order = np.argsort(-self.num_kept, kind="stable")
        ends = np.minimum(np.arange(1, -(-len(order) // self.batch_clips) + 1) * self.batch_clips, len(order))
        return EpochPlan(order, ends, self.num_kept, self.slices)


def slices_of_rank(slices: int, rank: int, world_size: int) -> range:
    """The micro-batches that a rank computes, in order. Raises UserError if they cannot be dealt equally."""
    if slices % world_size:
        raise UserError(
            f"data.micro_batches must be a multiple of the number of ranks ({world_size}), but is {slices}. "
            f"Give --data.micro_batches={-(-slices // world_size) * world_size}, or other ranks."
        )
    each = slices // world_size
    return range(rank * each, (rank + 1) * each)
