"""Open shards of a local folder, or of an address through a bounded cache."""

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
from flallm_ds.local_disk import cache_folder

if TYPE_CHECKING:
    from flallm_ds.config import DataConfig

FETCHERS = 2  # threads of a store that read ahead
# Few attempts for index.json: at the start a user waits, and the address may be mistyped.
INDEX_ATTEMPTS = 5
SHARE_AHEAD = 0.5  # share of the cache for reading ahead; the rest is for shards in use

# No slash, no leading dot or dash, no special character of a shell: an index may only name
# files of its own folder.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]+")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# fsspec's syntax for one file system on top of another
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::.*://")


@dataclass(frozen=True)
class Shard:
    """A tar of clips: file name, size in bytes, checksum and number of clips."""

    file: str
    bytes: int
    sha256: str
    clips: int

    def __post_init__(self) -> None:
        checked_name(self.file)
        checksum = isinstance(self.sha256, str) and _SHA256.fullmatch(self.sha256)
        if not is_count(self.bytes) or not checksum:
            raise UserError(
                f"index.json must give the size and sha256 of {self.file}, got "
                f"{self.bytes!r} and {self.sha256!r}. Build the shards again."
            )
        if not is_count(self.clips):
            raise UserError(
                f"index.json must give the number of clips of {self.file}, got "
                f"{self.clips!r}. Build the shards again."
            )


@dataclass(frozen=True)
class CacheOptions:
    """Options of the cache of a remote store; a local folder needs no cache."""

    folder: Path | None = None  # None: as `local_disk.cache_folder` chooses
    max_gb: float = 100.0  # limit for the shards of all addresses, in units of 1e9 bytes

    @classmethod
    def of_run(cls, data: "DataConfig") -> Self:
        """Read the options from the configuration of a run."""
        return cls(Path(data.cache_dir) if data.cache_dir else None, data.cache_gb)


