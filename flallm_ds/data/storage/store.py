"""Where shards lie: a folder, or an address whose shards are fetched into a bounded cache."""

import hashlib
import os
import re
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self, cast

from flallm_ds.data.storage.cache import FileCache, disk_errors
from flallm_ds.data.storage.fetch import (
    FsspecSource,
    Patience,
    Refused,
    fetch,
    persist,
    printable,
)
from flallm_ds.errors import RankError, UserError
from flallm_ds.files import file_sha256, open_regular, sha256_of, write_file

if TYPE_CHECKING:
    from flallm_ds.config import DataConfig

FETCHERS = 2  # threads of a store that read ahead
# at index.json: at the start a person waits, and an address may be mistyped
INDEX_ATTEMPTS = 5
SHARE_AHEAD = 0.5  # of the cache; the rest is for what is in use

# No slash, no leading dot or dash, nothing that a shell reads: an index names files of
# its own folder only.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]+")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# of fsspec: one file system on top of another
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::.*://")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name within the folder, its size in bytes, its checksum and its
    number of clips."""

    file: str
    bytes: int
    sha256: str
    clips: int

    def __post_init__(self) -> None:
        checked_name(self.file)
        checksum = isinstance(self.sha256, str) and _SHA256.fullmatch(self.sha256)
        if not is_count(self.bytes) or not checksum:
            raise UserError(
                f"index.json must give a shard's size and sha256, but gives {self.bytes!r} "
                f"and {self.sha256!r} for {self.file}. Build the shards again."
            )
        if not is_count(self.clips):
            raise UserError(
                f"index.json must give a shard's number of clips, got {self.clips!r} for "
                f"{self.file}. Build the shards again."
            )


@dataclass(frozen=True)
class CacheOptions:
    """What a remote store may use of this machine; a local folder needs none of it."""

    folder: Path | None = None  # default: $FLALLM_CACHE, or ~/.cache/flallm_ds
    max_gb: float = 100.0  # of shards, over all addresses, 1e9 bytes each

    @classmethod
    def of_run(cls, data: "DataConfig") -> Self:
        return cls(Path(data.cache_dir) if data.cache_dir else None, data.cache_gb)


class Store(Protocol):
    """A place that holds the files of one shard folder. Picklable; any thread may call it."""

    @property
    def root(self) -> str:
        """The folder or address, for people: without credentials."""
        ...

    def file(self, name: str, sha256: str | None = None) -> Path:
        """Path of a small file of the folder (index.json, a table); whether it is there
        and unchanged is the caller's to check. sha256: a cached copy with this checksum
        will do; else it is fetched again.
        """
        ...

    def open(self, shard: Shard) -> BinaryIO:
        """The shard, unbuffered, for os.pread; fetched and checked where it is remote.

        Raises FileNotFoundError where a local one is missing, RankError where a remote
        one cannot be had.
        """
        ...

    def want(self, shards: Sequence[Shard]) -> None:
        """Read ahead, in this order of need, instead of what was wanted before; returns
        at once."""
        ...

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        """Raise UserError if a shard is missing or is not of its size (or, if asked, of
        its checksum)."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder on a disk."""

    root: str

    def file(self, name: str, sha256: str | None = None) -> Path:
        return Path(self.root) / checked_name(name)

    def open(self, shard: Shard) -> BinaryIO:
        return open_regular(self.file(shard.file))

    def want(self, shards: Sequence[Shard]) -> None:
        pass

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        for shard in shards:
            path = self.file(shard.file)
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"holds {found:,} bytes"
                raise UserError(
                    f"shard must hold {shard.bytes:,} bytes as its index says, but {what}: "
                    f"{path}. Run python shards/verify.py {self.root}, then build the "
                    "shards again."
                )
            if checksums and (found_sha := file_sha256(path)) != shard.sha256:
                raise UserError(
                    f"shard must have sha256 {shard.sha256} as its index says, but has "
                    f"{found_sha}: {path}. Run python shards/verify.py {self.root}, then "
                    "build the shards again."
                )


