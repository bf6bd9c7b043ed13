"""Write and read a clip as a Motion-JPEG AVI, the member `<key>.avi` of a shard.

Any player opens the file, and a clip needs one read. This module writes and parses the
container itself: that takes 5 us a frame (FFmpeg's muxer: 30 to 80), adds no 5 kB of
padding to a clip, and gives the same bytes with every version of FFmpeg. Layout: RIFF AVI
{ LIST hdrl { avih, LIST strl { strh, strf } }, LIST movi { 00dc ... }, idx1 }.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

EXTENSION = "avi"
# Sizes are 32 bits wide, and some players read them as signed. 1 MiB is for the header.
_MAX_BYTES = 2**31 - 2**20
_FRAME_ID = b"00dc"
_FRAME_ID_U4 = int.from_bytes(_FRAME_ID, "little")
_JPEG_BEGIN = b"\xff\xd8"
# An index entry, 16 bytes per frame. Its offset counts from the word `movi`.
_INDEX_ENTRY = np.dtype(
    [("id", "<u4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")]
)
_FRAME_HEAD = np.dtype([("id", "<u4"), ("size", "<u4"), ("begin", "<u2")])  # of a chunk
_KEYFRAME = 0x10
_HAS_INDEX = 0x10
_NO_FRAME = "every frame of the clip must be a JPEG where the index says, got other bytes"
_MAX_DENOMINATOR = 1001  # of the frame rate: NTSC video has 30000/1001 frames a second


def _chunk(name: bytes, *parts: bytes) -> bytes:
    """Return a RIFF chunk: its name, the size of its content, its content."""
    return name + struct.pack("<I", sum(map(len, parts))) + b"".join(parts)


def pack_frames(jpegs: Sequence[bytes], fps: float, width: int, height: int) -> bytes:
    """Return the bytes of an AVI file with these frames.

    jpegs: the frames, each of width x height pixels. fps: frames per second.
    Raises ValueError if there are no frames, if a frame is not a JPEG, if fps is not
    positive, or if the frames take more than 2 GiB.
    """
    if not jpegs:
        raise ValueError("a clip must have at least one frame, got none")
    if not all(jpeg[:2] == _JPEG_BEGIN for jpeg in jpegs):
        raise ValueError("every frame of a clip must be a JPEG, got other first bytes")
    if not 0 < fps < 10_000:
        raise ValueError(f"fps must be above 0 and below 10,000, got {fps}")
    # Where each chunk begins, counted from the word `movi`: a chunk is a header of 8 bytes,
    # the JPEG, and a padding byte if its size is odd. The last offset is the list's end.
    sizes = np.fromiter(map(len, jpegs), np.int64, len(jpegs))
    offsets = 4 + np.concatenate([[0], np.cumsum(8 + sizes + sizes % 2)])
    if offsets[-1] > _MAX_BYTES:
        raise ValueError(
            f"the frames of a clip must take less than 2 GiB, got {offsets[-1]:,} bytes"
        )

    index = np.zeros(len(jpegs), _INDEX_ENTRY)
    index["id"] = _FRAME_ID_U4
    index["flags"] = _KEYFRAME
    index["offset"] = offsets[:-1]
    index["size"] = sizes

    # One join at the end: each byte is copied once.
    header = _header(fps, len(jpegs), int(sizes.max()), width, height)
    tail = _chunk(b"idx1", index.tobytes())
    movi_size = int(offsets[-1])
    riff_size = 4 + len(header) + 8 + movi_size + len(tail)
    riff = struct.pack("<4sI4s", b"RIFF", riff_size, b"AVI ")
    parts = [riff, header, struct.pack("<4sI4s", b"LIST", movi_size, b"movi")]
    for jpeg in jpegs:
        parts += (_FRAME_ID, struct.pack("<I", len(jpeg)), jpeg, b"\0" * (len(jpeg) % 2))
    return b"".join([*parts, tail])


def _header(fps: float, num_frames: int, largest: int, width: int, height: int) -> bytes:
    """Return the header, the list `hdrl`.

    largest: size of the largest frame in bytes; players allocate their buffers by it.
    """
    rate = Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
    if rate == 0:
        rate = Fraction(1, _MAX_DENOMINATOR)
    # The file: microseconds per frame, flags, number of frames and of streams, frame size.
    avih = struct.pack(
        "<14I", round(1e6 / rate), 0, 0, _HAS_INDEX, num_frames, 0, 1, largest,
        width, height, 0, 0, 0, 0,
    )  # fmt: skip
    # The only stream: its codec, its frame rate as a fraction, its length.
    strh = struct.pack(
        "<4s4sIHHIIIIIIII4H", b"vids", b"MJPG",
        0, 0, 0, 0, rate.denominator, rate.numerator, 0, num_frames,
        largest, 0xFFFFFFFF, 0, 0, 0, width, height,
    )  # fmt: skip
    # The picture, as a BITMAPINFOHEADER of 40 bytes: 1 plane with 24 bits a pixel.
    strf = struct.pack(
        "<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0
    )
    stream = _chunk(b"LIST", b"strl", _chunk(b"strh", strh), _chunk(b"strf", strf))
    return _chunk(b"LIST", b"hdrl", _chunk(b"avih", avih), stream)


def frame_spans(member: bytes | memoryview) -> np.ndarray:
    """Return offset and size of each JPEG in the member, int64 of shape (frames, 2).

    The spans are in order, and every one of them is within the member. Raises ValueError if
    the member is not a complete Motion-JPEG AVI with an index.
    """
    spans = indexed_spans(member)
    check_frames(member, spans)
    return spans


def indexed_spans(member: bytes | memoryview) -> np.ndarray:
    """Return what `frame_spans` returns, as the index says.

    The bytes of the frames are not read; `check_frames` checks them.
    """
    data = np.frombuffer(member, np.uint8)
    if len(data) < 12 or bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"AVI ":
        raise ValueError("a clip must be an AVI file, got other first bytes")
    (riff_size,) = struct.unpack_from("<I", member, 4)
    if riff_size + 8 > len(data):
        raise ValueError(
            f"the clip must have {riff_size + 8:,} bytes as its header says, got "
            f"{len(data):,}"
        )
    (movi, movi_end), (idx1, idx1_end) = _lists(member, riff_size + 8)
    if (idx1_end - idx1) % 16 or idx1_end == idx1:
        raise ValueError(
            "the clip's index must have 16 bytes for each frame and at least one frame, "
            f"got {idx1_end - idx1:,} bytes"
        )
    index = np.frombuffer(member, _INDEX_ENTRY, (idx1_end - idx1) // 16, idx1)
    if (index["id"] != _FRAME_ID_U4).any():
        raise ValueError(_NO_FRAME)
    # int64, so that the sums of a damaged index's 32-bit numbers do not wrap around.
    offsets, sizes = index["offset"].astype(np.int64), index["size"].astype(np.int64)
    begins = offsets + movi + 8  # after the chunk's name and size
    ends = begins + sizes
    # A damaged or malicious index must not lead outside of the member. Frames are in order
    # and do not overlap, so the last end bounds every span.
    if (
        (sizes < 4).any()
        or offsets[0] < 4
        or (begins[1:] < ends[:-1] + 8).any()
        or ends[-1] > movi_end
    ):
        raise ValueError(
            "the clip's index must list frames in order within the file, got other places"
        )
    return np.stack([begins, sizes], axis=1)


def check_frames(member: bytes | memoryview, spans: np.ndarray) -> None:
    """Raise ValueError unless there is a JPEG of the given size at each span."""
    # A view with a chunk header at every byte of the member, without a copy. Its rows at
    # the spans are the headers of the frames.
    heads_everywhere = np.ndarray(
        len(member) - _FRAME_HEAD.itemsize + 1, _FRAME_HEAD, member, strides=(1,)
    )
    heads = heads_everywhere[spans[:, 0] - 8]
    if (
        (heads["id"] != _FRAME_ID_U4).any()
        or (heads["size"] != spans[:, 1]).any()
        or (heads["begin"] != int.from_bytes(_JPEG_BEGIN, "little")).any()
    ):
        raise ValueError(_NO_FRAME)


def _lists(member: bytes | memoryview, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (begin, end) of the list `movi` and of the index's content.

    The list begins with the word `movi`. end: file size by the header. Raises ValueError if
    the list or the index is missing.
    """
    # Walk over the chunks of the file. The first one is after `RIFF`, the size and `AVI `.
    movi = idx1 = None
    position = 12
    while position + 12 <= end:
        name, size, kind = struct.unpack_from("<4sI4s", member, position)
        begin, position = position + 8, position + 8 + size + size % 2
        if begin + size > end:
            raise ValueError(
                f"chunk {name!r} of the clip must end by byte {end:,}, got {begin + size:,}"
            )
        if name == b"LIST" and kind == b"movi":
            movi = begin, begin + size
        elif name == b"idx1":
            idx1 = begin, begin + size
    if movi is None or idx1 is None:
        missing = "frames" if movi is None else "index"
        raise ValueError(f"the clip must have frames and an index, got no {missing}")
    return movi, idx1
