"""BatchNorm statistics that depend on the global batch alone, not on the number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from flallm_ds.dist import World


class KeptStatistics:
    """Checks that frozen BatchNorm modules keep their statistics.

    Re-implementations of this method are known for "frozen" BatchNorm modules that still
    update their running statistics.

    module: in train mode; its BatchNorm modules in eval mode are the frozen ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [norm for norm in batch_norms(module) if not norm.training]
        self._before = list(map(torch.clone, _statistics(self.norms)))

    def check(self) -> None:
        """Assert that the modules are in eval mode and no statistic has changed."""
        assert not any(norm.training for norm in self.norms), (
            "a frozen BatchNorm is in train mode"
        )
        for before, now in zip(self._before, _statistics(self.norms), strict=True):
            assert torch.equal(before, now), "a frozen BatchNorm changed"


def batch_norms(module: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Return the BatchNorm modules with running statistics."""
    norms = []
    for part in module.modules():
        kinds = nn.BatchNorm1d | nn.BatchNorm2d
        if isinstance(part, kinds) and part.running_mean is not None:
            norms.append(part)
    return norms


def _statistics(norms: list[nn.BatchNorm1d | nn.BatchNorm2d]) -> list[torch.Tensor]:
    """Return mean and variance of each module: two buffers per module."""
    statistics = []
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        statistics += [norm.running_mean, norm.running_var]
    return statistics


class BatchStatistics:
    """Averages the BatchNorm statistics of a step: `with statistics:` around its forwards.

    DeepSpeed does not synchronise buffers, so the running statistics of the ranks would
    diverge. Here, the statistics are averaged over the micro-batches of all ranks and
    update the running statistics once, with the momentum of the BatchNorm module. So one
    rank with 4 micro-batches and two ranks with 2 each end with the same buffers.

    share: set by the caller in each step; the micro-batches of this rank, without dummies,
    as a multiple of the mean over the ranks.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self._all = batch_norms(module)
        self.norms = self._all
        self.world = world
        self.share = 1.0

    def __enter__(self) -> None:
        self.norms = [norm for norm in self._all if norm.training]  # without frozen ones
        self._before = list(map(torch.clone, _statistics(self.norms)))
        self.momentum = []
        for norm in self.norms:
            self.momentum.append(0.1 if norm.momentum is None else norm.momentum)
            # With momentum None, the running statistics are the mean over the forwards.
            norm.reset_running_stats()
            norm.momentum = None

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

        # Update the earlier statistics with the mean of the step; after an error, restore
        # them.
        for place, (buffer, before) in enumerate(zip(buffers, self._before, strict=True)):
            momentum = self.momentum[place // 2]  # a module has two buffers
            buffer.copy_(torch.lerp(before, buffer, momentum) if kind is None else before)

    @contextmanager
    def ignored(self, is_dummy: bool) -> Iterator[None]:
        """Leave the statistics unchanged by a dummy batch, in forward and backward pass."""
        if not is_dummy:
            yield
            return
        buffers = []
        for norm in self.norms:
            assert norm.num_batches_tracked is not None
            buffers += [*_statistics([norm]), norm.num_batches_tracked]
        before = list(map(torch.clone, buffers))
        yield
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    def _average(self, buffers: list[torch.Tensor]) -> None:
        """Replace buffers by their mean over the micro-batches of all ranks, with one
        all-reduce."""
        flat = torch.cat(list(map(torch.flatten, buffers))) * self.share
        dist.all_reduce(flat)
        flat.div_(self.world.size)
        sizes = list(map(torch.numel, buffers))
        for buffer, mean in zip(buffers, torch.split(flat, sizes), strict=True):
            buffer.copy_(mean)
