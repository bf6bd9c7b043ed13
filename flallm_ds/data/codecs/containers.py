"""Check that a video file is complete, by the sizes in its container."""

import struct
from pathlib import Path
from typing import BinaryIO


def check_whole(path: Path) -> None:
    """Raise ValueError if the file is shorter than its container says.

    A download that was cut off leaves such a file. Decoders often read it without an error.
    """
    # The first bytes give the container: the name of the first box for mp4 and mov, EBML's
    # magic number for Matroska and WebM, RIFF for AVI.
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            needed = _mp4_bytes(file, size)
        elif head[:4] == b"\x1aE\xdf\xa3":
            needed = _matroska_bytes(head)
        elif head[:4] == b"RIFF":
            needed = 8 + int.from_bytes(head[4:8], "little")
        else:
            return
    if needed > size:
        raise ValueError(
            f"the file must have {needed:,} bytes as its header says, got {size:,}"
        )


def _mp4_bytes(file: BinaryIO, size: int) -> int:
    """Return where the last box with video data ends; other bytes may follow it."""
    # An mp4 is a list of boxes: a length of 4 bytes, a name of 4 bytes, the content. Only
    # these three hold what a decoder needs: headers, frames, and headers of fragments.
    position = needed = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, name = struct.unpack_from(">I4s", head)
        # A box over 4 GiB has its length in the 8 bytes after its name.
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack_from(">Q", head, 8)
        if name in (b"moov", b"mdat", b"moof"):
            needed = position + length
        if length < 8:  # 0: the box ends with the file
            break
        position += length
    return needed


def _matroska_bytes(head: bytes) -> int:
    """Return where the segment ends; 0 if the file does not say, as in a live recording."""
    position, length = _ebml_length(head, 4)  # the header element
    position, length = _ebml_length(head, position + length + 4)  # the segment element
    return position + length if length else 0


def _ebml_length(head: bytes, position: int) -> tuple[int, int]:
    """Return where an element's content begins, and its length.

    The length is 0 if it is unknown or after the end of `head`.
    """
    if position >= len(head) or head[position] == 0:
        return position, 0
    # The leading zeros of the first byte give the number of bytes of the length. A length
    # of ones only is unknown.
    num_bytes = 9 - head[position].bit_length()
    mask = (1 << 7 * num_bytes) - 1
    length = int.from_bytes(head[position : position + num_bytes], "big") & mask
    return position + num_bytes, 0 if length == mask else length
