"""The picked frames of one stored clip, decoded into memory that is already there; no
other frame is touched.

The member's first bytes say which of the two kinds it is: a Motion-JPEG AVI
(`clip_format.py`) or an mp4 with H.264 (`h264.py`). A ValueError carries what is wrong as
the rest of a sentence about the clip.
"""

import numpy as np
import simplejpeg

from flallm_ds.data.codecs import avi as clip_format

EXTENSIONS = (clip_format.EXTENSION, "mp4")


# Of libjpeg-turbo: a sixth less time. At quality 90 a pixel is 1.9 of 255 from its source
# instead of 1.6.
FAST = {"fastdct": True, "fastupsample": True}


def decode_frames(
    member: bytes | memoryview,
    picks: np.ndarray,
    num_frames: int,
    out_THWC: np.ndarray,
    hw: tuple[int, int],
) -> None:
    """Decode frame picks[t] of the clip into the top left corner of out_THWC[t]; the rest
    becomes black.

    member: the clip's bytes, kept unchanged while this runs.
    picks: (T,) numbers of frames, each below num_frames.
    num_frames: how many the clip must hold.
    out_THWC: uint8, RGB, contiguous; a canvas of at least hw pixels for each pick.
    hw: height and width that each frame must have.
    Raises ValueError if the clip is broken, or is not of num_frames frames of hw pixels.
    """
    if is_mp4(member):
        # PyAV takes a while to import, and few corpora need it
        from flallm_ds.data.codecs import h264

        h264.decode_frames(member, picks, num_frames, out_THWC, hw)
        return
    jpegs = jpegs_of(member, picks, num_frames)
    height, width = hw
    out_THWC[:, height:] = 0
    if out_THWC.shape[2] == width:  # a frame is one run of memory at its canvas's top
        for canvas, jpeg in zip(out_THWC, jpegs, strict=True):
            _decode(jpeg, canvas[:height], hw)
        return
    out_THWC[:, :height, width:] = 0
    frame = np.empty((height, width, 3), np.uint8)
    for canvas, jpeg in zip(out_THWC, jpegs, strict=True):
        _decode(jpeg, frame, hw)
        canvas[:height, :width] = frame


def jpegs_of(
    member: bytes | memoryview, picks: np.ndarray, num_frames: int
) -> list[memoryview]:
    """The picked frames of a Motion-JPEG clip as they are stored, without a copy.

    Raises ValueError if the clip is broken, is not of num_frames frames, or is an mp4.
    """
    if is_mp4(member):
        raise ValueError("must hold its frames as JPEGs, but is an mp4")
    spans = clip_format.indexed_spans(member)
    if len(spans) != num_frames:
        raise ValueError(f"must hold {num_frames} frames, but holds {len(spans)}")
    picked = spans[picks]
    clip_format.check_frames(member, picked)
    view = memoryview(member)
    return [view[begin : begin + size] for begin, size in picked.tolist()]


def extension_of(member: bytes | memoryview) -> str:
    """The extension that a clip's member has in a tar, one of `EXTENSIONS`."""
    return EXTENSIONS[is_mp4(member)]


def is_mp4(member: bytes | memoryview) -> bool:
    """Whether the clip is an mp4 by its first bytes (otherwise it must be a Motion-JPEG AVI)."""
    return member[4:8] == b"ftyp"


def _decode(jpeg: memoryview, into: np.ndarray, hw: tuple[int, int]) -> None:
    # With a buffer, a frame whose header lies about its size gets no memory for it.
    height, width = hw
    try:
        frame = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=into, **FAST)
    except ValueError:
        height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
        if (height, width) == hw:
            raise
    else:
        height, width = frame.shape[:2]
    if (height, width) != hw:
        raise ValueError(f"frames must be {hw[1]}x{hw[0]}, but one is {width}x{height}")
