"""Encode one row of a corpus as a clip: decode the video, then cut, scale and encode it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import simplejpeg

from flallm_ds.data.codecs import avi, h264
from flallm_ds.data.codecs.sizes import Box
from flallm_ds.data.codecs.video import Video
from flallm_ds.sharding import pool
from flallm_ds.sharding.corpora import Row
from flallm_ds.sharding.options import Options


@dataclass(frozen=True)
class Encoded:
    """Hold the bytes and the facts of a stored clip."""

    member: bytes
    num_frames: int
    fps: float
    height: int
    width: int
    # Whether the clip's span ends more than one frame after its video.
    past_end: bool


def encode_clip(row: Row, options: Options) -> Encoded:
    """Decode, cut, scale and encode one clip.

    Raises BrokenVideo, or ValueError if the clip is too long for its container.
    """
    if options.clip_format == "h264":
        return _encode_h264(row, options)
    frames = _Frames(row, options)
    jpegs: list[bytes] = []
    before: np.ndarray | None = None
    for frame in frames:
        # With an --fps above that of the video, frames are repeated: encode each once.
        if frame is not before:
            pixels = np.ascontiguousarray(frame)
            # 4:2:0 halves the resolution of the colours, as nearly every video does.
            jpeg = simplejpeg.encode_jpeg(pixels, options.quality, "RGB", "420")
        jpegs.append(jpeg)
        before = frame
    height, width = frames.hw
    return frames.stored(avi.pack_frames(jpegs, frames.video.fps, width, height))


def _encode_h264(row: Row, options: Options) -> Encoded:
    """Encode a clip as H.264, at the frame rate of the video or at --fps."""
    assert options.gop is not None and options.crf is not None
    fps = options.fps
    while True:
        frames = _Frames(row, options)
        # The container states a frame rate, which is known after the first frame. The true
        # rate comes from the times of all frames. If the two differ, encode the clip again.
        first = next(frames)
        rate = fps or frames.video.fps
        all_frames = chain([first], frames)
        member = h264.encode_h264(all_frames, rate, options.gop, options.crf)
        fps = frames.video.fps
        if rate == fps:
            return frames.stored(member)


class _Frames(Iterator[np.ndarray]):
    """Iterate over the frames of a row, cut and scaled, each (H, W, 3) uint8.

    num_frames: number of frames so far. hw: (height, width) of the last frame. video.fps is
    final after the last frame.
    """

    def __init__(self, row: Row, options: Options) -> None:
        self.video = Video(row.path, image_fps=row.image_fps, num_threads=1)
        self.num_frames = 0
        self.hw = (0, 0)
        self._end_s = row.end_s
        # One decoding thread, because every core already has a worker.
        self._frames = self.video.frames(
            row.start_s,
            row.end_s,
            short_side=options.short_side,
            box=common_box(row.bbox, options.crop),
            margin_px=options.margin,  # type: ignore[arg-type]
            stretch_hw=row.stretch_hw,
            fps=options.fps,
        )

    def __next__(self) -> np.ndarray:
        pool.check_stop()
        frame = next(self._frames)
        self.num_frames += 1
        self.hw = frame.shape[0], frame.shape[1]
        return frame

    def stored(self, member: bytes) -> Encoded:
        """Return the clip, with `member` as its bytes, after the last frame."""
        fps = self.video.fps
        # A difference of up to one frame is rounding in the corpus's table.
        past_end = self._end_s is not None and self.video.past_end_s > 1 / fps
        return Encoded(member, self.num_frames, fps, *self.hw, past_end)


def common_box(box: Box | None, crop: Sequence[float] | None) -> Box | None:
    """Return the intersection of a row's box and the crop of all rows; it may be empty."""
    if crop is None:
        return box
    x0, y0, x1, y1 = crop
    if box is None:
        return x0, y0, x1, y1
    # Both are fractions of the whole frame.
    return max(box[0], x0), max(box[1], y0), min(box[2], x1), min(box[3], y1)
