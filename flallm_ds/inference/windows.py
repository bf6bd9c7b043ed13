"""Cut a long video into windows at the pauses of the signer, while it is decoded.

The motion of a moment is the mean difference between two small grey pictures. A moment is
still if its motion is below a threshold, which follows the motion of the last minute. A
window begins shortly before the first motion after a pause, and ends shortly after the
last motion before the next pause. If the signer makes no pause, the window is cut at the
quietest moment before it becomes too long.
"""

from collections import deque
from dataclasses import dataclass

import cv2
import numpy as np

# A pause lasts at least this long. Holds between and within signs are shorter.
PAUSE_S = 0.4
# Each window begins and ends with this much of the pause, as training clips do.
LEAD_S = 0.16
# A shorter window has no sentence, and is continued.
MIN_WINDOW_S = 1.0
# Time between two compared pictures: two frames at 25 per second. At this distance a slow
# hand is above the noise of a camera.
_STEP_S = 0.08
# A window without a pause is cut within this time before its limit.
_SEARCH_S = 2.0
# The threshold follows the motion from the last minute to two seconds ahead.
_HISTORY_S = 60.0
_AHEAD_S = 2.0
# Width of a grey picture in pixels: the noise of a camera and of a codec disappears, and a
# hand of a signer who fills half of the picture still covers several pixels.
_WIDTH = 64
# Mean difference in grey levels, below which nothing moves in any video.
_MIN_MOTION = 0.15
# The threshold: this share of the motion of signing (90th percentile), and above the noise
# of a camera (2nd percentile) by this factor. More than this is not noise.
_SHARE = 0.25
_NOISE_FACTOR = 1.3
_MAX_NOISE = 3.0
_EDGE_S = 1e-6


@dataclass(frozen=True)
class Window:
    """A part of a video: start_s <= time of its frames < end_s."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class _Moment:
    """The motion between two compared pictures. start_s, end_s: times of the pictures."""

    start_s: float
    end_s: float
    motion: float


class WindowFinder:
    """Finds the windows of a video, frame by frame.

    limit_s: longest window in seconds.

    start_s: start of the window that is open, None in a pause. settled_s: no window will
    begin or end before this time any more, except at `start_s`.
    """

    def __init__(self, limit_s: float) -> None:
        self.start_s: float | None = None
        self.settled_s = 0.0
        self._limit_s = limit_s
        self._search_s = min(_SEARCH_S, limit_s / 2)
        self._min_s = min(MIN_WINDOW_S, limit_s / 2)
        # Moments from _HISTORY_S ago to the last frame; the last _AHEAD_S are not decided.
        self._moments: deque[_Moment] = deque()
        self._undecided: deque[_Moment] = deque()
        self._picture: np.ndarray | None = None
        self._picture_s = 0.0
        # Start of the motion at this moment, None while it is still.
        self._moving_since_s: float | None = None
        self._last_motion_s = 0.0
        self._last_end_s = 0.0

    def add(self, time_s: float, frame: np.ndarray) -> list[Window]:
        """Return the windows that are complete. frame: uint8 RGB (height, width, 3).

        Times must increase from frame to frame.
        """
        if self._picture is not None and time_s < self._picture_s + _STEP_S - _EDGE_S:
            return []
        picture = grey_picture(frame)
        if self._picture is not None:
            moment = _Moment(self._picture_s, time_s, motion(self._picture, picture))
            self._moments.append(moment)
            self._undecided.append(moment)
        self._picture, self._picture_s = picture, time_s
        return self._decide(time_s - _AHEAD_S)

    def end(self, end_s: float) -> list[Window]:
        """Return the remaining windows. end_s: end of the last frame."""
        found = self._decide(np.inf)
        if self.start_s is not None:
            wanted_s = max(self._last_motion_s + LEAD_S, self.start_s + self._min_s)
            found.append(self._close(min(end_s, wanted_s)))
        return found

    def _decide(self, until_s: float) -> list[Window]:
        """Decide all moments that end until a time; return the windows that are complete."""
        found = []
        while self._undecided and self._undecided[0].end_s <= until_s:
            moment = self._undecided.popleft()
            while self._moments[0].end_s < moment.end_s - _HISTORY_S:
                self._moments.popleft()
            window = self._after(moment)
            if window is not None:
                found.append(window)
        return found

    def _after(self, moment: _Moment) -> Window | None:
        """Return the window that ends by this moment, if one does."""
        if moment.motion < self._threshold():
            self._moving_since_s = None
        else:
            self._last_motion_s = moment.end_s
            if self._moving_since_s is None:
                self._moving_since_s = moment.start_s
            elif self.start_s is None:
                # The second moment with motion: a single one may be a fault of the video.
                self.start_s = max(self._last_end_s, self._moving_since_s - LEAD_S)
        if self.start_s is None:
            self.settled_s = max(self._last_end_s, moment.start_s - LEAD_S - _STEP_S)
            return None

        now_s = moment.end_s
        self.settled_s = min(self._last_motion_s, now_s - self._search_s)
        if now_s - self._last_motion_s >= PAUSE_S and now_s >= self.start_s + self._min_s:
            end_s = max(self._last_motion_s + LEAD_S, self.start_s + self._min_s)
            return self._close(end_s)
        if now_s - self.start_s >= self._limit_s:
            window = self._close(self._quietest_s(now_s))
            # The signer continues: the next window begins here.
            self.start_s = window.end_s
            return window
        return None

    def _close(self, end_s: float) -> Window:
        assert self.start_s is not None
        window = Window(self.start_s, end_s)
        self.start_s, self._last_end_s = None, end_s
        return window

    def _threshold(self) -> float:
        """Return the motion below which a moment is still."""
        motions = [moment.motion for moment in self._moments]
        noise, signing = np.percentile(motions, (2, 90))
        above_noise = _NOISE_FACTOR * min(noise, _MAX_NOISE)
        return float(max(_MIN_MOTION, above_noise, _SHARE * signing))

    def _quietest_s(self, now_s: float) -> float:
        """Return the end of the moment with the least motion shortly before a time."""
        recent = []
        for moment in self._moments:
            if now_s - self._search_s <= moment.start_s and moment.end_s <= now_s:
                recent.append(moment)
        if not recent:  # one picture was shown for longer than the search
            return now_s
        return min(recent, key=lambda moment: moment.motion).end_s


def grey_picture(frame: np.ndarray) -> np.ndarray:
    """Return a small grey picture of an RGB frame, int16 (height, 64)."""
    height = max(1, round(frame.shape[0] * _WIDTH / frame.shape[1]))
    small = cv2.resize(frame, (_WIDTH, height), interpolation=cv2.INTER_AREA)
    grey: np.ndarray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.int16)
    return grey


def motion(before: np.ndarray, after: np.ndarray) -> float:
    """Return the mean difference of two grey pictures, in grey levels."""
    return float(np.abs(after - before).mean())
