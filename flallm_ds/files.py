"""Write files and folders atomically, lock them, and compute checksums.

A new file or folder is written under a temporary name in the same folder and then renamed.
So a process may be killed at any time without leaving an incomplete file under the final
name. Files under temporary names are ignored.

    function        temporary name       concurrent writers
    replace_file    .partial-NAME        none; the next call overwrites the temporary file
    new_lines       .partial-NAME        none; the next call overwrites the temporary file
    write_file      NAME.PID.THREAD.tmp  processes and threads of one machine
    replace_folder  .partial-NAME        none; the old folder is .old-NAME for a moment
    new_folder      .partial-NAME.PID    processes of one machine; the first one succeeds

This module must not import torch, because building shards does not need it.
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
from typing import Any, BinaryIO, TextIO, cast

from filelock import FileLock, Timeout, lock_descriptor

from flallm_ds.errors import UserError

# A process that releases a lock removes its file. A process that opened this file just
# before must open the new file, which takes a moment.
_LOCK_WAIT_S = 0.1


def partial_of(path: Path) -> Path:
    """Return the temporary path of `replace_file` and `replace_folder`, for clean-up."""
    return path.with_name(f".partial-{path.name}")


# --- files


def replace_file(path: Path, text: str) -> None:
    """Write a text file atomically and sync it to the disk.

    Raises OSError with a filename.
    """
    try:
        _write(partial_of(path), path, text.encode())
    except OSError as error:
        error.filename = error.filename or str(path)  # ENOSPC has no filename
        raise


@contextmanager
def new_lines(path: Path) -> Iterator[TextIO]:
    """Yield a text file that is renamed to `path` at the end, or removed after an error.

    Each line is written at once. If the process is interrupted or killed, the lines remain
    under the temporary name. Raises OSError with a filename.
    """
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8", buffering=1) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(partial, path)
    except Exception as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # ENOSPC has no filename
        partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and sync it to the disk. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        _write(temporary, path, content)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write compact JSON with `write_file`. Other values, e.g. paths, become strings."""
    write_file(path, json.dumps(content, ensure_ascii=False, default=str).encode())


def _write(temporary: Path, path: Path, content: bytes) -> None:
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder that is on the disk, and sync its new name."""
    path.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- folders


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically; an existing folder is replaced by the complete new one.

    write: function that fills an empty folder. If the process is killed between the two
    renames, `path` does not exist and `recover_folders` restores the old folder. Raises
    OSError.
    """
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except Exception as error:
        # The tokenizers library raises a bare Exception instead of an OSError.
        found = re.fullmatch(r"(.*) \(os error (\d+)\)", str(error))
        if type(error) is not Exception or found is None:
            raise
        raise OSError(int(found[2]), found[1]) from error
    share_files(partial)
    sync_all(partial)
    put_folder(partial, path)


def put_folder(partial: Path, path: Path) -> None:
    """Rename a complete folder, which is on the disk, to `path`, and sync its new name.

    An existing folder is removed afterwards.
    """
    old = path.with_name(f".old-{path.name}")
    if old.exists():
        _recover(old)
    if path.exists():
        path.rename(old)
    move(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def recover_folders(parent: Path) -> None:
    """Restore each old folder whose replacement was killed between the two renames."""
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
    """Yield an empty folder that is renamed to `path` at the end, or removed on failure.

    Raises OSError, also if `path` is not an empty folder at the end.
    """
    partial = path.with_name(f".partial-{path.name}.{os.getpid()}")
    # A killed process may have had the same process id.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(folder: Path, path: Path) -> None:
    """Sync a folder of complete files and rename it to `path`, which is absent or empty."""
    sync_all(folder)
    move(folder, path)


def sync_all(folder: Path) -> None:
    """Wait until a folder with all its files and subfolders is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def share_files(folder: Path) -> None:
    """Give each file of a new folder the permissions that the umask allows.

    safetensors creates private files (0600), which other users of a group could not read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


# --- locks
# All locks are flocks: the kernel releases them when the process ends, even by kill -9.


def take_lock(path: Path) -> FileLock | None:
    """Lock a file; return None if another process holds the lock.

    The file is created if necessary and is not removed by `release()`. Raises OSError if
    the file cannot be opened, or (without a filename) if the file system has no flock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No soft lock, where the existence of a file is the lock: it would survive kill -9.
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
    """Lock a folder without a lock file; return None if another process holds the lock.

    `os.close` of the returned handle releases the lock. Raises OSError.
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
    """Hold the lock file `path` while the block runs, then remove it and new folders.

    what: name of the locked object in error messages. advice: what the user can do instead
    of waiting. Raises UserError if another process holds the lock or the file system has no
    flock, OSError if the file cannot be opened.
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
        # The text is for messages only, so a full disk does not matter.
        with suppress(OSError):
            path.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        # Remove the file before the release. A process that has opened it meanwhile then
        # finds that the file has no name, and opens a new one.
        with suppress(OSError):
            path.unlink()
        lock.release()
        _remove(made)


def _this_process() -> dict[str, str | int | None]:
    """Return the content of the lock file, which is used for messages only."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _holder(path: Path) -> str:
    """Describe the process that holds the lock."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        job = f" (SLURM job {holder['slurm_job']})" if holder["slurm_job"] else ""
        return f"process {holder['pid']} on {holder['host']}{job} since {holder['since']}"
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        # The holder is writing the file, or the disk was full.
        return "another process"


def _remove(made: list[Path]) -> None:
    """Remove folders that were made for a lock and are empty, the innermost first."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


# --- checksums


def file_sha256(path: Path) -> str:
    """Return the sha256 of a regular file, in hex. Raises OSError."""
    with open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Return the sha256 of an open file from its current position to its end, in hex."""
    return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file without buffering.

    Raises OSError for any other file: opening a fifo would block.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return cast(BinaryIO, os.fdopen(fd, "rb", buffering=0))
