"""Which frames of a clip are kept, decided before any is decoded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Cap = Literal["uniform", "random", "segment"]
# Of a frame: 25 frames a second at a target of 12.5 are groups of two, whatever the
# rounding.
_EDGE = 1e-6


@dataclass(frozen=True)
class FrameSampling:
    """Keeps one frame of each group, then at most `max_frames` of these.

    keep_every: frames of a group. target_fps: groups of 1 / target_fps seconds instead,
    so that corpora of 24, 25, 30 and 50 frames a second are seen at the same pace; a
    slower clip keeps all its frames. cap: how the frames are thinned where there are too
    many: `uniform` spreads them evenly; `random` draws any of them; `segment` takes one
    of each of `max_frames` equal segments. In evaluation nothing is drawn: `random` is
    then `uniform`, and `segment` takes the middle of each. Raises ValueError for values
    below their limits. Source: FLa-LLM (arXiv 2403.12556), video downsampling; the random
    pick from C2RL; segments from TSN (arXiv 1608.00859).
    """

    keep_every: int = 1
    max_frames: int = 512
    target_fps: float | None = None
    cap: Cap = "uniform"

    @classmethod
    def of(cls, options: object) -> "FrameSampling":
        """Read the sampling from options with the same names, such as `config.DataConfig`."""
        return cls(**{name: getattr(options, name) for name in SAMPLING_OPTIONS})

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "FrameSampling":
        """Read the sampling from stored settings; what an older file lacks has its default."""
        stored = {}
        for name in SAMPLING_OPTIONS:
            if name in settings:
                stored[name] = settings[name]
        return cls(**stored)

    def settings(self) -> dict[str, Any]:
        """Return the fields as exports and features store them, in their order in the file."""
        return {
            "keep_every": self.keep_every,
            "target_fps": self.target_fps,
            "max_frames": self.max_frames,
            "cap": self.cap,
        }

    def has_types(self) -> bool:
        """Say whether each field is of its type, which a file may not respect."""
        # A bool is an int to isinstance.
        are_counts = type(self.keep_every) is int and type(self.max_frames) is int
        is_cap = self.cap in get_args(Cap)
        return are_counts and is_cap and math.isfinite(self.target_fps or 1)

    @property
    def draws_nothing(self) -> bool:
        """Whether training keeps the frames that evaluation keeps."""
        return self.keep_every == 1 and self.target_fps is None and self.cap == "uniform"

    def __post_init__(self) -> None:
        has_rate = self.target_fps is None or self.target_fps > 0
        if self.keep_every < 1 or self.max_frames < 1 or not has_rate:
            raise ValueError(
                "keep_every and max_frames must be at least 1 and target_fps above 0, but "
                f"are {self.keep_every}, {self.max_frames} and {self.target_fps}"
            )

    def stride(self, fps: float) -> float:
        """Return the frames of a group in a clip of this rate, at least 1."""
        if self.target_fps is None:
            return float(self.keep_every)
        return max(fps / self.target_fps, 1.0)

    def num_kept(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Return how many frames are kept of clips of these lengths and rates, int64."""
        groups = self._num_groups(num_frames, self._strides(fps)).astype(np.int64)
        kept: np.ndarray = np.minimum(groups, self.max_frames)
        return kept

    def rates(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Return the kept frames a second of clips of these lengths and rates, float64.

        A clip that `max_frames` thins has fewer a second than the others.
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
        """Return how many groups clips of these lengths have, float64. The last may be short."""
        groups: np.ndarray = np.floor((num_frames - 1 + _EDGE) / strides) + 1
        return groups

    def picks(
        self,
        num_frames: int,
        fps: float = 25.0,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Return the indices of the kept frames, ascending, int64.

        rng: None takes the first of each group (evaluation), a generator a random one
        (training). Raises ValueError if there is no frame.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, but is {num_frames}")

        # Where each group begins, and behind the last one the end of the clip.
        stride = self.stride(fps)
        num_groups = int((num_frames - 1 + _EDGE) / stride) + 1
        bounds = np.ceil(np.arange(num_groups + 1) * stride - _EDGE)
        bounds[-1] = num_frames

        # One frame of each group.
        firsts = bounds[:-1]
        sizes = bounds[1:] - firsts
        chosen = firsts if rng is None else firsts + rng.random(num_groups) * sizes
        picks: np.ndarray = chosen.astype(np.int64)

        if num_groups > self.max_frames:
            picks = picks[self.thin(num_groups, rng)]
        return picks

    def keeps_first(self, frame: int, fps: float) -> bool:
        """Say whether evaluation keeps this frame before the cap.

        It serves a video whose length is not known yet.
        """
        stride = self.stride(fps)
        group = int((frame + _EDGE) / stride)
        return math.ceil(group * stride - _EDGE) == frame

    def thin(self, num: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return at most `max_frames` places of `num`, ascending."""
        if num <= self.max_frames:
            return np.arange(num)
        # `max_frames` equal segments, up to rounding.
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


# The options of a run (data.NAME) that a sampling is made of.
SAMPLING_OPTIONS = tuple(FrameSampling().settings())


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the random numbers of one sample in one epoch, for any rank, worker and past."""
    return np.random.default_rng([seed, epoch, sample])
