"""Read the frames of a video file or of a folder of images, as RGB arrays.

Frames come in presentation order. Building shards and translating a user's video both use
this module, so that they see the same pixels. The counts, rates and lengths in containers
are often wrong: only decoded frames are trusted.
"""

import contextlib
import heapq
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from flallm_ds.data.codecs.containers import check_whole
from flallm_ds.data.codecs.growing import GrowingFile, growing_list
from flallm_ds.data.codecs.sizes import (
    Box,
    Margin,
    box_px,
    fit_short_side,
    fitted_size,
    resize,
)
from flallm_ds.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {
        ".mp4",
        ".mov",
        ".m4v",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".3gp",
        ".wmv",
        ".flv",
        ".gif",
    }
)

# A playlist or a concatenation script with the name of a video would make FFmpeg open any
# file or address. Only real containers are allowed, and only from the disk.
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,"
    "asf,ogg,gif,h264,hevc,m4v,obu,ivf,mjpeg,mxf,dv",
}
# Frames that are held back to sort unordered timestamps. Decoders reorder B-frames
# themselves.
_REORDER = 8
# FFmpeg's names of the containers in which seeking is reliable. In an MPEG program stream
# it loses frames.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv", "avi")
# Tolerance for rounding: a frame at the span's start is included, one at its end is not.
_EDGE_S = 1e-6
# Matroska and FLV round times to milliseconds, so a frame may be this much late.
_ROUNDED_S = 1e-3
_MAX_STILL_S = 600  # a longer gap between two frames is a wrong timestamp
_DEFAULT_FPS = 25.0


class BrokenVideo(UserError):
    """Raised for a video that cannot be decoded completely."""


