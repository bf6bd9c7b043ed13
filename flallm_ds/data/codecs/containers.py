"""Whether a video file is whole, by the sizes that its container names."""

import struct
from pathlib import Path
from typing import BinaryIO


def check_whole(path: Path) -> None:
    """Raise ValueError if the container says that it is longer than the file, as after a
    broken download.

    Decoders often end such a file without a word.
    """
    # The first bytes tell the container: mp4 and mov by the name of their first box,
    # Matroska and WebM by EBML's magic number, AVI by RIFF.
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
        raise ValueError(f"it must hold {needed:,} bytes as it says, but holds {size:,}")


def _mp4_bytes(file: BinaryIO, size: int) -> int:
    """Where the last box that matters ends; bytes that are no box may follow it."""
    position = needed = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, name = struct.unpack_from(">I4s", head)
        # A box over 4 GiB has its length in the 8 bytes behind its name.
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack_from(">Q", head, 8)
        if name in (b"moov", b"mdat", b"moof"):
            needed = position + length
        if length < 8:  # 0 means: to the end of the file
            break
        position += length
    return needed


def _matroska_bytes(head: bytes) -> int:
    """Where the segment ends, 0 where the file does not say (a live recording)."""
    position, length = _ebml_length(head, 4)  # the header element
    position, length = _ebml_length(head, position + length + 4)  # the segment element
    return position + length if length else 0


def _ebml_length(head: bytes, position: int) -> tuple[int, int]:
    """(where the element's content begins, its length or 0 where it is unknown or lies
    beyond `head`)."""
    if position >= len(head) or head[position] == 0:
        return position, 0
    # The zeros at the head of the first byte say how many bytes hold the length; all ones
    # stand for an unknown one.
    num_bytes = 9 - head[position].bit_length()
    mask = (1 << 7 * num_bytes) - 1
    length = int.from_bytes(head[position : position + num_bytes], "big") & mask
    return position + num_bytes, 0 if length == mask else length
