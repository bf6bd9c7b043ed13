"""Which frames of a clip are kept, decided before any is decoded."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Cap = Literal["uniform", "random", "segment"]
_EDGE = 1e-6  # of a frame: 25 frames a second at a target of 12.5 are groups of two, whatever the rounding


@dataclass(frozen=True)
class FrameSampling:
    """One frame of each group is kept, then at most `max_frames` of these.

    keep_every: frames of a group. target_fps: groups of 1 / target_fps seconds instead, so that corpora of
    24, 25, 30 and 50 frames a second are seen at the same pace; a slower clip keeps all its frames.
    cap: how too many are thinned: `uniform` spreads them evenly; `random` draws any of them; `segment` takes
    one of each of `max_frames` equal segments. In evaluation nothing is drawn: `random` is then `uniform`,
    and `segment` takes the middle of each.
    Source: FLa-LLM (arXiv 2403.12556), video downsampling; the random pick from C2RL; segments from TSN
    (arXiv 1608.00859).
    """

    keep_every: int = 1
    max_frames: int = 512
    target_fps: float | None = None
    cap: Cap = "uniform"

    def __post_init__(self) -> None:
        if (
            self.keep_every < 1
            or self.max_frames < 1
            or (self.target_fps is not None and self.target_fps <= 0)
        ):
            raise ValueError(
                "keep_every and max_frames must be at least 1 and target_fps above 0, but are "
                f"{self.keep_every}, {self.max_frames} and {self.target_fps}"
            )

    def stride(self, fps: float) -> float:
        """Frames of a group: at least 1."""
        return float(self.keep_every) if self.target_fps is None else max(fps / self.target_fps, 1.0)

    def num_kept(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """How many frames are kept of clips of these lengths and rates, int64."""
        strides: np.ndarray | float = float(self.keep_every)
        if self.target_fps is not None:
            strides = np.maximum(np.asarray(fps, np.float64) / self.target_fps, 1.0)
        groups = np.floor((num_frames - 1 + _EDGE) / strides).astype(np.int64) + 1
        kept: np.ndarray = np.minimum(groups, self.max_frames)
        return kept

    def rates(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Kept frames a second of clips of these lengths and rates, float64; fewer where they are thinned."""
        fps = np.asarray(fps, np.float64)
        strides = self.keep_every if self.target_fps is None else np.maximum(fps / self.target_fps, 1.0)
        groups = np.floor((num_frames - 1 + _EDGE) / strides) + 1
        rates: np.ndarray = fps / strides * np.minimum(1.0, self.max_frames / groups)
        return rates

    def picks(self, num_frames: int, fps: float = 25.0, rng: np.random.Generator | None = None) -> np.ndarray:
        """Indices of the kept frames, ascending, int64.

        rng: None takes the first of each group (evaluation), a generator a random one (training).
        Raises ValueError if there is no frame.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, but is {num_frames}")
        stride = self.stride(fps)
        num_groups = int((num_frames - 1 + _EDGE) / stride) + 1
        starts = np.ceil(np.arange(num_groups + 1) * stride - _EDGE)
        starts[-1] = num_frames
        kept = starts[:-1]
        if rng is not None:
            kept = kept + rng.random(num_groups) * (starts[1:] - kept)
        picks: np.ndarray = kept.astype(np.int64)
        return picks if num_groups <= self.max_frames else picks[self.thin(num_groups, rng)]

    def keeps_first(self, frame: int, fps: float) -> bool:
        """Whether evaluation keeps this frame before the cap: for a video whose length is not known yet."""
        stride = self.stride(fps)
        return math.ceil(int((frame + _EDGE) / stride) * stride - _EDGE) == frame

    def thin(self, num: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """At most `max_frames` places of `num`, ascending."""
        if num <= self.max_frames:
            return np.arange(num)
        begins = np.arange(self.max_frames + 1) * num // self.max_frames
        if self.cap == "uniform" or (self.cap == "random" and rng is None):
            return begins[:-1]
        if rng is None:
            return (begins[:-1] + begins[1:] - 1) // 2
        if self.cap == "random":
            return np.sort(rng.choice(num, self.max_frames, replace=False))
        return begins[:-1] + (rng.random(self.max_frames) * np.diff(begins)).astype(np.int64)


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whatever the rank, the worker or the past."""
    return np.random.default_rng([seed, epoch, sample])
