"""Fetching a file from an address into an open file: streams, resumed and tried again,
until it is whole.

Addresses are of fsspec (https://, s3://, ...). What a person reads of an address never
holds a user, a password or a query.
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
# What pip installs for a protocol that fsspec alone does not have.
_PACKAGES = {"s3": "'.[s3]'", "s3a": "'.[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
CHUNK = 2**20  # bytes a read
BLOCK = 2**23  # bytes a request, where a protocol has no streams (s3)


@dataclass(frozen=True)
class Patience:
    """How long a server may be silent or broken before a run ends."""

    attempts: int = 12  # at one file; the waits between them add up to about four minutes
    first_wait_s: float = 0.5  # doubled after each attempt, times a random 0.5 to 1
    longest_wait_s: float = 60.0
    total_s: float = 3600.0  # for one file, all attempts together
    connect_s: float = 30.0
    stall_s: float = 60.0  # without a byte


class Refused(RankError):
    """Not worth another attempt: the file is not there, or may not be read, or the
    address is wrong."""


class _Fault(Exception):
    """What arrived is not what the index says."""


@dataclass
class FsspecSource:
    """A folder at an address of fsspec. Not to be carried over a fork."""

    root: str
    patience: Patience
    protocol: str = field(init=False)

    def __post_init__(self) -> None:
        # It takes a while to import, and shards on a disk do not need it.
        import fsspec

        self.protocol = self.root.split("://")[0]
        try:
            kind = fsspec.get_filesystem_class(self.protocol)
        except ValueError:
            raise UserError(
                "an address must begin with a protocol of fsspec (https, s3, gs, ...), but "
                f"this begins with {self.protocol}: {printable(self.root)}. Correct it."
            ) from None
        except ImportError as error:
            package = _PACKAGES.get(self.protocol)
            remedy = f"Install what fsspec needs for it ({error})"
            if package:
                remedy = f"pip install {package}"
            raise UserError(
                f"the package that reads {self.protocol}:// must be installed, but is not: "
                f"{printable(self.root)}. {remedy.rstrip('.')}."
            ) from None
        # A file system on top of another one reads instructions from it: `reference`
        # renders templates.
        parameters = set(inspect.signature(kind.__init__).parameters)
        if "::" in self.root or parameters & {"fo", "fs", "target_protocol"}:
            raise UserError(
                "an address must name one file system (https://, s3://, ...), got one on "
                f"top of another: {printable(self.root)}. Give the address of the folder "
                "that holds index.json."
            )

    @cached_property
    def _fs(self) -> Any:
        # It takes a while to import, and shards on a disk do not need it.
        import fsspec

        options: dict[str, Any] = {}
        if self.protocol in ("http", "https"):
            # only where fsspec opens http addresses
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None,
                sock_connect=self.patience.connect_s,
                sock_read=self.patience.stall_s,
            )
            # trust_env: proxies and .netrc, as curl has them. encoded: a signed query
            # must go out as it is.
            client = {"timeout": timeout, "trust_env": True, "read_bufsize": CHUNK}
            options = {"client_kwargs": client, "encoded": True}
        elif self.protocol in ("s3", "s3a"):
            limits = {
                "connect_timeout": self.patience.connect_s,
                "read_timeout": self.patience.stall_s,
            }
            options = {"config_kwargs": limits}
        # Not fsspec's shared instance: that one's connections would be used with our time
        # limits by others.
        return fsspec.core.url_to_fs(self.root, skip_instance_cache=True, **options)[0]

    def _path(self, name: str) -> Any:
        parts = urllib.parse.urlsplit(self.root)
        path = f"{parts.path.rstrip('/')}/{name}"
        url = urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))
        if self.protocol in ("http", "https"):
            return urllib.parse.quote(url, safe="%/:?&=#[]@!$'()*+,;~")
        return self._fs._strip_protocol(f"{self.root.rstrip('/')}/{name}")

    def address(self, name: str) -> str:
        """The address of a file, for people."""
        return f"{printable(self.root).rstrip('/')}/{name}"

    def stream(self, name: str, begin: int) -> tuple[int, Chunks]:
        """(place of the first byte, the bytes): from `begin` where the server can, else
        from 0."""
        if self.protocol not in ("http", "https"):
            file = self._fs.open(self._path(name), "rb", block_size=BLOCK)
            file.seek(begin)
            return begin, _chunks(file)
        headers = {"Accept-Encoding": "identity"}  # compressed bytes have other offsets
        if begin:
            headers["Range"] = f"bytes={begin}-"
        # A size that is given spares fsspec a HEAD; block_size=0 makes it a stream of one
        # request.
        try:
            file = self._fs.open(
                self._path(name), "rb", block_size=0, size=1, headers=headers
            )
        except Exception as error:
            # the file ends before: it was another one
            if begin and getattr(error, "status", None) == 416:
                return self.stream(name, 0)
            raise
        return begin if file.r.status == 206 else 0, _chunks(file)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Sizes of files in bytes, None where they cannot be had cheaply."""
        try:
            return list(self._fs.sizes([self._path(name) for name in names]))
        except FileNotFoundError as error:
            # fsspec calls everything that goes wrong with HTTP so, a refused connection
            # too.
            cause = error.__cause__
            if cause is None or getattr(cause, "status", None) == 404:
                raise
            raise cause from None


