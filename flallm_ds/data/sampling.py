"""Which frames of a clip are kept, decided before any is decoded."""

import numpy as np


def keep_every(num_frames: int, stride: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Indices of the kept frames, one of each group of `stride`: ceil(num_frames / stride) of them.

    rng: None takes the first of each group (evaluation), a generator a random one (training).
    Raises ValueError if stride < 1 or num_frames < 1.
    Source: FLa-LLM (arXiv 2403.12556), video downsampling; the random pick from C2RL.
    """
    if stride < 1 or num_frames < 1:
        raise ValueError(f"stride and num_frames must be at least 1, but are {stride} and {num_frames}")
    starts = np.arange(0, num_frames, stride)
    if rng is None:
        return starts
    group_sizes = np.minimum(stride, num_frames - starts)
    return starts + (rng.random(len(starts)) * group_sizes).astype(np.int64)


def cap(indices: np.ndarray, max_frames: int) -> np.ndarray:
    """At most `max_frames` of the indices, spread evenly, the first included."""
    if len(indices) <= max_frames:
        return indices
    return indices[np.arange(max_frames) * len(indices) // max_frames]


def num_kept(num_frames: np.ndarray, stride: int, max_frames: int) -> np.ndarray:
    """How many frames `keep_every` and `cap` keep of clips of these lengths."""
    kept: np.ndarray = np.minimum(-(-num_frames // stride), max_frames)
    return kept


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whatever the rank, the worker or the past."""
    return np.random.default_rng([seed, epoch, sample])
