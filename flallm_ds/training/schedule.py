"""The learning-rate schedule: a pure function of how much of the run is done."""

import math


def lr_factor(progress: float, warmup: float) -> float:
    """Return the factor of the learning rates: a linear rise, then a cosine to 0.

    progress: fraction of the run that is done, in [0, 1]. warmup: fraction that the rise
    takes.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