def _chunks(file: Any) -> Chunks:
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
    """Fill the open file `fd` with a file of the source; what it holds already is the beginning.

    num_bytes, sha256: what must arrive, where it is known.
    Raises Refused at once where another attempt is no use, else RankError after the last.
    """
    deadline = time.monotonic() + patience.total_s
    where = f"{source.address(name)} must arrive whole"
    persist(
        lambda: _attempt(source, name, fd, num_bytes, sha256, deadline), where, patience
    )


def _attempt(
    source: FsspecSource,
    name: str,
    fd: int,
    num_bytes: int | None,
    sha256: str | None,
    deadline: float,
) -> None:
    # Go on after the bytes that are there, as far as the server can.
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
    # Too few bytes are kept for the next attempt, wrong ones are not.
    if num_bytes is not None and have < num_bytes:
        raise _Fault(f"only {have:,} of {num_bytes:,} bytes came")
    if num_bytes is not None and have > num_bytes:
        os.ftruncate(fd, 0)
        raise _Fault(f"more than {num_bytes:,} bytes came")
    if sha256 is not None and (found := _sha256(fd)) != sha256:
        os.ftruncate(fd, 0)
        raise _Fault(
            f"its sha256 is {found[:16]}... and not {sha256[:16]}... as the index says"
        )


def persist(call: Callable[[], Any], must: str, patience: Patience) -> Any:
    """What `call` returns, at the first attempt that does; see `Patience`.

    must: the begin of the sentence that is raised where none does.
    """
    began = time.monotonic()
    for attempt in range(1, patience.attempts + 1):
        try:
            return call()
        except (UserError, MemoryError, NameError, TypeError, AttributeError, LookupError):
            raise  # ours, not the server's
        except Exception as error:  # noqa: BLE001 - every protocol has exceptions of its own
            reason = reason_of(error)
            if _is_final(error):
                raise Refused(
                    f"{must}, but {reason}. Check the address and the rights to read it."
                ) from None
        wait_s = min(patience.first_wait_s * 2 ** (attempt - 1), patience.longest_wait_s)
        # the global generators belong to the run
        wait_s *= random.SystemRandom().uniform(0.5, 1.0)
        too_late = time.monotonic() - began + wait_s > patience.total_s
        if attempt == patience.attempts or too_late:
            break
        if attempt >= 3:  # one dropped connection is no news
            print(
                f"warning: {must}, but {reason}; trying again in {wait_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(wait_s)
    raise RankError(
        f"{must}, but does not after {attempt} attempts; the last: {reason}. "
        "Check the server and the network, then start again."
    )


def _is_final(error: Exception) -> bool:
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
    # By its name: botocore, which has this one, may not be installed.
    return isinstance(error, hopeless) or "Credentials" in type(error).__name__


def reason_of(error: BaseException) -> str:
    """One fragment of a sentence, without credentials."""
    if isinstance(error, _Fault):
        return str(error)
    if isinstance(error, FileNotFoundError):
        _, slash, name = str(error.filename or error).split("?")[0].rpartition("/")
        return f"there is no {name if slash else 'such file'}"
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return f"the server answered {status}"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "nothing came in time"
    return f"{type(error).__name__}: {scrubbed(str(error))[:200].rstrip('. ')}"


def _write(fd: int, data: bytes, at: int) -> None:
    """Errors of the disk here must not pass for errors of the server."""
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(fd, view, at)
            view, at = view[done:], at + done
    except OSError as error:
        raise RankError(
            f"the cache must take what is fetched, but {error.strerror}. Free space, set "
            "--data.cache_gb lower, or set --data.cache_dir to another disk."
        ) from None


def _sha256(fd: int) -> str:
    with open(os.dup(fd), "rb", buffering=0) as file:
        file.seek(0)
        return sha256_of(file)


def printable(root: str) -> str:
    """An address for people: without user, password and query."""
    return scrubbed(urllib.parse.urldefrag(root).url.split("?")[0])


def scrubbed(text: str) -> str:
    """`text` without users, passwords and queries of the addresses in it."""
    return re.sub(r"\?[^\s'\")]+", "", re.sub(r"://[^/\s'\"]*@", "://", text))