class RemoteStore:
    """A folder at an address. Its shards pass through a cache that all processes of a
    machine share.

    Safe to pickle, to use from many threads, and to carry over a fork: threads and
    connections are made when they are first needed, in each process.
    """

    def __init__(
        self, root: str, options: CacheOptions, patience: Patience | None = None
    ) -> None:
        patience = patience or Patience()
        self._address, self._options, self._patience = root, options, patience
        folder = options.folder
        if folder is None:
            default = os.environ.get("FLALLM_CACHE") or "~/.cache/flallm_ds"
            folder = Path(default).expanduser()
        # Nobody holds a file longer than its time for all attempts and one silence more.
        stuck_s = patience.total_s + 2 * patience.stall_s
        self._cache = FileCache(folder.absolute(), int(options.max_gb * 1e9), stuck_s)
        # Without credentials, which change: a checksum says that it is the same file.
        self._place = hashlib.sha256(printable(root).encode()).hexdigest()[:16]
        self._start_afresh()  # which finds an address that cannot be used
        _stores.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self._address, self._options, self._patience)

    def __repr__(self) -> str:
        return f"RemoteStore({self.root})"

    def _start_afresh(self) -> None:
        """No threads, no connections: at the start, and in a child of a fork, where the
        parent's are dead."""
        self._lock = threading.Lock()
        self._wanted: dict[Shard, None] = {}
        # monotonic; wanted shards that are being seen to
        self._retry_at: dict[Shard, float] = {}
        self._num_threads = 0
        self._source = FsspecSource(self._address, self._patience)

    @property
    def root(self) -> str:
        return printable(self._address)

    def file(self, name: str, sha256: str | None = None) -> Path:
        checked_name(name)
        return self._latest(name) if sha256 is None else self._table(name, sha256)

    def _table(self, name: str, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):  # it becomes part of a path
            raise UserError(
                f"index.json must give the sha256 of {name}, but gives {sha256!r}: "
                f"{self.root}. Do not use these shards, or build them again."
            )
        place = f"{self._place}/tables/{sha256[:16]}-{name}"
        path = self._cache.folder / place
        if path.is_file() and file_sha256(path) != sha256:
            path.unlink(missing_ok=True)

        def fill(fd: int) -> None:
            fetch(self._source, name, fd, None, sha256, self._patience)

        fd = self._cache.obtain(place, None, fill)
        assert fd is not None
        os.close(fd)
        return path

    def _latest(self, name: str) -> Path:
        """The file as it is now; where the server cannot be reached, as it was last, with
        a warning."""
        path = self._cache.folder / self._place / name
        brief = replace(
            self._patience, attempts=min(INDEX_ATTEMPTS, self._patience.attempts)
        )
        with tempfile.TemporaryFile() as file:
            try:
                fetch(self._source, name, file.fileno(), None, None, brief)
            except RankError as error:
                if isinstance(error, Refused):  # so it is for every rank
                    raise UserError(str(error)) from None
                if not path.is_file():
                    raise
                warning = f"warning: {error} What was fetched before is used."
                print(warning, file=sys.stderr, flush=True)
                return path
            content = file.read()
        self._cache.make_folder(path.parent)
        with disk_errors(path.parent):
            write_file(path, content)
        return path

    def open(self, shard: Shard) -> BinaryIO:
        with self._lock:
            moved = shard in self._wanted
            self._wanted.pop(shard, None)
        if moved:
            self._read_ahead()
        fd = self._obtain(shard, wait=True)
        assert fd is not None
        return cast(BinaryIO, os.fdopen(fd, "rb", buffering=0))

    def _obtain(self, shard: Shard, wait: bool) -> int | None:
        if shard.bytes > self._cache.max_bytes:
            raise UserError(
                f"a shard must fit into the cache of {self._cache.max_bytes:,} bytes, but "
                f"{shard.file} of {self.root} holds {shard.bytes:,}. Set --data.cache_gb "
                "higher."
            )

        def fill(fd: int) -> None:
            fetch(self._source, shard.file, fd, shard.bytes, shard.sha256, self._patience)

        return self._cache.obtain(self._place_of(shard), shard.bytes, fill, wait=wait)

    def _place_of(self, shard: Shard) -> str:
        # The checksum in the name: shards that were built again are other files.
        return f"{self._place}/shards/{shard.sha256[:16]}-{shard.file}"

    def _has(self, shard: Shard) -> bool:
        fd = self._cache.find(self._place_of(shard), shard.bytes)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def want(self, shards: Sequence[Shard]) -> None:
        with self._lock:
            self._wanted = dict.fromkeys(shards)
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Start the threads that are lacking; they end when nothing is left to do."""
        with self._lock:
            lacking = FETCHERS - self._num_threads if self._wanted else 0
            self._num_threads += lacking
        for _ in range(lacking):
            threading.Thread(
                target=self._fetch_wanted, name="read-ahead", daemon=True
            ).start()

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                shard, wait_s = self._next_wanted()
                if shard is None and wait_s is None:
                    self._num_threads -= 1
                    return
            if shard is None:
                time.sleep(wait_s or 0)
                continue
            failed = True
            try:
                fd = self._obtain(shard, wait=False)
                failed = False
                if fd is not None:
                    os.close(fd)
            except Exception:  # noqa: BLE001 - who opens the shard meets the same, and says it
                pass
            with self._lock:
                # Where another process is fetching it, or no room is left, look again in
                # a moment.
                self._retry_at[shard] = time.monotonic() + 0.5
                if failed:
                    self._wanted.pop(shard, None)

    def _next_wanted(self) -> tuple[Shard | None, float | None]:
        """(the next shard to fetch, None) or (None, seconds until there may be one) or
        (None, None)."""
        # The stores of this process that read ahead into the same cache share its room.
        num_sharing = 0
        for store in list(_stores):
            if store._wanted and store._cache.folder == self._cache.folder:
                num_sharing += 1
        left = self._cache.max_bytes * SHARE_AHEAD / max(num_sharing, 1)

        now = time.monotonic()
        busy = False
        for shard in self._wanted:
            left -= shard.bytes
            if left < 0:
                break
            if self._retry_at.get(shard, 0.0) > now:
                busy = True
            # also marks it as used, so that it is not removed before
            elif not self._has(shard):
                self._retry_at[shard] = float("inf")
                return shard, None
        return None, 0.1 if busy else None

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        try:
            if checksums:
                for shard in shards:
                    self._check_bytes(shard)
                return
            # What is in the cache was checked when it came.
            lacking = list(filterfalse(self._has, shards))
            if not lacking:
                return
            names = [shard.file for shard in lacking]
            must = f"the shards of {self.root} must be there"
            sizes = persist(lambda: self._source.sizes(names), must, self._patience)
        except RankError as error:
            raise UserError(str(error)) from None
        for shard, found in zip(lacking, sizes, strict=True):
            if found is not None and found != shard.bytes:
                raise UserError(
                    f"shard must hold {shard.bytes:,} bytes as its index says, but holds "
                    f"{found:,} bytes: {self._source.address(shard.file)}. Upload the "
                    "folder again."
                )

    def _check_bytes(self, shard: Shard) -> None:
        with self.open(shard) as file:
            found = sha256_of(file)
        if found != shard.sha256:  # it was right when it came
            (self._cache.folder / self._place_of(shard)).unlink(missing_ok=True)
            self.open(shard).close()


_stores: "weakref.WeakSet[RemoteStore]" = weakref.WeakSet()
_left_behind: list[FsspecSource] = []


def _after_fork() -> None:
    for store in list(_stores):
        # to close the parent's connections would wait for its dead thread
        _left_behind.append(store._source)
        store._start_afresh()


os.register_at_fork(after_in_child=_after_fork)


def open_store(root: str | Path, cache: CacheOptions | None = None) -> Store:
    """The store at `root`: a folder, or an address (https://, s3://, any other of fsspec).

    Nothing is read yet. Raises UserError for an address that cannot be used.
    """
    root, cache = str(root), cache or CacheOptions()
    # of webdataset: a shell command, which a run's config.json could bring
    if root.startswith("pipe:"):
        raise UserError(
            "data.shards must name folders or addresses, got a command (pipe:), which is "
            "never run. Copy the shards to a folder, or give an address that begins with "
            "https://, s3:// or another protocol of fsspec."
        )
    if _CHAIN.match(root):
        raise UserError(
            "an address must begin with its protocol (https://, s3://, ...), got "
            f"{root.split('::')[0]}:: before it. Leave that out: shards are cached as they "
            "are."
        )
    if address := _ADDRESS.match(root):
        return RemoteStore(address[0].lower() + root[address.end() :], cache)
    return LocalStore(root)


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number of bytes or clips that numpy can hold."""
    return type(value) is int and 0 <= value < 2**63


def checked_name(name: str) -> str:
    """`name` if it is a plain file name; an index from elsewhere may name anything.
    Raises UserError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            "file names in index.json must consist of letters, digits, '_', '.' and '-', "
            f"but one is {name!r}. Do not use these shards, or build them again."
        )
    return name
