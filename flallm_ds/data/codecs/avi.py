"""A stored clip: all its JPEG frames in one AVI (Motion-JPEG), one member `<key>.avi` of a tar.

Any player opens it, and the whole clip is one read. The container is written and read
here, by hand: 5 us a frame where FFmpeg's muxer takes 30 to 80, no 5 kB of padding a
clip, the same bytes whatever FFmpeg is there. Layout: RIFF AVI { LIST hdrl { avih, LIST
strl { strh, strf } }, LIST movi { 00dc ... }, idx1 }.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

EXTENSION = "avi"
_MAX_BYTES = 2**31 - 2**20  # sizes are 32 bits wide, and some players read them as signed
_FRAME_ID = b"00dc"
_FRAME_ID_U4 = int.from_bytes(_FRAME_ID, "little")
_JPEG_BEGIN = b"\xff\xd8"
_INDEX_ENTRY = np.dtype(
    [("id", "<u4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")]
)
_FRAME_HEAD = np.dtype([("id", "<u4"), ("size", "<u4"), ("begin", "<u2")])  # of a chunk
_KEYFRAME = 0x10
_HAS_INDEX = 0x10
_NO_FRAME = "every frame of the clip must be a JPEG where its index says, but one is not."
_AVI_RATE_LIMIT = 1001  # denominators up to that of 30000/1001 frames a second


def _chunk(name: bytes, *parts: bytes) -> bytes:
    return name + struct.pack("<I", sum(map(len, parts))) + b"".join(parts)


def pack_frames(jpegs: Sequence[bytes], fps: float, width: int, height: int) -> bytes:
    """The AVI file that holds `jpegs` (each width x height pixels) as its frames, at
    `fps` frames a second.

    Raises ValueError for no frames, a frame that is not a JPEG, an fps that is not
    positive, or over 2 GiB.
    """
    if not jpegs:
        raise ValueError("a clip must hold at least one frame, but holds none.")
    if not all(jpeg[:2] == _JPEG_BEGIN for jpeg in jpegs):
        raise ValueError(
            "every frame of a clip must be a JPEG, but one does not begin as a JPEG does."
        )
    if not 0 < fps < 10_000:
        raise ValueError(f"fps must be above 0 and below 10,000, but is {fps}.")
    # Where each chunk begins, counted from the word `movi`: a head of 8 bytes, the JPEG,
    # and one byte more where its size is odd. The last offset is the end of the list.
    sizes = np.fromiter(map(len, jpegs), np.int64, len(jpegs))
    offsets = 4 + np.concatenate([[0], np.cumsum(8 + sizes + sizes % 2)])
    if offsets[-1] > _MAX_BYTES:
        raise ValueError(
            f"a clip must be below 2 GiB, but its frames take {offsets[-1]:,} bytes."
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
    """The list `hdrl`. largest: bytes of the largest frame, from which players size buffers."""
    rate = Fraction(fps).limit_denominator(_AVI_RATE_LIMIT)
    if rate == 0:
        rate = Fraction(1, _AVI_RATE_LIMIT)
    # The file: microseconds a frame, flags, numbers of frames and streams, size.
    avih = struct.pack(
        "<14I", round(1e6 / rate), 0, 0, _HAS_INDEX, num_frames, 0, 1, largest,
        width, height, 0, 0, 0, 0,
    )  # fmt: skip
    # Its only stream: codec, frames a second as a fraction, length.
    strh = struct.pack(
        "<4s4sIHHIIIIIIII4H", b"vids", b"MJPG",
        0, 0, 0, 0, rate.denominator, rate.numerator, 0, num_frames,
        largest, 0xFFFFFFFF, 0, 0, 0, width, height,
    )  # fmt: skip
    # The picture, as Windows' BITMAPINFOHEADER of 40 bytes: 1 plane of 24 bits a pixel.
    strf = struct.pack(
        "<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0
    )
    stream = _chunk(b"LIST", b"strl", _chunk(b"strh", strh), _chunk(b"strf", strf))
    return _chunk(b"LIST", b"hdrl", _chunk(b"avih", avih), stream)


def frame_spans(member: bytes | memoryview) -> np.ndarray:
    """(offset, size) of each JPEG within the member, in order; int64 of shape (frames, 2).

    Every length is checked against the bytes that are there, so a span can always be
    sliced. Raises ValueError if the member is not a whole Motion-JPEG AVI with an index.
    """
    spans = indexed_spans(member)
    check_frames(member, spans)
    return spans


def indexed_spans(member: bytes | memoryview) -> np.ndarray:
    """`frame_spans` as the index has them, without a look at what is there:
    `check_frames` does that."""
    data = np.frombuffer(member, np.uint8)
    if len(data) < 12 or bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"AVI ":
        raise ValueError(
            "a clip must be an AVI file, but its first bytes are not those of one."
        )
    (riff_size,) = struct.unpack_from("<I", member, 4)
    if riff_size + 8 > len(data):
        raise ValueError(
            f"the clip must hold {riff_size + 8:,} bytes as it says, but holds "
            f"{len(data):,}."
        )
    (movi, movi_end), (idx1, idx1_end) = _lists(member, riff_size + 8)
    if (idx1_end - idx1) % 16 or idx1_end == idx1:
        raise ValueError(
            "the clip's index must hold 16 bytes a frame and at least one frame, but does "
            "not."
        )
    index = np.frombuffer(member, _INDEX_ENTRY, (idx1_end - idx1) // 16, idx1)
    if (index["id"] != _FRAME_ID_U4).any():
        raise ValueError(_NO_FRAME)
    # int64: sums of the 32-bit numbers that a damaged index holds must not wrap around.
    offsets, sizes = index["offset"].astype(np.int64), index["size"].astype(np.int64)
    begins = offsets + movi + 8  # past the chunk's name and size
    ends = begins + sizes
    # Frames are contiguous, so checking the last end and the order bounds every
    # span.
    if (
        (sizes < 4).any()
        or offsets[0] < 4
        or (begins[1:] < ends[:-1] + 8).any()
        or ends[-1] > movi_end
    ):
        raise ValueError(
            "the clip's index must name frames in order within its data, but does not."
        )
    return np.stack([begins, sizes], axis=1)


def check_frames(member: bytes | memoryview, spans: np.ndarray) -> None:
    """Raise ValueError unless a JPEG of that size begins at each of these spans."""
    # The chunk heads, gathered from a view that sees one beginning at every byte.
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
    """(begin, end) of the movi list (from the word `movi`) and of the idx1 chunk's content."""
    # From chunk to chunk at the file's top level, behind `RIFF`, its size and `AVI `.
    movi = idx1 = None
    position = 12
    while position + 12 <= end:
        name, size, kind = struct.unpack_from("<4sI4s", member, position)
        begin, position = position + 8, position + 8 + size + size % 2
        if begin + size > end:
            raise ValueError(
                f"chunk {name!r} of the clip must end within the file, but does not."
            )
        if name == b"LIST" and kind == b"movi":
            movi = begin, begin + size
        elif name == b"idx1":
            idx1 = begin, begin + size
    if movi is None or idx1 is None:
        raise ValueError(
            f"the clip must have {'frames' if movi is None else 'an index'}, but has none."
        )
    return movi, idx1
