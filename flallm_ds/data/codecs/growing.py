"""Read a video that another process is still writing, such as a recording."""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.2  # between two looks at a file that has not grown
_HEAD_BYTES = 2**20  # of a file, which contain the header of a video


class GrowingFile:
    """A file that is read as a stream, while another process appends to it.

    idle_s: the file has ended if it has not grown for this time in seconds. Ctrl-C while it
    waits ends it as well. Raises OSError, and ValueError for a container that can only be
    read when it is complete.
    """

    def __init__(self, path: Path, idle_s: float) -> None:
        check_can_grow(path)
        self._file = path.open("rb", buffering=0)
        self._idle_s = idle_s
        self._has_ended = False

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; none at the end. FFmpeg calls this."""
        grown_s = time.monotonic()
        # PyAV would print a KeyboardInterrupt that this method raises, and read again.
        with suppress(KeyboardInterrupt):
            while not self._has_ended and time.monotonic() - grown_s < self._idle_s:
                if content := self._file.read(size):
                    return content
                time.sleep(_POLL_S)
        self._has_ended = True
        return b""


def growing_list(find: Callable[[], list[Path]], idle_s: float) -> Iterator[Path]:
    """Yield the paths that `find` returns, also those that are added meanwhile.

    find: returns all paths in order, new ones last. The last file may be incomplete: it is
    yielded when another one follows, if nothing was added for `idle_s` seconds, or at
    Ctrl-C.
    """
    num_yielded = 0
    grown_s = time.monotonic()
    while time.monotonic() - grown_s < idle_s:
        paths = find()
        if len(paths) > num_yielded + 1:
            yield from paths[num_yielded:-1]
            num_yielded = len(paths) - 1
            grown_s = time.monotonic()
            continue
        try:
            time.sleep(_POLL_S)
        except KeyboardInterrupt:
            break
    yield from find()[num_yielded:]


def check_can_grow(path: Path) -> None:
    """Raise ValueError unless the container can be read while it is written.

    These are MPEG-TS, Matroska, WebM, FLV, and mp4 in fragments. Other files have an index
    at their end, or sizes in their header that are written last. Raises OSError.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    is_ts = head[:1] == b"G" and head[188:189] in (b"G", b"")
    if is_ts or head[:4] == b"\x1aE\xdf\xa3" or head[:3] == b"FLV" or _is_fragmented(head):
        return
    raise ValueError(
        "only MPEG-TS, Matroska, WebM, FLV and fragmented mp4 (and folders of images) can be "
        "read while they are written"
    )


def _is_fragmented(head: bytes) -> bool:
    """Return whether an mp4 begins with a header for fragments, before any frame."""
    position = 0
    while position + 8 <= len(head):
        length, name = struct.unpack_from(">I4s", head, position)
        if name == b"moov":
            # The box `mvex` says that fragments follow.
            return b"mvex" in head[position : position + length]
        if name == b"mdat" or length < 8:
            return False
        position += length
    return False
