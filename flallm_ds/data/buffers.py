"""Memory for frames or features that is used again and again: fresh memory costs a page fault each 4 kB."""

import sys

import numpy as np
import torch

_UNHELD = 2  # references to a buffer that nobody holds: this list's, and the argument of getrefcount


class FrameBuffers:
    """Hands out tensors and takes their memory back once nobody refers to it any more.

    A tensor from here may be kept as long as anyone likes: every view of it holds its buffer. Pinned where
    there is a GPU, so that copies to it run beside everything else. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._buffers)

    def take(self, shape: tuple[int, ...], dtype: str = "uint8") -> torch.Tensor:
        """A tensor of this shape whose content is whatever was there before."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = [n for n in range(len(self._buffers)) if sys.getrefcount(self._buffers[n]) == _UNHELD]
        fitting = [n for n in free if len(self._buffers[n]) >= size]
        if fitting:
            chosen = min(fitting, key=lambda n: len(self._buffers[n]))
        else:  # the largest free one gives way to a larger one
            chosen = max(free, key=lambda n: len(self._buffers[n]), default=len(self._buffers))
            self._buffers[chosen : chosen + 1] = []
            memory = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._buffers.insert(chosen, memory.numpy())
        return torch.from_numpy(self._buffers[chosen][:size].view(dtype).reshape(shape))