class Video:
    """A video file or a folder of frame images.

    image_fps: frames per second of a folder of images (a file has its own rate).
    num_threads: decoding threads, 0 for one per core.
    idle_s: for a file or folder that another process is writing: wait for more frames until
    nothing was added for this time in seconds.

    `time_s` is the time of the last yielded frame. Two attributes are final when `frames()`
    is exhausted. `fps` is the frame rate by the timestamps; before, it is the container's,
    and 0.0 if nothing was read. `past_end_s` is the time in seconds by which the requested
    span exceeds the last frame.
    """

    def __init__(
        self,
        path: str | Path,
        image_fps: float = _DEFAULT_FPS,
        num_threads: int = 0,
        idle_s: float | None = None,
    ) -> None:
        self.path = Path(path)
        self.fps = 0.0
        self.time_s = 0.0
        self.past_end_s = 0.0
        self._image_fps = image_fps
        self._num_threads = num_threads
        self._idle_s = idle_s

    def frames(
        self,
        start_s: float | None = None,
        end_s: float | None = None,
        *,
        short_side: int | None = None,
        box: Box | None = None,
        margin_px: Margin | None = None,
        stretch_hw: tuple[int, int] | None = None,
        fps: float | None = None,
        keep: Callable[[int], bool] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield upright RGB frames, uint8 (height, width, 3), in the first one's size.

        start_s, end_s: yield the frames with start_s <= time < end_s.
        fps: resample to this rate from the start of the span: frames are dropped, or the
        same array is yielded again.
        box, margin_px: cut out this part of the picture.
        stretch_hw: cut and scale as if the whole picture had this height and width.
        short_side: scale the shorter side down to this, never up. For a file this is done
        in the colour conversion, in a quarter of the time of two separate steps.
        keep: yield only the frames of the span, numbered from 0, for which it returns True.
        It is called for every frame, in order. The other frames are not converted.

        Raises BrokenVideo if the file is missing, is not a video or is damaged, if the span
        has no frame, or if the cut leaves no pixel.
        """
        timed = self._timed_images() if self.path.is_dir() else self._timed_frames(start_s)
        self.past_end_s = 0.0
        if fps:
            shown = self._at_rate(timed, start_s, end_s, fps)
        else:
            shown = self._in_span(timed, start_s, end_s)

        # A part of the picture is cut out at full size first, and scaled afterwards.
        whole = not (box or margin_px or stretch_hw)
        before: Path | _Picture | None = None
        frame = np.empty(0, np.uint8)
        number = -1
        for number, picture in enumerate(shown):
            if keep is not None and not keep(number):
                continue
            if picture is not before:  # otherwise the same frame is shown again
                if isinstance(picture, Path):
                    read = read_image(picture)
                else:
                    read = picture.read(short_side if whole else None)
                fitted = self._fitted(read, short_side, box, margin_px, stretch_hw)
                # The resolution may change within a stream.
                same = before is None or fitted.shape == frame.shape
                frame = fitted if same else cv2.resize(fitted, frame.shape[1::-1])
                before = picture
            yield frame

        if number < 0:
            span = ""
            if start_s is not None or end_s is not None:
                span = f" from {start_s or 0} s to {end_s or 'its end'} s"
            raise BrokenVideo(f"Cannot read video {self.path}: it has no frames{span}.")

    def _fitted(
        self,
        frame: np.ndarray,
        short_side: int | None,
        box: Box | None,
        margin_px: Margin | None,
        stretch_hw: tuple[int, int] | None,
    ) -> np.ndarray:
        """Return the requested part of a frame at the requested size, resampled once."""
        height, width = frame.shape[:2]
        if box or margin_px:
            frame = self._cut(frame, box or (0.0, 0.0, 1.0, 1.0), margin_px or (0, 0, 0, 0))
        if stretch_hw is None:
            return fit_short_side(frame, short_side) if short_side else frame
        # The part is stretched by the same factors as the whole picture.
        stretched_h = max(1, round(frame.shape[0] * stretch_hw[0] / height))
        stretched_w = max(1, round(frame.shape[1] * stretch_hw[1] / width))
        return resize(frame, *fitted_size(stretched_h, stretched_w, short_side or 2**31))

    def _cut(self, frame: np.ndarray, box: Box, margin_px: Margin) -> np.ndarray:
        """Return the part of a frame inside the box and without the margins."""
        height, width = frame.shape[:2]
        left, top, right, bottom = box_px(box, height, width)
        top, right = max(top, margin_px[0]), min(right, width - margin_px[1])
        bottom, left = min(bottom, height - margin_px[2]), max(left, margin_px[3])
        if top >= bottom or left >= right:
            raise BrokenVideo(
                f"Cannot crop video {self.path}: the crop and the margins leave nothing of "
                f"{width}x{height} pixels."
            )
        return frame[top:bottom, left:right]

    def _in_span(
        self,
        timed: "Iterator[tuple[float, Path | _Picture]]",
        start_s: float | None,
        end_s: float | None,
    ) -> "Iterator[Path | _Picture]":
        """Yield the frames that begin in the span, then set `fps` and `past_end_s`."""
        # Half-open, so that adjacent spans share no frame.
        begin_s = -np.inf if start_s is None else start_s - _EDGE_S
        stop_s = np.inf if end_s is None else end_s - _EDGE_S
        times: list[float] = []
        last_s = 0.0
        for time_s, picture in timed:
            last_s = time_s
            if time_s >= stop_s:
                break
            if time_s >= begin_s:
                times.append(time_s)
                self.time_s = time_s
                yield picture
        else:
            if end_s is not None and self.fps:
                self.past_end_s = max(0.0, end_s - last_s - 1 / self.fps)
        if times:
            self.fps = measured_fps(times, self.fps)

    def _at_rate(
        self,
        timed: "Iterator[tuple[float, Path | _Picture]]",
        start_s: float | None,
        end_s: float | None,
        rate: float,
    ) -> "Iterator[Path | _Picture]":
        """Yield the frame at each 1/rate s of the span, then set `fps` and `past_end_s`.

        A frame is shown from its own time to that of the next one.
        """
        stop_s = np.inf if end_s is None else end_s - _EDGE_S
        times: list[float] = []
        shown: Path | _Picture | None = None
        tick = 0
        for time_s, picture in timed:
            start_s = time_s if start_s is None else start_s
            shown_since = max(start_s, times[-1]) if times else start_s
            if min(time_s, stop_s) - shown_since > _MAX_STILL_S:
                raise BrokenVideo(
                    f"Cannot read video {self.path}: a frame is shown for longer than "
                    f"{_MAX_STILL_S} s, until {time_s:.0f} s."
                )
            # All ticks before the time of this frame show the previous one.
            while start_s + tick / rate < min(stop_s, time_s - _ROUNDED_S):
                if shown is not None:
                    self.time_s = start_s + tick / rate
                    yield shown
                tick += 1
            if start_s + tick / rate >= stop_s:
                break
            times.append(time_s)
            shown = picture
        else:
            # The last frame is shown for one period of the measured rate.
            if shown is not None and start_s is not None:
                until_s = times[-1] + 1 / measured_fps(times, self.fps)
                while start_s + tick / rate < min(stop_s, until_s - _ROUNDED_S):
                    self.time_s = start_s + tick / rate
                    yield shown
                    tick += 1
                self.past_end_s = max(0.0, end_s - until_s) if end_s is not None else 0.0
        self.fps = rate

    def _timed_images(self) -> "Iterator[tuple[float, Path | _Picture]]":
        """Yield (time in seconds, path) of the images of a folder."""
        self.fps = self._image_fps
        paths: Iterable[Path] = image_paths(self.path)
        if self._idle_s is not None:
            paths = growing_list(lambda: image_paths(self.path), self._idle_s)
        for number, path in enumerate(paths):
            yield number / self.fps, path

    def _timed_frames(
        self, start_s: float | None
    ) -> "Iterator[tuple[float, Path | _Picture]]":
        """Yield (time in seconds, frame) in order of time.

        Begins with the first frame, or with any frame at or before start_s.
        """
        if start_s is not None and start_s > 0:
            jumped = self._decode(start_s)
            # A damaged seek table fails or leads too far: then read from the beginning.
            try:
                first = next(jumped, None)
            except BrokenVideo:
                first = None
            if first is not None and first[0] <= start_s + _EDGE_S:
                yield first
                yield from jumped
                return
        yield from self._decode(None)

    def _decode(self, seek_s: float | None) -> "Iterator[tuple[float, Path | _Picture]]":
        """Yield (time in seconds, frame) in order, after a seek if one is possible."""
        num_decoded = 0
        try:
            # FFmpeg cannot mistake an absolute path for an address such as `pipe:`.
            source: str | GrowingFile = str(self.path.absolute())
            if self._idle_s is None:
                check_whole(self.path)
            else:
                source = GrowingFile(self.path, self._idle_s)
            with av.open(
                source,
                container_options=OPEN_OPTIONS,
                metadata_errors="replace",
            ) as container:
                stream = _video_stream(container, self.path)
                stream.codec_context.thread_count = self._num_threads
                stream.thread_type = "AUTO"
                nominal = float(stream.average_rate or stream.guessed_rate or 0)
                self.fps = nominal if 1 <= nominal <= 480 else _DEFAULT_FPS
                # A file that was cut out of a longer one may begin at any time.
                begin_s = (container.start_time or 0) / av.time_base
                if seek_s is not None and container.format.name in _SEEKABLE:
                    container.seek(int((seek_s + begin_s) * av.time_base), backward=True)
                # A small heap sorts unordered timestamps.
                reformatter = VideoReformatter()
                matrices: dict[int, bytes] = {}
                waiting: list[tuple[float, int, _Picture]] = []
                for frame in container.decode(stream):
                    time_s = num_decoded / self.fps  # a raw stream has no timestamps
                    if frame.time is not None:
                        time_s = frame.time - begin_s
                    picture = _Picture(frame, reformatter, matrices, self.path)
                    heapq.heappush(waiting, (time_s, num_decoded, picture))
                    num_decoded += 1
                    if len(waiting) > _REORDER:
                        time_s, _, picture = heapq.heappop(waiting)
                        yield time_s, picture
                while waiting:
                    time_s, _, picture = heapq.heappop(waiting)
                    yield time_s, picture
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            what = f"Cannot open video {self.path}"
            if num_decoded:
                what = f"Cannot decode video {self.path} after {num_decoded} frames"
            raise BrokenVideo(f"{what}: {reason.rstrip('.')}.") from error


class _Picture:
    """A decoded frame that is converted to RGB when it is read, if it is read at all."""

    def __init__(
        self,
        frame: av.VideoFrame,
        reformatter: VideoReformatter,
        matrices: dict[int, bytes],
        path: Path,
    ) -> None:
        self._frame, self._reformatter, self._path = frame, reformatter, path
        self._matrices = matrices

    def read(self, short_side: int | None) -> np.ndarray:
        """Return the frame as RGB, scaled down to short_side.

        It is turned and mirrored by the container's display matrix.
        """
        frame = self._frame
        if frame.is_corrupt:
            raise BrokenVideo(
                f"Cannot decode video {self._path}: the frame at {frame.time} s is damaged."
            )
        height, width = fitted_size(frame.height, frame.width, short_side or 2**31)
        # The reformatter reads the frame's own colour matrix and range.
        rgb = self._reformatter.reformat(
            frame, width, height, format="rgb24", interpolation="AREA", threads=1
        ).to_ndarray()
        # By angle, for the whole video: PyAV's side data and its frame refer to each other,
        # so that hundreds of frames would wait for the garbage collector.
        if frame.rotation not in self._matrices:
            self._matrices[frame.rotation] = _display_matrix(frame)
        matrix = self._matrices[frame.rotation]
        if len(matrix) < 36:
            return rgb
        # The matrix maps x' = a x + c y, y' = b x + d y: turns by multiples of 90 degrees,
        # and mirroring.
        a, b, _, c, d, *_ = struct.unpack_from("<9i", matrix)
        if abs(a) + abs(d) < abs(b) + abs(c):
            rgb, a, d = rgb.transpose(1, 0, 2), c, b
        step_y, step_x = (-1 if d < 0 else 1), (-1 if a < 0 else 1)
        return np.ascontiguousarray(rgb[::step_y, ::step_x])


def _display_matrix(frame: "av.VideoFrame") -> bytes:
    """Return the container's display matrix; empty if there is none."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return bytes(data)
    return b""


def read_frames(
    path: Path, start_s: float | None = None, end_s: float | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames of a video file or of a folder of images; see `Video.frames`."""
    return Video(path).frames(start_s, end_s)


def video_name(path: Path) -> str:
    """Return the name of a video without its suffix. A folder of images has no suffix."""
    return path.name if path.is_dir() else path.stem


def image_paths(folder: Path) -> list[Path]:
    """Return the paths of a folder's images, in natural order (frame2 before frame10)."""
    found = []
    for path in folder.iterdir():
        hidden = path.name.startswith(".")
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
            found.append(path)
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that compares the numbers in a name by their value."""
    key = []
    for word in re.findall(r"[0-9]+|[^0-9]+", path.name):
        is_number = word[0] in "0123456789"
        key.append((int(word), "") if is_number else (-1, word))
    return key


def _video_stream(
    container: "av.container.InputContainer", path: Path
) -> "av.video.stream.VideoStream":
    """Return the first video stream; raise BrokenVideo if there is none."""
    # A cover picture is also a video stream, with a single frame.
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            return stream
    raise BrokenVideo(f"Cannot read video {path}: it has no video stream.")


def read_image(path: Path) -> np.ndarray:
    """Return an image, uint8 RGB (height, width, 3); raise BrokenVideo if it is damaged."""
    image: np.ndarray | None = None
    with contextlib.suppress(OSError):
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    if image is None:
        raise BrokenVideo(f"Cannot read frame {path}: it is not a complete image.")
    return image


def measured_fps(times: list[float], nominal: float) -> float:
    """Return the nominal rate if the timestamps agree within 1 %, otherwise theirs."""
    span_s = times[-1] - times[0]
    if len(times) < 2 or span_s <= 0:
        return nominal
    measured = (len(times) - 1) / span_s
    return nominal if abs(measured / nominal - 1) < 0.01 else measured
