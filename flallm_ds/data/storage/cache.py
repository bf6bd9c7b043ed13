"""A bounded folder of files that several processes fill and read at once.

A file is fetched under `NAME.{bytes}.part` and renamed when it is whole. Who fetches
holds a lock (flock) on the part, which its death releases; what a dead fetcher left is
taken up by the next. Whoever makes room holds the lock of the folder. A file that is
removed stays readable to those who have it open.
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
    for fd in list(_held):
        os.close(fd)
    _held.clear()


# A child of a fork would hold its parent's locks beyond the parent's death.
os.register_at_fork(after_in_child=_close_held)


@dataclass(frozen=True)
class FileCache:
    """At most `max_bytes` of files in `{folder}/*/shards/`, the least recently used
    removed first.

    Files beside that (`{folder}/*/tables/`) do not count and are kept. stuck_s: how long
    another process may hold a file without bringing a byte.
    """

    folder: Path
    max_bytes: int
    stuck_s: float

    def find(self, place: str, num_bytes: int | None = None) -> int | None:
        """An open descriptor of a whole file of this size, marked as used now; None where
        there is none."""
        try:
            fd = os.open(self.folder / place, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if num_bytes is not None and os.fstat(fd).st_size != num_bytes:
            os.close(fd)
            return None
        with contextlib.suppress(OSError):  # another user's file cannot be marked
            os.utime(fd)
        return fd

    def make_folder(self, folder: Path) -> None:
        """Make a folder within the cache. Raises RankError where the cache's folder holds
        something else.

        Whatever lies in `*/shards/` is removed to make room: in a folder of other files,
        these would be lost.
        """
        lock = self.folder / "lock"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            others = {path.name for path in self.folder.iterdir()} - {"lost+found"}
            # Looked for after the listing: another process that begins this cache makes
            # its lock first.
            if others and not lock.exists():
                raise RankError(
                    "the cache must be a new or empty folder, or one that was a cache "
                    f"before, got {self.folder}, which holds {min(others)}. Set "
                    "--data.cache_dir to another folder."
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
        """An open descriptor of a file, fetched by `fill` (given an open file to write)
        if it is not there.

        One process fetches and the others wait. Without `wait`: None where another one is
        fetching it, or where there is no room beside what is being fetched.
        """
        part = self.folder / f"{place}.{num_bytes or 0}.part"
        seen, since = -1, time.monotonic()
        while True:
            if (fd := self.find(place, num_bytes)) is not None:
                return fd
            self.make_folder(part.parent)
            with disk_errors(self.folder):
                claimed = self._claim(place, part, num_bytes or 0)
            if claimed is not None:
                return self._fill(claimed, self.folder / place, part, fill)
            if not wait:
                return None
            # The one who fetches has time as long as bytes arrive.
            if (size := _size(part)) != seen:
                seen, since = size, time.monotonic()
            if time.monotonic() - since > self.stuck_s:
                raise RankError(
                    f"another process must fetch {part}, but brought nothing for "
                    f"{self.stuck_s:.0f} s. End it, or set --data.cache_dir to another "
                    "folder."
                )
            time.sleep(POLL_S)

    def _fill(self, fd: int, path: Path, part: Path, fill: Callable[[int], None]) -> int:
        try:
            fill(fd)
            with disk_errors(self.folder):
                # so that a power cut leaves no file of the right size and other bytes
                os.fsync(fd)
                opened = os.open(part, os.O_RDONLY)
                part.replace(path)
            return opened
        except BaseException:
            if os.fstat(fd).st_size == 0:
                part.unlink(missing_ok=True)
            raise
        finally:
            _release(fd)

    def _claim(self, place: str, part: Path, num_bytes: int) -> int | None:
        """A locked descriptor of the part, where it is free and there is room for it."""
        with self._folder_lock():
            # just arrived, or of another size than it must have
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
        """Whether `num_bytes` fit now; removes the least recently used for it. Under the
        folder's lock."""
        if num_bytes == 0:
            return True

        # What counts: the file to come, files that are there, and parts at the size that
        # they will have. Parts that nobody fetches any more can be removed too.
        total = num_bytes
        removable = []
        for path in self.folder.glob("*/shards/*"):
            if path == part:
                continue
            size, used = _size(path), _used(path)
            if path.suffix == ".part":
                fd = _lock(path, create=False)
                if fd is None:  # being fetched: all that it will be
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
        began = time.monotonic()
        while (fd := _lock(self.folder / "lock")) is None:
            if time.monotonic() - began > self.stuck_s:
                raise RankError(
                    f"another process must release {self.folder / 'lock'}, but holds it "
                    f"for {self.stuck_s:.0f} s now. End it, or set --data.cache_dir to "
                    "another folder."
                )
            time.sleep(POLL_S / 10)
        try:
            yield
        finally:
            _release(fd)


# Not the locks of `flallm_ds.files`: the descriptor that is locked is the one that is
# written to and read by offset, its file is renamed while it is locked, and a file that
# is not there must not be made.
def _lock(path: Path, create: bool = True) -> int | None:
    """A locked descriptor of the file that bears this name now, or None where another
    holds it."""
    try:
        fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if create:
            raise
        return None
    _held.add(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # and was not renamed or removed meanwhile
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
    _held.discard(fd)
    with contextlib.suppress(OSError):
        # closing is not enough while a child of a fork has it open
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A cache folder that cannot be used is one sentence."""
    try:
        yield
    except OSError as error:
        raise RankError(
            "the cache must be a folder that can be written and locked, but "
            f"{error.strerror}: {error.filename or folder}. Set --data.cache_dir to "
            "another folder."
        ) from None
