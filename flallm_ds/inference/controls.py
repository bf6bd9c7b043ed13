"""Change the videos of a batch for the controls of an evaluation."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from flallm_ds.batch import Batch
from flallm_ds.metrics.controls import BLANK, SHUFFLED_FRAMES

GRAY = 128


def with_shuffled_frames(batch: Batch) -> Batch:
    """Return the batch with the frames or features of each clip in random order.

    The order depends on the clip alone, so that it is the same on any number of ranks.
    """
    order_N = np.empty(len(batch.content), np.int64)
    begin = 0
    for key, num_frames in zip(batch.keys, batch.num_frames_B.tolist(), strict=True):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        permutation = np.random.default_rng(seed).permutation(num_frames)
        order_N[begin : begin + num_frames] = begin + permutation
        begin += num_frames
    content = batch.content
    return batch.with_content(content[torch.from_numpy(order_N).to(content.device)])


def with_blank_frames(batch: Batch) -> Batch:
    """Return the batch with gray frames, or with features of 0."""
    content = batch.content
    value = GRAY if content.dtype == torch.uint8 else 0
    return batch.with_content(torch.full_like(content, value))


# Controls that search again, with the change of each batch.
CHANGES: dict[str, Callable[[Batch], Batch]] = {
    SHUFFLED_FRAMES: with_shuffled_frames,
    BLANK: with_blank_frames,
}
