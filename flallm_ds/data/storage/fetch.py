"""Fetch a file from an address of fsspec (https://, s3://, ...) into an open file.

Files are streamed. After a fault, the next attempt continues where the last one stopped.
Addresses in messages never contain a user, a password or a query.
"""

import contextlib
import inspect
import os
import random
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flallm_ds.errors import RankError, UserError
from flallm_ds.files import sha256_of

Chunks = Generator[bytes, None, None]
# The packages of protocols that fsspec does not include.
_PACKAGES = {"s3": "'.[s3]'", "s3a": "'.[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
CHUNK = 2**20  # bytes per read
BLOCK = 2**23  # bytes per request, for protocols without streams (s3)


@dataclass(frozen=True)
class Patience:
    """Time limits for a server that does not answer or fails."""

    attempts: int = 12  # per file; the waits between them add up to about four minutes
    first_wait_s: float = 0.5  # doubled after each attempt, times a random 0.5 to 1
    longest_wait_s: float = 60.0
    total_s: float = 3600.0  # per file, for all attempts
    connect_s: float = 30.0
    stall_s: float = 60.0  # longest time without a byte


class Refused(RankError):
    """Raised where another attempt cannot help.

    The file is missing or not readable, or the address is wrong.
    """


class _Fault(Exception):
    """Raised if the bytes that arrived do not match the index."""


@dataclass
class FsspecSource:
    """A folder at an address of fsspec. Its connections do not survive a fork."""

    root: str
    patience: Patience
    protocol: str = field(init=False)

    def __post_init__(self) -> None:
        # fsspec is slow to import, and shards on a disk do not need it.
        import fsspec

        self.protocol = self.root.split("://")[0]
        try:
            kind = fsspec.get_filesystem_class(self.protocol)
        except ValueError:
            raise UserError(
                "The address of shards must begin with a protocol of fsspec (https, s3, gs, "
                f"...), got {self.protocol} in {printable(self.root)}. Correct the address."
            ) from None
        except ImportError as error:
            package = _PACKAGES.get(self.protocol)
            remedy = f"Install the package that fsspec needs ({error})"
            if package:
                remedy = f"Run pip install {package}"
            raise UserError(
                f"Cannot read {printable(self.root)}: the package for {self.protocol}:// is "
                f"not installed. {remedy.rstrip('.')}."
            ) from None
        # A file system on top of another one follows instructions in its files: `reference`
        # renders templates. Shards may come from anyone, so these are refused.
        parameters = set(inspect.signature(kind.__init__).parameters)
        stacked = {"fo", "fs", "target_protocol"}  # codespell:ignore fo
        if "::" in self.root or parameters & stacked:
            raise UserError(
                "The address of shards must name one file system (https://, s3://, ...), got "
                f"one on top of another: {printable(self.root)}. Give the address of the "
                "folder with index.json."
            )

    @cached_property
    def _fs(self) -> Any:
        """The file system of fsspec, with this source's time limits."""
        import fsspec

        options: dict[str, Any] = {}
        if self.protocol in ("http", "https"):
            # fsspec needs aiohttp for http addresses only.
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None,
                sock_connect=self.patience.connect_s,
                sock_read=self.patience.stall_s,
            )
            # trust_env: use proxies and .netrc, as curl does. encoded: send a signed query
            # unchanged.
            client = {"timeout": timeout, "trust_env": True, "read_bufsize": CHUNK}
            options = {"client_kwargs": client, "encoded": True}
        elif self.protocol in ("s3", "s3a"):
            limits = {
                "connect_timeout": self.patience.connect_s,
                "read_timeout": self.patience.stall_s,
            }
            options = {"config_kwargs": limits}
        # A new instance: others that use fsspec's shared one must not get these time
        # limits.
        return fsspec.core.url_to_fs(self.root, skip_instance_cache=True, **options)[0]

    def _path(self, name: str) -> Any:
        """Return the path of a file for fsspec. A query stays at the end of the address."""
        # Insert the name before a query, which may hold a signature: /data?sig=x becomes
        # /data/NAME?sig=x.
        parts = urllib.parse.urlsplit(self.root)
        path = f"{parts.path.rstrip('/')}/{name}"
        url = urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))
        if self.protocol in ("http", "https"):
            return urllib.parse.quote(url, safe="%/:?&=#[]@!$'()*+,;~")
        return self._fs._strip_protocol(f"{self.root.rstrip('/')}/{name}")

    def address(self, name: str) -> str:
        """Return the address of a file for messages."""
        return f"{printable(self.root).rstrip('/')}/{name}"

    def stream(self, name: str, begin: int) -> tuple[int, Chunks]:
        """Return (offset of the first byte, the bytes) of a file.

        The offset is `begin` if the server supports ranges, otherwise 0.
        """
        if self.protocol not in ("http", "https"):
            file = self._fs.open(self._path(name), "rb", block_size=BLOCK)
            file.seek(begin)
            return begin, _chunks(file)
        headers = {"Accept-Encoding": "identity"}  # offsets are of uncompressed bytes
        if begin:
            headers["Range"] = f"bytes={begin}-"
        # With a size, fsspec does not send a HEAD request. block_size=0 makes a stream of a
        # single request.
        try:
            file = self._fs.open(
                self._path(name), "rb", block_size=0, size=1, headers=headers
            )
        except Exception as error:
            # 416: the file on the server is shorter than `begin`, so it has changed.
            if begin and getattr(error, "status", None) == 416:
                return self.stream(name, 0)
            raise
        return begin if file.r.status == 206 else 0, _chunks(file)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Return the sizes of files in bytes, None where the server does not say."""
        try:
            return list(self._fs.sizes([self._path(name) for name in names]))
        except FileNotFoundError as error:
            # fsspec raises this for every fault of HTTP, also for a refused connection.
            cause = error.__cause__
            if cause is None or getattr(cause, "status", None) == 404:
                raise
            raise cause from None


def _chunks(file: Any) -> Chunks:
    """Yield the content of an open file, then close the file."""
    with file:
        while data := file.read(CHUNK):
            yield data


def fetch(
    source: FsspecSource,
    name: str,
    fd: int,
    num_bytes: int | None,
    sha256: str | None,
    patience: Patience,
) -> None:
    """Fetch a file of the source into the open file `fd`, after the bytes that it has.

    num_bytes, sha256: expected size and checksum, None if they are not known.
    Raises Refused at once if another attempt cannot help, otherwise RankError after the
    last attempt.
    """
    # The deadline ends also an attempt that receives its bytes too slowly.
    deadline = time.monotonic() + patience.total_s
    persist(
        lambda: _attempt(source, name, fd, num_bytes, sha256, deadline),
        f"fetch {source.address(name)}",
        patience,
    )


def _attempt(
    source: FsspecSource,
    name: str,
    fd: int,
    num_bytes: int | None,
    sha256: str | None,
    deadline: float,
) -> None:
    """Try once to fetch a file. Raises _Fault, or an error of the protocol."""
    # Continue after the bytes in the file if the server supports ranges.
    have = os.fstat(fd).st_size if num_bytes is not None else 0
    if num_bytes is None or have < num_bytes:
        have, chunks = source.stream(name, have)
        with contextlib.closing(chunks):
            os.ftruncate(fd, have)
            for chunk in chunks:
                _write(fd, chunk, have)
                have += len(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError
                if num_bytes is not None and have > num_bytes:
                    break
    # The next attempt continues after too few bytes, but wrong bytes are removed.
    if num_bytes is not None and have < num_bytes:
        raise _Fault(f"only {have:,} of {num_bytes:,} bytes arrived")
    if num_bytes is not None and have > num_bytes:
        os.ftruncate(fd, 0)
        raise _Fault(f"more than {num_bytes:,} bytes arrived")
    if sha256 is not None and (found := _sha256(fd)) != sha256:
        os.ftruncate(fd, 0)
        raise _Fault(
            f"sha256 must be {sha256[:16]}... as the index says, got {found[:16]}..."
        )


def persist(call: Callable[[], Any], what: str, patience: Patience) -> Any:
    """Return the result of `call`, after as many attempts as `patience` allows.

    what: verb and object for the message, such as `fetch ADDRESS`.
    Raises Refused at once if another attempt cannot help, otherwise RankError after the
    last attempt.
    """
    began = time.monotonic()
    for attempt in range(1, patience.attempts + 1):
        try:
            return call()
        except (UserError, MemoryError, NameError, TypeError, AttributeError, LookupError):
            raise  # a fault of this program, not of the server
        except Exception as error:  # noqa: BLE001 - each protocol has its own exceptions
            reason = reason_of(error)
            if _is_final(error):
                raise Refused(
                    f"Cannot {what}: {reason}. Check the address and the access rights."
                ) from None
        wait_s = min(patience.first_wait_s * 2 ** (attempt - 1), patience.longest_wait_s)
        # A random factor, so that ranks do not ask at the same time. The global generators
        # are left alone: the run draws from them.
        wait_s *= random.SystemRandom().uniform(0.5, 1.0)
        too_late = time.monotonic() - began + wait_s > patience.total_s
        if attempt == patience.attempts or too_late:
            break
        if attempt >= 3:  # a single dropped connection is normal
            warning = f"warning: cannot {what}: {reason}; next attempt in {wait_s:.0f} s"
            print(warning, file=sys.stderr, flush=True)
        time.sleep(wait_s)
    raise RankError(
        f"Cannot {what} after {attempt} attempts: {reason}. Check the server and the "
        "network, then start again."
    )


def _is_final(error: Exception) -> bool:
    """Return whether another attempt cannot help."""
    # 408, 425 and 429 ask the client to try again later.
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return 400 <= status < 500 and status not in (408, 425, 429)
    hopeless = (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
        ValueError,
        ImportError,
    )
    # Compared by name, because botocore may not be installed.
    return isinstance(error, hopeless) or "Credentials" in type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return the cause of an error as a clause, without credentials."""
    if isinstance(error, _Fault):
        return str(error)
    if isinstance(error, FileNotFoundError):
        _, slash, name = str(error.filename or error).split("?")[0].rpartition("/")
        return f"there is no {name if slash else 'such file'}"
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return f"the server answered {status}"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "no data arrived in time"
    return f"{type(error).__name__}: {scrubbed(str(error))[:200].rstrip('. ')}"


def _write(fd: int, data: bytes, at: int) -> None:
    """Write data at an offset. Raises RankError, so that `persist` does not try again."""
    # pwrite may write less than all bytes.
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(fd, view, at)
            view, at = view[done:], at + done
    except OSError as error:
        raise RankError(
            f"Cannot write to the cache: {error.strerror}. Free some space, lower "
            "--data.cache_gb, or set --data.cache_dir to another disk."
        ) from None


def _sha256(fd: int) -> str:
    """Return the checksum of an open file, as a hexadecimal number."""
    with open(os.dup(fd), "rb", buffering=0) as file:
        file.seek(0)
        return sha256_of(file)


def printable(root: str) -> str:
    """Return an address for messages, without user, password and query."""
    return scrubbed(urllib.parse.urldefrag(root).url.split("?")[0])


def scrubbed(text: str) -> str:
    """Return `text` without the users, passwords and queries in its addresses."""
    # `://user:password@host` becomes `://host`; everything after a `?` is removed.
    return re.sub(r"\?[^\s'\")]+", "", re.sub(r"://[^/\s'\"]*@", "://", text))
