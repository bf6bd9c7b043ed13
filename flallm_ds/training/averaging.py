"""Read the mean of several checkpoints of a run, a few million elements at a time.

The mean is that of the fp32 master weights, before a cast to the precision of the engine.
Of LoRA adapters the two factors are averaged, because an export stores them apart.

Running means and variances of BatchNorm are averaged as the weights are. To a variance, the
variance of the means between checkpoints is not added: that would describe a mixture of the
models, while one averaged model has none of the shifts between them.
"""

from collections.abc import Sequence

import torch

from flallm_ds.training.fragment_files import FragmentReader
from flallm_ds.training.fragments import Key

CHUNK_ELEMENTS = 2**22  # 32 MiB in float64


class MeanReader:
    """Reads fragments as a FragmentReader does, averaged over checkpoints.

    readers: one for each checkpoint, the newest last. The memory is bounded for any number
    of checkpoints. The mean of equal values is the same value, bit for bit.
    """

    def __init__(self, readers: Sequence[FragmentReader]) -> None:
        self.readers = readers

    def read(self, key: Key, out: torch.Tensor) -> None:
        """Copy the mean of the elements of a key into `out`, which keeps its data type.

        Whole numbers, such as the batches that a BatchNorm counts, are those of the newest
        checkpoint. Raises ValueError if a checkpoint lacks an element of a parameter.
        """
        if not out.is_floating_point():
            self.readers[-1].read(key, out)
            return
        for begin in range(key.begin, key.end, CHUNK_ELEMENTS):
            end = min(begin + CHUNK_ELEMENTS, key.end)
            part = Key(key.kind, key.parameter, begin, end)
            self._read_mean(part, out.narrow(0, begin - key.begin, end - begin))

    def _read_mean(self, key: Key, out: torch.Tensor) -> None:
        # In float64 the sum of equal fp32 values is exact, and so is their mean.
        own = out.to(torch.float64, copy=True)
        self.readers[0].read(key, own)
        # Not added to zeros: -0.0 stays -0.0.
        total = own.clone()
        for reader in self.readers[1:]:
            reader.read(key, own)
            total += own
        out.copy_(total / len(self.readers))
