"""Where shards lie: a folder, or an address whose shards are fetched into a bounded cache."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from flallm_ds.errors import UserError

# No slash, no leading dot or dash, nothing that a shell reads: an index names files of its own folder only.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name within the folder, its size in bytes, its checksum and its number of clips."""

    file: str
    bytes: int
    sha256: str
    clips: int

    def __post_init__(self) -> None:
        checked_name(self.file)
        if type(self.bytes) is not int or self.bytes < 0 or not re.fullmatch(r"[0-9a-f]+", str(self.sha256)):
            raise UserError(
                f"index.json must give a shard's size and sha256, but gives {self.bytes!r} and "
                f"{self.sha256!r} for {self.file}. Build the shards again."
            )


@dataclass(frozen=True)
class CacheOptions:
    """What a remote store may use of this machine; a local folder needs none of it."""

    folder: Path | None = None  # default: $FLALLM_CACHE, or ~/.cache/flallm_ds
    max_gb: float = 100.0  # of shards, over all addresses, 1e9 bytes each
    allow_pipe: bool = False  # whether `pipe:COMMAND {file}` may run its command


class Store(Protocol):
    """A place that holds the files of one shard folder. Picklable; any thread may call it."""

    @property
    def root(self) -> str:
        """The folder or address, for people: without credentials."""
        ...

    def file(self, name: str, sha256: str | None = None) -> Path:
        """Path of a small file of the folder (index.json, a table); whether it is there and unchanged is
        the caller's to check. sha256: a cached copy with this checksum will do; else it is fetched anew.
        """
        ...

    def open(self, shard: Shard) -> BinaryIO:
        """The shard, unbuffered, for os.pread; fetched and checked where it is remote.

        Raises FileNotFoundError where a local one is missing, RankError where a remote one cannot be had.
        """
        ...

    def want(self, shards: Sequence[Shard]) -> None:
        """Read ahead, in this order of need, in place of what was wanted before; returns at once."""
        ...

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        """Raise UserError if a shard is missing or is not of its size (or, if asked, of its checksum)."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder on a disk."""

    root: str

    def file(self, name: str, sha256: str | None = None) -> Path:
        return Path(self.root) / checked_name(name)

    def open(self, shard: Shard) -> BinaryIO:
        return cast(BinaryIO, self.file(shard.file).open("rb", buffering=0))

    def want(self, shards: Sequence[Shard]) -> None:
        pass

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        for shard in shards:
            path = self.file(shard.file)
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"holds {found:,} bytes"
                raise UserError(
                    f"shard must hold {shard.bytes:,} bytes as its index says, but {what}: {path}. "
                    f"Run python shards/verify.py {self.root}, then build the shards again."
                )
            if checksums and (found_sha := file_sha256(path)) != shard.sha256:
                raise UserError(
                    f"shard must have sha256 {shard.sha256} as its index says, but has {found_sha}: {path}. "
                    f"Run python shards/verify.py {self.root}, then build the shards again."
                )


def open_store(root: str | Path, cache: CacheOptions | None = None) -> Store:
    """The store at `root`: a folder, an address (https://, s3://, any other of fsspec), or `pipe:COMMAND`.

    pipe: the command's output is the file that stands for `{file}` in it; needs `cache.allow_pipe`.
    Nothing is read yet. Raises UserError for an address that cannot be used.
    """
    return LocalStore(str(root))


def checked_name(name: str) -> str:
    """`name` if it is a plain file name; an index from elsewhere may name anything. Raises UserError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            "file names in index.json must consist of letters, digits, '_', '.' and '-', "
            f"but one is {name!r}. Do not use these shards, or build them again."
        )
    return name


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
