"""Cache files in a folder of bounded size that several processes fill and read at once.

A file is fetched as `NAME.{bytes}.part` and renamed when it is complete. The process that
fetches it holds a lock (flock) on the part. The lock ends with the process, and the next
process continues the part. Making room requires the lock of the folder. A removed file
stays readable for processes that have it open.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flallm_ds.errors import RankError

POLL_S = 0.05

_held: set[int] = set()  # locked descriptors of this process


def _close_held() -> None:
    """Close the descriptors that a forked child inherited."""
    for fd in list(_held):
        os.close(fd)
    _held.clear()


# Otherwise a forked child keeps its parent's locks after the parent's death.
os.register_at_fork(after_in_child=_close_held)


@dataclass(frozen=True)
class FileCache:
    """A cache with at most `max_bytes` of files in `{folder}/*/shards/`.

    The least recently used file is removed first. Other files (`{folder}/*/tables/`) do not
    count and are kept. stuck_s: how long another process may hold a file without fetching
    a byte.
    """

    folder: Path
    max_bytes: int
    stuck_s: float

    def find(self, place: str, num_bytes: int | None = None) -> int | None:
        """Return an open descriptor of a complete file of this size, None if there is none.

        The file is marked as used now.
        """
        try:
            fd = os.open(self.folder / place, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if num_bytes is not None and os.fstat(fd).st_size != num_bytes:
            os.close(fd)
            return None
        # The time stamp tells which file was used least recently.
        with contextlib.suppress(OSError):  # the file may belong to another user
            os.utime(fd)
        return fd

    def make_folder(self, folder: Path) -> None:
        """Make a folder in the cache.

        Raises RankError if the cache folder has other files: making room removes all files
        in `*/shards/`, which could then be somebody's data.
        """
        lock = self.folder / "lock"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            others = {path.name for path in self.folder.iterdir()} - {"lost+found"}
            # The lock is looked for after the listing, because another process that begins
            # this cache makes its lock first.
            if others and not lock.exists():
                raise RankError(
                    "The cache folder must be new, empty or a cache already, got "
                    f"{self.folder} with {min(others)}. Set --data.cache_dir to another "
                    "folder."
                )
            lock.touch()
            folder.mkdir(parents=True, exist_ok=True)

    def obtain(
        self,
        place: str,
        num_bytes: int | None,
        fill: Callable[[int], None],
        *,
        wait: bool = True,
    ) -> int | None:
        """Return an open descriptor of a file, after fetching the file if necessary.

        fill: writes the file into an open descriptor. One process fetches and the others
        wait. wait: without it, return None if another process is fetching the file, or if
        there is no room while other files are being fetched.
        Raises RankError if another process holds the file for too long.
        """
        part = self.folder / f"{place}.{num_bytes or 0}.part"
        seen, since = -1, time.monotonic()
        while True:
            if (fd := self.find(place, num_bytes)) is not None:
                return fd
            # If the part cannot be locked, another process fetches it or needs the room.
            self.make_folder(part.parent)
            with disk_errors(self.folder):
                claimed = self._claim(place, part, num_bytes or 0)
            if claimed is not None:
                return self._fill(claimed, self.folder / place, part, fill)
            if not wait:
                return None
            # The other process has time as long as its part grows.
            if (size := _size(part)) != seen:
                seen, since = size, time.monotonic()
            if time.monotonic() - since > self.stuck_s:
                raise RankError(
                    f"{part} is in use by another process, which has fetched nothing for "
                    f"{self.stuck_s:.0f} s. Stop that process, or set --data.cache_dir to "
                    "another folder."
                )
            time.sleep(POLL_S)

    def _fill(self, fd: int, path: Path, part: Path, fill: Callable[[int], None]) -> int:
        """Fetch a locked part, rename it, and return an open descriptor of the file."""
        try:
            fill(fd)
            with disk_errors(self.folder):
                # After a power cut, a file of the right size must not have other bytes.
                os.fsync(fd)
                opened = os.open(part, os.O_RDONLY)
                part.replace(path)
            return opened
        except BaseException:
            # An empty part is of no use to the next process.
            if os.fstat(fd).st_size == 0:
                part.unlink(missing_ok=True)
            raise
        finally:
            _release(fd)

    def _claim(self, place: str, part: Path, num_bytes: int) -> int | None:
        """Return a locked descriptor of the part, None if it is in use or has no room."""
        # Under the folder's lock, so that two processes do not count the same free space.
        with self._folder_lock():
            # The file has just arrived, or has a wrong size.
            if (fd := self.find(place)) is not None:
                if os.fstat(fd).st_size != num_bytes and num_bytes:
                    (self.folder / place).unlink(missing_ok=True)
                os.close(fd)
                return None
            fd = _lock(part)
            if fd is None:
                return None
            if self._make_room(num_bytes, part):
                return fd
            if os.fstat(fd).st_size == 0:
                part.unlink()
            _release(fd)
            return None

    def _make_room(self, num_bytes: int, part: Path) -> bool:
        """Return whether `num_bytes` fit, after removing the least recently used files.

        Requires the lock of the folder.
        """
        if num_bytes == 0:
            return True

        # The new file, complete files, and parts with their final size count. A part that
        # no process is fetching can be removed like a complete file.
        total = num_bytes
        removable = []
        for path in self.folder.glob("*/shards/*"):
            if path == part:
                continue
            size, used = _size(path), _used(path)
            if path.suffix == ".part":
                fd = _lock(path, create=False)
                if fd is None:  # being fetched; its name holds its final size
                    total += max(size, int(path.stem.rpartition(".")[2]))
                    continue
                _release(fd)
            total += size
            removable.append((used, size, path))

        for _, size, path in sorted(removable):  # the least recently used first
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total <= self.max_bytes

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Hold the lock of the folder. Raises RankError if another process keeps it."""
        began = time.monotonic()
        while (fd := _lock(self.folder / "lock")) is None:
            if time.monotonic() - began > self.stuck_s:
                raise RankError(
                    f"{self.folder / 'lock'} is in use by another process for more than "
                    f"{self.stuck_s:.0f} s. Stop that process, or set --data.cache_dir to "
                    "another folder."
                )
            time.sleep(POLL_S / 10)
        try:
            yield
        finally:
            _release(fd)


# The locks of `flallm_ds.files` do not fit here: this code locks the descriptor through
# which it writes and reads, renames the file while it is locked, and in one case must not
# create a missing file.
def _lock(path: Path, create: bool = True) -> int | None:
    """Return a locked descriptor of the file with this name, None if it is locked."""
    try:
        fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if create:
            raise
        return None
    _held.add(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file may have been renamed or removed before it was locked.
        if path.stat().st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        _release(fd)
        raise
    _release(fd)
    return None


def _release(fd: int) -> None:
    """Unlock and close a descriptor."""
    _held.discard(fd)
    with contextlib.suppress(OSError):
        # Closing does not unlock a file that a forked child has open.
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _size(path: Path) -> int:
    """Return the size in bytes, 0 if the file is missing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _used(path: Path) -> float:
    """Return the time of the last use, 0 if the file is missing."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a RankError about the cache folder."""
    try:
        yield
    except OSError as error:
        raise RankError(
            f"Cannot use the cache folder: {error.strerror}: {error.filename or folder}. Set "
            "--data.cache_dir to another folder."
        ) from None
