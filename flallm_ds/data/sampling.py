"""Choose the frames of a clip to keep, before any frame is decoded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Cap = Literal["uniform", "random", "segment"]
# Tolerance in frames: 25 frames a second at a target of 12.5 always give groups of two,
# despite rounding.
_EDGE = 1e-6


@dataclass(frozen=True)
class FrameSampling:
    """Keep one frame of each group of frames, and at most `max_frames` frames of a clip.

    keep_every: number of frames in a group.
    target_fps: use groups of 1 / target_fps seconds instead, so that corpora with 24, 25,
    30 and 50 frames a second have the same pace. A slower clip keeps all its frames.
    cap: how to select `max_frames` frames of a longer clip: `uniform` spaces them evenly,
    `random` draws them, `segment` takes one of each of `max_frames` equal segments.
    Evaluation draws nothing: there `random` is `uniform`, and `segment` takes the middle
    frames.

    Raises ValueError for values below their limits. Sources: FLa-LLM (arXiv 2403.12556),
    video downsampling; C2RL, the random frame of a group; TSN (arXiv 1608.00859), segments.
    """

    keep_every: int = 1
    max_frames: int = 512
    target_fps: float | None = None
    cap: Cap = "uniform"

    @classmethod
    def of(cls, options: object) -> "FrameSampling":
        """Read the sampling from options with the same names, as in `DataConfig`."""
        return cls(**{name: getattr(options, name) for name in SAMPLING_OPTIONS})

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "FrameSampling":
        """Read the sampling from stored settings; missing ones get their defaults."""
        stored = {}
        for name in SAMPLING_OPTIONS:
            if name in settings:
                stored[name] = settings[name]
        return cls(**stored)

    def settings(self) -> dict[str, Any]:
        """Return the fields in the order of exports and cached features."""
        return {
            "keep_every": self.keep_every,
            "target_fps": self.target_fps,
            "max_frames": self.max_frames,
            "cap": self.cap,
        }

    def has_types(self) -> bool:
        """Return whether each field has its type; a stored file may hold anything."""
        # A bool is an int to isinstance.
        are_counts = type(self.keep_every) is int and type(self.max_frames) is int
        is_cap = self.cap in get_args(Cap)
        return are_counts and is_cap and math.isfinite(self.target_fps or 1)

    @property
    def draws_nothing(self) -> bool:
        """Whether training keeps the same frames as evaluation."""
        return self.keep_every == 1 and self.target_fps is None and self.cap == "uniform"

    def __post_init__(self) -> None:
        has_rate = self.target_fps is None or self.target_fps > 0
        if self.keep_every < 1 or self.max_frames < 1 or not has_rate:
            raise ValueError(
                "keep_every and max_frames must be at least 1 and target_fps above 0, got "
                f"{self.keep_every}, {self.max_frames} and {self.target_fps}"
            )

    def stride(self, fps: float) -> float:
        """Return the number of frames in a group of a clip with this rate, at least 1."""
        if self.target_fps is None:
            return float(self.keep_every)
        return max(fps / self.target_fps, 1.0)

    def num_kept(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Return the number of kept frames of clips with these lengths and rates, int64."""
        groups = self._num_groups(num_frames, self._strides(fps)).astype(np.int64)
        kept: np.ndarray = np.minimum(groups, self.max_frames)
        return kept

    def rates(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Return the kept frames per second of clips with these lengths and rates, float64.

        The rate is lower for a clip that is reduced to `max_frames`.
        """
        strides = self._strides(fps)
        groups = self._num_groups(num_frames, strides)
        kept_share = np.minimum(1.0, self.max_frames / groups)
        rates: np.ndarray = np.asarray(fps, np.float64) / strides * kept_share
        return rates

    def _strides(self, fps: np.ndarray) -> np.ndarray:
        """Return `stride` of each clip, float64."""
        if self.target_fps is None:
            return np.full(np.shape(fps), float(self.keep_every))
        strides: np.ndarray = np.maximum(np.asarray(fps, np.float64) / self.target_fps, 1.0)
        return strides

    def _num_groups(self, num_frames: np.ndarray, strides: np.ndarray) -> np.ndarray:
        """Return the number of groups of clips, float64. The last group may be short."""
        # Group i begins at frame i * stride, rounded up; the last frame decides the number.
        groups: np.ndarray = np.floor((num_frames - 1 + _EDGE) / strides) + 1
        return groups

    def picks(
        self,
        num_frames: int,
        fps: float = 25.0,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Return the indices of the kept frames, ascending, int64.

        rng: random numbers to draw a frame of each group (training); None takes the first
        frame (evaluation). Raises ValueError if the clip has no frame.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")

        # The first frame of each group, followed by the end of the clip.
        stride = self.stride(fps)
        num_groups = int((num_frames - 1 + _EDGE) / stride) + 1
        bounds = np.ceil(np.arange(num_groups + 1) * stride - _EDGE)
        bounds[-1] = num_frames

        # One frame of each group. The last group may be shorter than the others.
        firsts = bounds[:-1]
        sizes = bounds[1:] - firsts
        chosen = firsts if rng is None else firsts + rng.random(num_groups) * sizes
        picks: np.ndarray = chosen.astype(np.int64)

        if num_groups > self.max_frames:
            picks = picks[self.thin(num_groups, rng)]
        return picks

    def keeps_first(self, frame: int, fps: float) -> bool:
        """Return whether evaluation keeps this frame, before the cap.

        Use it for a video of unknown length.
        """
        # The frame is kept if it is the first frame of its group.
        stride = self.stride(fps)
        group = int((frame + _EDGE) / stride)
        return math.ceil(group * stride - _EDGE) == frame

    def thin(self, num: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return at most `max_frames` indices below `num`, ascending."""
        if num <= self.max_frames:
            return np.arange(num)
        # `max_frames` segments, equal up to rounding.
        bounds = np.arange(self.max_frames + 1) * num // self.max_frames
        begins, ends = bounds[:-1], bounds[1:]
        if self.cap == "uniform" or (self.cap == "random" and rng is None):
            return begins
        if rng is None:
            return (begins + ends - 1) // 2
        if self.cap == "random":
            return np.sort(rng.choice(num, self.max_frames, replace=False))
        within_segment = rng.random(self.max_frames) * (ends - begins)
        return begins + within_segment.astype(np.int64)


# Names of the fields; the options data.NAME of a run have the same names.
SAMPLING_OPTIONS = tuple(FrameSampling().settings())


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the random numbers of a sample in an epoch.

    They depend on nothing else: rank, thread and earlier batches do not matter.
    """
    return np.random.default_rng([seed, epoch, sample])
