"""Files and folders that appear whole or not at all, locks that end with their process,
checksums.

A new file or folder is written under a temporary name next to its place and then renamed,
so that a process may be killed at any moment. What a kill leaves under a temporary name
counts for nothing.

    function        temporary name      who may write
    replace_file    .partial-NAME       one process at a time; the next try overwrites what is left
    write_file      NAME.PID.THREAD.tmp any processes and threads of a machine at once
    replace_folder  .partial-NAME       one process at a time; an old folder waits as .old-NAME
    new_folder      .partial-NAME.PID   any processes of a machine; only the first gets the name

This module must not import torch: a machine that only builds shards does not load it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock, Timeout, lock_descriptor

from flallm_ds.errors import UserError

# A holder that ends may remove its lock file. Who opened that file just before opens the
# new one.
_LOCK_WAIT_S = 0.1


def partial_of(path: Path) -> Path:
    """Return the temporary path of `replace_file` and `replace_folder`, for those who
    clean up."""
    return path.with_name(f".partial-{path.name}")


# --- files


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole and safe on the disk, or not at all.

    Raises OSError that names a file.
    """
    try:
        _write(partial_of(path), path, text.encode())
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has none
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole and safe on the disk, or not at all. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        _write(temporary, path, content)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write compact JSON as `write_file` does; a value that JSON lacks (a path) becomes a
    string."""
    write_file(path, json.dumps(content, ensure_ascii=False, default=str).encode())


def _write(temporary: Path, path: Path, content: bytes) -> None:
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def move(path: Path, target: Path) -> None:
    """Rename a file that is safe on the disk, so that its new name is safe there, too."""
    path.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- folders


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all; an existing one is replaced when the new one is
    complete.

    write: is called with an empty folder. A kill between the two renames leaves no
    `path`: `recover_folders` puts the old one back. Raises OSError.
    """
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except Exception as error:
        # The tokenizers library raises a bare Exception for what is an OSError.
        found = re.fullmatch(r"(.*) \(os error (\d+)\)", str(error))
        if type(error) is not Exception or found is None:
            raise
        raise OSError(int(found[2]), found[1]) from error
    share_files(partial)
    put_folder(partial, path)


def put_folder(partial: Path, path: Path) -> None:
    """Give a complete folder its name; a folder that has it is set aside and then removed."""
    old = path.with_name(f".old-{path.name}")
    if old.exists():
        _recover(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover_folders(parent: Path) -> None:
    """Put every old folder back whose replacement was killed between its two renames."""
    for old in parent.glob(".old-*"):
        _recover(old)


def _recover(old: Path) -> None:
    path = old.with_name(old.name.removeprefix(".old-"))
    if path.exists():
        shutil.rmtree(old)
    else:
        old.rename(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and is removed if it fails.

    Raises OSError, also where something but an empty folder is at `path` in the end.
    """
    partial = path.with_name(f".partial-{path.name}.{os.getpid()}")
    # of a killed process that had the same number
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(folder: Path, path: Path) -> None:
    """Rename a folder of complete files to `path`, absent or empty, with all of it on the
    disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    move(folder, path)


def share_files(folder: Path) -> None:
    """Give each file of a new folder the permissions that the umask allows.

    safetensors makes its files private (0600), which would lock out the rest of a group.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


# --- locks
# All are flocks: the kernel frees one when its process ends, also by kill -9.


def take_lock(path: Path) -> FileLock | None:
    """Lock a file, which is made if need be and stays; None where another process holds it.

    `release()` ends the lock. Raises OSError where the file cannot be opened, or (without
    a filename) where the file system has no flock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No soft lock (a file that merely exists): after kill -9 nobody would remove it.
    lock = FileLock(
        path,
        timeout=_LOCK_WAIT_S,
        thread_local=False,
        fallback_to_soft=False,
        poll_interval=0.01,
    )
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def take_folder_lock(folder: Path) -> int | None:
    """Lock a folder itself, without a file in it; None where another process holds it.

    `os.close` of the returned handle ends the lock. Raises OSError.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        is_ours = lock_descriptor(handle, blocking=False)
    except OSError:
        os.close(handle)
        raise
    if not is_ours:
        os.close(handle)
        return None
    return handle


@contextmanager
def locked(path: Path, what: str, advice: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, then remove it and the folders made for it.

    what: is locked, advice: what else a user can do than wait; both for the message.
    Raises UserError where another process holds it, or where the file system has no
    flock; OSError where the file cannot be opened.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        lock = take_lock(path)
    except OSError as error:
        _remove(made)
        if error.filename is not None:
            raise  # the file cannot be opened
        raise UserError(
            f"Cannot lock {what}: the file system of {path} has no flock "
            f"({error.strerror}). Mount it with flock, or {advice} on another file system."
        ) from error
    if lock is None:
        holder = _holder(path)
        raise UserError(
            f"{what} is in use by {holder}. Wait for it or end it, or {advice}."
        )
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same
            path.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        # Removed while it is held: who has opened it meanwhile sees that it has no name
        # any more.
        with suppress(OSError):
            path.unlink()
        lock.release()
        _remove(made)


def _this_process() -> dict[str, str | int | None]:
    """What the lock file says, for the message alone: only the kernel decides who holds
    the lock."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        job = f" (SLURM job {said['slurm_job']})" if said["slurm_job"] else ""
        return f"process {said['pid']} on {said['host']}{job} since {said['since']}"
    # it is being written, or the disk was full
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _remove(made: list[Path]) -> None:
    """Remove folders that were made for a lock and stayed empty, the innermost first."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


# --- checksums


def file_sha256(path: Path) -> str:
    """Return the sha256 of a regular file, in hex. Raises OSError."""
    with open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Return the sha256 of an open file from where it stands to its end, in hex."""
    return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, unbuffered. Raises OSError for another: a fifo would block for
    ever."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return cast(BinaryIO, os.fdopen(fd, "rb", buffering=0))
