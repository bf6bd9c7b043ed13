"""Read videos as clips, in the format of the training: whole, in spans, or in windows.

T kept frames, H x W pixels, C channels.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from flallm_ds.data.codecs.video import Video, measured_fps
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import UserError
from flallm_ds.inference.windows import WindowFinder

# A video of up to this length is one clip even if all training clips were shorter: a model
# tolerates somewhat longer clips better than a cut within a sentence.
LEAST_LIMIT_S = 10.0
# A span may end this much after the last frame: the times of subtitles are rounded.
_PAST_END_S = 0.5


@dataclass(frozen=True)
class Clip:
    """The kept frames of a video, or of a part of it.

    frames_THWC: uint8 RGB. rate: kept frames per second. num_sampled: number of frames that
    would be kept without the limit of the model, at least T. start_s, end_s: in the video.
    is_part: whether the clip is a window or a span of the video.
    """

    frames_THWC: np.ndarray
    rate: float
    num_sampled: int
    start_s: float
    end_s: float
    is_part: bool = False


@dataclass(frozen=True)
class ClipReader:
    """Reads clips as the training shards were built: size, frame rate, kept frames.

    short_side: of a frame, pixels. fps: rate to which a video is resampled first, if any.
    longest_s: the longest training clip in seconds; inf if it is not recorded.
    """

    sampling: FrameSampling
    short_side: int
    fps: float | None = None
    longest_s: float = inf

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "ClipReader":
        """Return the reader for the `frames` of flallm.json."""
        return cls(
            FrameSampling.of_settings(settings),
            settings["short_side"],
            settings.get("fps"),
            settings.get("longest_s") or inf,
        )

    def limit_s(self, fps: float) -> float:
        """Return the length of a video above which it is not one clip, in seconds."""
        sampled_s = self.sampling.max_frames * self.sampling.stride(fps) / fps
        return min(max(self.longest_s, LEAST_LIMIT_S), sampled_s)

    def read(
        self,
        path: Path,
        start_s: float | None = None,
        end_s: float | None = None,
        *,
        limited: bool = False,
    ) -> Clip | None:
        """Read a video, or the span with start_s <= time < end_s, as one clip.

        limited: return None for a video that is longer than `limit_s`. The memory is at most
        that of the frames which the model takes. Raises BrokenVideo as `Video.frames` does,
        and UserError for a span that ends after the video.
        """
        video = Video(path)
        num_frames = num_sampled = 0

        def keep(number: int) -> bool:
            nonlocal num_frames, num_sampled
            num_frames = number + 1
            is_sampled = self.sampling.keeps_first(number, self.fps or video.fps)
            num_sampled += is_sampled
            # Above the limit of the model, frames are only counted.
            return is_sampled and (limited or num_sampled <= self.sampling.max_frames)

        kept: list[np.ndarray] = []
        first_s = 0.0
        for frame in self._frames(video, start_s, end_s, keep):
            first_s = first_s if kept else video.time_s
            if limited and video.time_s - first_s >= self.limit_s(self.fps or video.fps):
                return None
            kept.append(frame)
        if video.past_end_s > _PAST_END_S:
            raise UserError(
                f"--spans must be within video {path}, got a span that ends at {end_s:g} s, "
                f"{video.past_end_s:.1f} s after its end. Correct the span."
            )
        fps = self.fps or video.fps
        if num_sampled > len(kept):
            # Which frames are kept depends on their number, which is known only now.
            kept.clear()
            picks = set(self.sampling.picks(num_frames, fps).tolist())
            kept.extend(self._frames(Video(path), start_s, end_s, picks.__contains__))
        (rate,) = self.sampling.rates(np.array([num_frames]), np.array([fps]))
        until_s = video.time_s + 1 / fps
        return Clip(np.stack(kept), float(rate), num_sampled, first_s, until_s)

    def _frames(
        self,
        video: Video,
        start_s: float | None,
        end_s: float | None,
        keep: Callable[[int], bool],
    ) -> Iterator[np.ndarray]:
        return video.frames(
            start_s, end_s, short_side=self.short_side, fps=self.fps, keep=keep
        )

    def windows(self, path: Path, idle_s: float | None = None) -> Iterator[Clip]:
        """Yield the windows between pauses as clips, while the video is decoded.

        idle_s: as of `Video`. The memory is at most that of the longest window: its kept
        frames, and all frames of four seconds. Raises BrokenVideo as `Video.frames` does.
        """
        video = Video(path, idle_s=idle_s)
        finder: WindowFinder | None = None
        buffer: _Buffer | None = None
        for frame in video.frames(short_side=self.short_side, fps=self.fps):
            if finder is None or buffer is None:
                fps = self.fps or video.fps
                finder = WindowFinder(self.limit_s(fps))
                buffer = _Buffer(self.sampling, fps)
            buffer.add(video.time_s, frame)
            for window in finder.add(video.time_s, frame):
                yield buffer.cut(window.start_s, window.end_s)
            buffer.settle(finder.start_s, finder.settled_s)
        assert finder is not None and buffer is not None, "a video has a frame"
        for window in finder.end(video.time_s + 1 / buffer.fps):
            yield buffer.cut(window.start_s, window.end_s)


class _Buffer:
    """The last frames of a video, of which windows are cut.

    Frames at which a window may still begin or end are all held; before, only those that
    the sampling keeps.
    """

    def __init__(self, sampling: FrameSampling, fps: float) -> None:
        self.fps = fps
        self._sampling = sampling
        self._recent: deque[tuple[float, np.ndarray]] = deque()
        self._start_s: float | None = None
        self._kept: list[np.ndarray] = []
        self._times: list[float] = []

    def add(self, time_s: float, frame: np.ndarray) -> None:
        """Add the next frame."""
        self._recent.append((time_s, frame))

    def settle(self, start_s: float | None, until_s: float) -> None:
        """Reduce the frames before a time to those that the window keeps.

        start_s: start of the open window, None for no window.
        """
        if start_s != self._start_s:
            self._start_s = start_s
            self._kept, self._times = [], []
            # Of an open window, frames after its start are not dropped.
            self._drop(until_s if start_s is None else start_s)
        if start_s is None:
            self._drop(until_s)
            return
        while self._recent and self._recent[0][0] < until_s:
            time_s, frame = self._recent.popleft()
            if self._sampling.keeps_first(len(self._times), self.fps):
                self._kept.append(frame)
            self._times.append(time_s)

    def cut(self, start_s: float, end_s: float) -> Clip:
        """Return the frames of a window as a clip, and remove them."""
        self.settle(start_s, end_s)
        kept, times = self._kept, self._times
        self._start_s, self._kept, self._times = None, [], []
        fps = np.array([measured_fps(times, self.fps)])
        (rate,) = self._sampling.rates(np.array([len(times)]), fps)
        thinned = [kept[i] for i in self._sampling.thin(len(kept))]
        return Clip(np.stack(thinned), float(rate), len(kept), start_s, end_s, is_part=True)

    def _drop(self, until_s: float) -> None:
        while self._recent and self._recent[0][0] < until_s:
            self._recent.popleft()
