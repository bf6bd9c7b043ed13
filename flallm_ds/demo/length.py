"""The length of a video by its timestamps, found without decoding."""

from pathlib import Path

import av

from flallm_ds.data.codecs.video import OPEN_OPTIONS
from flallm_ds.demo.refused import Refused

_DEFAULT_FPS = 25.0


def check_length(path: Path, max_s: float) -> None:
    """Raise Refused for a video that is longer than `max_s` seconds.

    A file of a few kilobytes may contain hours of a still picture. What cannot be read is
    left to the decoder, which names the fault.
    """
    try:
        length_s = _longer_than(path, max_s)
    except (av.FFmpegError, OSError, ValueError):
        return
    if length_s > max_s:
        raise Refused(
            f"The video must be at most {max_s:g} s long, got a longer one. Cut it, or ask "
            "for a larger --max_s.",
            422,
        )


def _longer_than(path: Path, max_s: float) -> float:
    """Return the length of a video in seconds, or that of its begin above `max_s`."""
    # Opened as for decoding, so that no playlist is followed.
    with av.open(
        str(path), container_options=OPEN_OPTIONS, metadata_errors="replace"
    ) as container:
        length_s = 0.0
        if not container.streams.video:
            return length_s
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        frame_s = 1 / fps if 1 <= fps <= 480 else 1 / _DEFAULT_FPS
        first_s: float | None = None
        for number, packet in enumerate(container.demux(stream)):
            if packet.size == 0:  # the last one, which flushes the decoder
                break
            if packet.pts is None:  # a raw stream has no timestamps
                time_s = number * frame_s
            else:
                time_s = float(packet.pts * packet.time_base)
            first_s = time_s if first_s is None else min(first_s, time_s)
            length_s = max(length_s, time_s - first_s + frame_s)
            if length_s > max_s:
                break
        return length_s
