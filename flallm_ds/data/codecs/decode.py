"""Decode selected frames of a stored clip into memory that the caller provides.

The first bytes of a clip tell its format: a Motion-JPEG AVI (`avi.py`) or an mp4 with
H.264 (`h264.py`). Every ValueError is a clause without a full stop, for the caller's
sentence about the clip.
"""

import numpy as np
import simplejpeg

from flallm_ds.data.codecs import avi

EXTENSIONS = (avi.EXTENSION, "mp4")

# Options of libjpeg-turbo that save a sixth of the time. At quality 90 a pixel differs from
# its source by 1.9 of 255 on average, instead of 1.6.
FAST = {"fastdct": True, "fastupsample": True}


def decode_frames(
    member: bytes | memoryview,
    picks: np.ndarray,
    num_frames: int,
    out_THWC: np.ndarray,
    hw: tuple[int, int],
) -> None:
    """Decode frame picks[t] of the clip into the top left corner of out_THWC[t].

    The rest of out_THWC becomes black. Frames that are not picked are not decoded, except
    those of an mp4 that a picked frame depends on.
    member: the clip's bytes, which must not change during the call.
    picks: (T,) indices of frames, each below num_frames.
    num_frames: number of frames that the clip must have.
    out_THWC: uint8, RGB, contiguous, at least hw pixels.
    hw: height and width that each frame must have.
    Raises ValueError if the clip is damaged, or has other frames than num_frames of hw
    pixels.
    """
    if is_mp4(member):
        # PyAV is slow to import, and few corpora need it.
        from flallm_ds.data.codecs import h264

        h264.decode_frames(member, picks, num_frames, out_THWC, hw)
        return
    jpegs = jpegs_of(member, picks, num_frames)
    height, width = hw
    out_THWC[:, height:] = 0
    # If the widths match, the frame's memory is contiguous and the decoder writes into it.
    if out_THWC.shape[2] == width:
        for canvas, jpeg in zip(out_THWC, jpegs, strict=True):
            _decode(jpeg, canvas[:height], hw)
        return
    # A narrower frame is not contiguous in its canvas, as the decoder needs it: copy it.
    out_THWC[:, :height, width:] = 0
    frame = np.empty((height, width, 3), np.uint8)
    for canvas, jpeg in zip(out_THWC, jpegs, strict=True):
        _decode(jpeg, frame, hw)
        canvas[:height, :width] = frame


def jpegs_of(
    member: bytes | memoryview, picks: np.ndarray, num_frames: int
) -> list[memoryview]:
    """Return views of the picked frames of a Motion-JPEG clip, as JPEGs.

    Raises ValueError if the clip is damaged, has another number of frames, or is an mp4.
    """
    if is_mp4(member):
        raise ValueError("the clip must be a Motion-JPEG AVI, got an mp4")
    spans = avi.indexed_spans(member)
    if len(spans) != num_frames:
        raise ValueError(f"the clip must have {num_frames} frames, got {len(spans)}")
    # Only picked frames are checked: damage elsewhere does not matter here.
    picked = spans[picks]
    avi.check_frames(member, picked)
    # Views keep `member` alive and copy nothing.
    view = memoryview(member)
    return [view[begin : begin + size] for begin, size in picked.tolist()]


def extension_of(member: bytes | memoryview) -> str:
    """Return the file name extension of a clip in a shard, one of `EXTENSIONS`."""
    return EXTENSIONS[is_mp4(member)]


def is_mp4(member: bytes | memoryview) -> bool:
    """Return whether the first bytes are those of an mp4; otherwise it must be an AVI."""
    return member[4:8] == b"ftyp"


def _decode(jpeg: memoryview, into: np.ndarray, hw: tuple[int, int]) -> None:
    """Decode a JPEG into `into` (uint8, HWC). Raises ValueError if its size is not hw."""
    # With a buffer of the right size, the decoder allocates nothing for a damaged header
    # that names a huge picture.
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
        raise ValueError(f"frames must be {hw[1]}x{hw[0]}, got {width}x{height}")
