"""BatchNorm statistics as a pure function of the global batch, whatever the number of ranks."""

from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from flallm_ds.dist import World


class KeptStatistics:
    """BatchNorm modules that stay in eval mode while the module trains, and their statistics.

    "Frozen" BatchNorm that goes on counting is the known fault of this method's
    re-implementations.
    """

    def __init__(self, module: nn.Module) -> None:
        """module: in train mode."""
        self.norms = [m for m in batch_norms(module) if not m.training]
        self._before = [b.clone() for b in _statistics(self.norms)]

    def check(self) -> None:
        """Assert that nothing put them into train mode or changed a statistic."""
        assert not any(norm.training for norm in self.norms), (
            "a frozen BatchNorm is in train mode"
        )
        for before, now in zip(self._before, _statistics(self.norms), strict=True):
            assert torch.equal(before, now), "a frozen BatchNorm changed"


def batch_norms(module: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """List those with running statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [
        m for m in module.modules() if isinstance(m, kinds) and m.running_mean is not None
    ]


def _statistics(norms: list[nn.BatchNorm1d | nn.BatchNorm2d]) -> list[torch.Tensor]:
    """Mean and variance of each in turn."""
    statistics = []
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        statistics += [norm.running_mean, norm.running_var]
    return statistics


class BatchStatistics:
    """`with statistics:` around the forwards of one step.

    DeepSpeed never synchronises buffers, so running statistics would drift apart between
    ranks. Here the statistics of a step's micro-batches are averaged over micro-batches
    and ranks and enter the running statistics once, with BatchNorm's momentum: 1 rank x 4
    micro-batches and 2 x 2 leave the same buffers.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self._all = batch_norms(module)
        self.norms = self._all
        self.world = world

    def __enter__(self) -> None:
        # a frozen one keeps its statistics
        self.norms = [m for m in self._all if m.training]
        self.momentum = [m.momentum if m.momentum is not None else 0.1 for m in self.norms]
        self._before = [b.clone() for b in _statistics(self.norms)]
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # running statistics are now the mean over the forwards

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        buffers = _statistics(self.norms)
        if buffers and kind is None and self.world.size > 1:
            self._average(buffers)
        for norm, momentum in zip(self.norms, self.momentum, strict=True):
            norm.momentum = momentum

        # The mean of the step enters the statistics from before; after an error those
        # stand again.
        for place, (buffer, before) in enumerate(zip(buffers, self._before, strict=True)):
            momentum = self.momentum[place // 2]  # a module has two buffers
            buffer.copy_(torch.lerp(before, buffer, momentum) if kind is None else before)

    def _average(self, buffers: list[torch.Tensor]) -> None:
        """Replace buffers by their mean over the ranks, in one all-reduce."""
        flat = torch.cat([b.flatten() for b in buffers])
        dist.all_reduce(flat)
        flat.div_(self.world.size)
        sizes = [b.numel() for b in buffers]
        for buffer, mean in zip(buffers, torch.split(flat, sizes), strict=True):
            buffer.copy_(mean)
