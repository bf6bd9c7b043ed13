"""The length of a video and the size of its frames, found without decoding."""

from pathlib import Path

import av

from flallm_ds.data.codecs.video import OPEN_OPTIONS
from flallm_ds.demo.refused import Refused

_DEFAULT_FPS = 25.0
# 8K. A frame of this size takes 50 MB while it is decoded, in each of several threads.
_MAX_PIXELS = 7680 * 4320


def check_video(path: Path, max_s: float) -> None:
    """Raise Refused for a video that is longer than `max_s` seconds, or has huge frames.

    A file of a few kilobytes may contain hours of a still picture. What cannot be read is
    left to the decoder, which names the fault.
    """
    try:
        # Opened as for decoding, so that no playlist is followed.
        with av.open(
            str(path), container_options=OPEN_OPTIONS, metadata_errors="replace"
        ) as container:
            if not container.streams.video:
                return
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            length_s = _length_s(container, stream, max_s)
    except (av.FFmpegError, OSError, ValueError):
        return
    if width * height > _MAX_PIXELS:
        raise Refused(
            f"The video must have at most 7680x4320 pixels, got {width}x{height}. Scale it "
            "down.",
            422,
        )
    if length_s > max_s:
        raise Refused(
            f"The video must be at most {max_s:g} s long, got a longer one. Cut it, or ask "
            "for a larger --max_s.",
            422,
        )


def _length_s(
    container: "av.container.InputContainer",
    stream: "av.video.stream.VideoStream",
    max_s: float,
) -> float:
    """Return the length of a video in seconds; of a longer one, a length above `max_s`."""
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    frame_s = 1 / fps if 1 <= fps <= 480 else 1 / _DEFAULT_FPS
    first_s: float | None = None
    length_s = 0.0
    for number, packet in enumerate(container.demux(stream)):
        if packet.size == 0:  # the last one, which flushes the decoder
            break
        time_s = number * frame_s  # a raw stream has no timestamps
        if packet.pts is not None:
            time_s = float(packet.pts * packet.time_base)
        first_s = time_s if first_s is None else min(first_s, time_s)
        length_s = max(length_s, time_s - first_s + frame_s)
        if length_s > max_s:
            break
    return length_s