class Store(Protocol):
    """Access to the files of one shard folder. It is picklable and thread-safe."""

    @property
    def root(self) -> str:
        """The folder or address for messages, without credentials."""
        ...

    def file(self, name: str, sha256: str | None = None) -> Path:
        """Return the path of a small file of the folder (index.json, a table).

        The caller checks that the file exists and is unchanged. sha256: a cached copy with
        this checksum is used; otherwise the file is fetched again.
        """
        ...

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard, unbuffered, for os.pread. A remote shard is fetched and checked.

        Raises FileNotFoundError if a local shard is missing, and RankError if a remote
        shard cannot be fetched.
        """
        ...

    def want(self, shards: Sequence[Shard]) -> None:
        """Start to read these shards ahead, in this order, and return at once.

        The shards of an earlier call are no longer read ahead.
        """
        ...

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        """Raise UserError if a shard is missing or has another size than in the index.

        checksums: compare the checksums too.
        """
        ...


@dataclass(frozen=True)
class LocalStore:
    """A shard folder on a disk."""

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
                what = "no file" if found is None else f"{found:,}"
                raise UserError(
                    f"Shard {path} must have {shard.bytes:,} bytes as its index says, got "
                    f"{what}. Run python shards/verify.py {self.root}, then build the shards "
                    "again."
                )
            if checksums and (found_sha := file_sha256(path)) != shard.sha256:
                raise UserError(
                    f"Shard {path} must have sha256 {shard.sha256} as its index says, got "
                    f"{found_sha}. Run python shards/verify.py {self.root}, then build the "
                    "shards again."
                )


class RemoteStore:
    """A shard folder at an address, with a cache that all processes of a machine share.

    The store can be pickled, used by several threads, and used after a fork: each process
    makes its threads and connections when it first needs them.
    """

    def __init__(
        self, root: str, options: CacheOptions, patience: Patience | None = None
    ) -> None:
        patience = patience or Patience()
        self._address, self._options, self._patience = root, options, patience
        folder = options.folder or cache_folder(os.environ)
        # A process that works holds a file for the time of all attempts at most. The margin
        # covers the last time-out.
        stuck_s = patience.total_s + 2 * patience.stall_s
        self._cache = FileCache(folder.absolute(), int(options.max_gb * 1e9), stuck_s)
        # The name of the folder in the cache leaves out credentials, because they change.
        self._place = hashlib.sha256(printable(root).encode()).hexdigest()[:16]
        self._reset()  # raises UserError if the address cannot be used
        _stores.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self._address, self._options, self._patience)

    def __repr__(self) -> str:
        return f"RemoteStore({self.root})"

    def _reset(self) -> None:
        """Begin without threads and connections.

        A forked child calls it too: the threads of its parent do not run there.
        """
        self._lock = threading.Lock()
        self._wanted: dict[Shard, None] = {}
        # shard -> when to try it again, by time.monotonic(); infinite while it is fetched
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
        """Return the path of a file with this checksum, after fetching it if needed."""
        # The checksum becomes part of a path, so `../` in it must be refused.
        if not _SHA256.fullmatch(sha256):
            raise UserError(
                f"index.json of {self.root} must give the sha256 of {name}, got {sha256!r}. "
                "Do not use these shards, or build them again."
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
        """Return the path of the current version of a file.

        If the server does not answer, the copy in the cache is used, with a warning.
        """
        path = self._cache.folder / self._place / name
        brief = replace(
            self._patience, attempts=min(INDEX_ATTEMPTS, self._patience.attempts)
        )
        # Fetch into a temporary file: a copy in the cache must survive a failed attempt.
        with tempfile.TemporaryFile() as file:
            try:
                fetch(self._source, name, file.fileno(), None, None, brief)
            except RankError as error:
                if isinstance(error, Refused):  # every rank finds the same
                    raise UserError(str(error)) from None
                if not path.is_file():
                    raise
                warning = f"warning: {error} The copy in the cache is used."
                print(warning, file=sys.stderr, flush=True)
                return path
            content = file.read()
        self._cache.make_folder(path.parent)
        with disk_errors(path.parent):
            write_file(path, content)
        return path

    def open(self, shard: Shard) -> BinaryIO:
        # A shard that is opened leaves the list, which makes room to read the next one.
        with self._lock:
            moved = shard in self._wanted
            self._wanted.pop(shard, None)
        if moved:
            self._read_ahead()
        fd = self._obtain(shard, wait=True)
        assert fd is not None
        return cast(BinaryIO, os.fdopen(fd, "rb", buffering=0))

    def _obtain(self, shard: Shard, wait: bool) -> int | None:
        """Return a descriptor of a shard, after fetching it; see `FileCache.obtain`."""
        if shard.bytes > self._cache.max_bytes:
            raise UserError(
                f"Shard {shard.file} of {self.root} must fit into the cache of "
                f"{self._cache.max_bytes:,} bytes, got {shard.bytes:,}. Raise "
                "--data.cache_gb."
            )

        def fill(fd: int) -> None:
            fetch(self._source, shard.file, fd, shard.bytes, shard.sha256, self._patience)

        return self._cache.obtain(self._place_of(shard), shard.bytes, fill, wait=wait)

    def _place_of(self, shard: Shard) -> str:
        # With the checksum, shards that were built again get other names.
        return f"{self._place}/shards/{shard.sha256[:16]}-{shard.file}"

    def _has(self, shard: Shard) -> bool:
        """Return whether a shard is in the cache, and mark it as used now."""
        fd = self._cache.find(self._place_of(shard), shard.bytes)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def want(self, shards: Sequence[Shard]) -> None:
        with self._lock:
            self._wanted = dict.fromkeys(shards)
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Start the missing threads. They end when there is nothing left to fetch."""
        with self._lock:
            missing = FETCHERS - self._num_threads if self._wanted else 0
            self._num_threads += missing
        for _ in range(missing):
            # A daemon thread does not delay the end of the process.
            threading.Thread(
                target=self._fetch_wanted, name="read-ahead", daemon=True
            ).start()

    def _fetch_wanted(self) -> None:
        """Fetch wanted shards until there are none left; the body of a thread."""
        while True:
            with self._lock:
                shard, wait_s = self._next_wanted()
                if shard is None and wait_s is None:
                    self._num_threads -= 1
                    return
            if shard is None:
                time.sleep(wait_s or 0)
                continue
            # Fetch it into the cache and close it at once.
            failed = True
            try:
                fd = self._obtain(shard, wait=False)
                failed = False
                if fd is not None:
                    os.close(fd)
            except Exception:  # noqa: BLE001 - opening the shard raises the same error
                pass
            with self._lock:
                # If another process is fetching it or there is no room, try again soon.
                self._retry_at[shard] = time.monotonic() + 0.5
                if failed:
                    self._wanted.pop(shard, None)

    def _next_wanted(self) -> tuple[Shard | None, float | None]:
        """Return (the next shard to fetch, None).

        (None, seconds to wait) if all shards are being fetched, (None, None) if there is
        nothing to fetch. Requires the lock.
        """
        # All stores of this process that read ahead into the same cache share its space.
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
            # `_has` marks it as used, so that it is not removed before it is opened.
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
            # Shards in the cache were checked when they arrived.
            missing = list(filterfalse(self._has, shards))
            if not missing:
                return
            names = [shard.file for shard in missing]
            what = f"find the shards of {self.root}"
            sizes = persist(lambda: self._source.sizes(names), what, self._patience)
        except RankError as error:
            raise UserError(str(error)) from None
        for shard, found in zip(missing, sizes, strict=True):
            if found is not None and found != shard.bytes:
                raise UserError(
                    f"Shard {self._source.address(shard.file)} must have {shard.bytes:,} "
                    f"bytes as its index says, got {found:,}. Upload the folder again."
                )

    def _check_bytes(self, shard: Shard) -> None:
        """Fetch a shard again if its checksum in the cache is wrong."""
        with self.open(shard) as file:
            found = sha256_of(file)
        if found != shard.sha256:  # it was right when it arrived
            (self._cache.folder / self._place_of(shard)).unlink(missing_ok=True)
            self.open(shard).close()


