"""Takes the batches of each step from the loader; problems of one rank become those of all."""

import time
from collections.abc import Iterator

from torch.profiler import record_function

from flallm_ds.batch import Batch
from flallm_ds.data.loader import BrokenClips
from flallm_ds.dist import World, gather_objects
from flallm_ds.errors import RankError, SharedRankError, UserError


class Intake:
    """Gets batches, and keeps what the other ranks must hear of in the next collective.

    broken: the broken clips of the split; their budget counts over all ranks.
    """

    def __init__(self, broken: BrokenClips, world: World) -> None:
        self.broken, self.world = broken, world
        self._problem: str | None = None

    def take(self, steps: Iterator[list[Batch]]) -> tuple[list[Batch], float]:
        """Return the micro-batches of the next step, and the seconds until they were there.

        An error of the data is kept for `share_news`, and there are no micro-batches.
        """
        begin = time.perf_counter()
        batches: list[Batch] = []
        try:
            with record_function("data loading"):
                batches = next(steps)
        except UserError as error:
            self._problem = str(error)
        return batches, time.perf_counter() - begin

    @property
    def has_news(self) -> bool:
        """Whether this rank knows of a problem that the others may not know of."""
        return self._problem is not None or self.broken.num_new > 0

    def share_news(self) -> None:
        """Share news of all ranks. Every rank must call this if one of them has news.

        Raises UserError on every rank if more clips are broken on all ranks together than
        the budget allows, SharedRankError if a rank cannot load its data.
        """
        news = gather_objects((self._problem, self.broken.reasons), self.world)
        self.broken.share(reasons for _, reasons in news)
        try:
            self.broken.check()
        except RankError as error:
            raise UserError(str(error)) from error
        for problem, _ in news:
            if problem is not None:
                raise SharedRankError(problem)
