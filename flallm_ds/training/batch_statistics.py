"""BatchNorm statistics as a pure function of the global batch, whatever the number of ranks."""

from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from flallm_ds.dist import World


class BatchStatistics:
    """`with statistics:` around the forwards of one step.

    DeepSpeed never synchronises buffers, so running statistics would drift apart between ranks. Here the
    statistics of a step's micro-batches are averaged over micro-batches and ranks and enter the running
    statistics once, with BatchNorm's momentum: 1 rank x 4 micro-batches and 2 x 2 leave the same buffers.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
        self._all = [m for m in module.modules() if isinstance(m, kinds) and m.running_mean is not None]
        self.norms = self._all
        self.world = world

    def _buffers(self) -> list[torch.Tensor]:
        return [b for m in self.norms for b in (m.running_mean, m.running_var) if b is not None]

    def __enter__(self) -> None:
        self.norms = [m for m in self._all if m.training]  # a frozen one keeps its statistics
        self.momentum = [m.momentum if m.momentum is not None else 0.1 for m in self.norms]
        self._before = [b.clone() for b in self._buffers()]
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # running statistics are now the mean over the forwards

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        buffers = self._buffers()
        if buffers and kind is None and self.world.size > 1:
            flat = torch.cat([b.flatten() for b in buffers])
            dist.all_reduce(flat)
            for buffer, mean in zip(
                buffers, torch.split(flat.div_(self.world.size), [b.numel() for b in buffers]), strict=True
            ):
                buffer.copy_(mean)
        for place, norm in enumerate(self.norms):
            norm.momentum = self.momentum[place]
            for buffer, before in zip(
                buffers[2 * place :], self._before[2 * place : 2 * place + 2], strict=False
            ):
                buffer.copy_(torch.lerp(before, buffer, self.momentum[place]) if kind is None else before)