# All stores of this process, for the limit of reading ahead and for forks.
_stores: "weakref.WeakSet[RemoteStore]" = weakref.WeakSet()
_left_behind: list[FsspecSource] = []


def _after_fork() -> None:
    """Give each store of a forked child its own connections."""
    for store in list(_stores):
        # Keep the parent's connections: closing them would wait for its thread, which does
        # not run here.
        _left_behind.append(store._source)
        store._reset()


os.register_at_fork(after_in_child=_after_fork)


def open_store(root: str | Path, cache: CacheOptions | None = None) -> Store:
    """Return the store of a shard folder, without reading anything.

    root: a folder, or an address (https://, s3://, or another protocol of fsspec).
    Raises UserError if the address cannot be used.
    """
    root, cache = str(root), cache or CacheOptions()
    # webdataset runs such a name as a shell command, and a config.json from elsewhere could
    # hold one.
    if root.startswith("pipe:"):
        raise UserError(
            "data.shards must name folders or addresses, got a command (pipe:), which is "
            "never run. Copy the shards to a folder, or give an address that begins with "
            "https://, s3:// or another protocol of fsspec."
        )
    if _CHAIN.match(root):
        raise UserError(
            "The address of shards must begin with its protocol (https://, s3://, ...), got "
            f"{root.split('::')[0]}:: before it. Remove that: shards are cached without it."
        )
    if address := _ADDRESS.match(root):
        return RemoteStore(address[0].lower() + root[address.end() :], cache)
    return LocalStore(root)


def is_count(value: Any) -> bool:
    """Return whether a value of a JSON file is a number of bytes or clips, within int64."""
    return type(value) is int and 0 <= value < 2**63


def checked_name(name: str) -> str:
    """Return `name` if it is a plain file name; raise UserError otherwise.

    An index may come from anyone, with any names.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            "File names in index.json must consist of letters, digits, '_', '.' and '-', got "
            f"{name!r}. Do not use these shards, or build them again."
        )
    return name
