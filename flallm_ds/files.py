"""A lock on what a command writes: one command at a time, and free again as soon as its process is gone.

The kernel frees a flock when its process ends, also by kill -9. The lock file names its holder, but for the
message alone: only the kernel decides whether somebody holds the lock.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flallm_ds.dist import World, main_first
from flallm_ds.errors import UserError


@contextmanager
def locked(path: Path, what: str, advice: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the file and folders made for it are removed again.

    what: is written under the lock, for the message. advice: what else a user can do than wait.
    Raises UserError where another process holds it, or where the file system has no flock; OSError where
    the file cannot be opened.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    # No soft lock (a file that merely exists): after kill -9 nobody would remove it.
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False, poll_interval=0.01)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{what} is in use by {_holder(path)}. Wait for it or end it, or {advice}.") from None
    except OSError as error:
        _remove(made)
        if error.filename is not None:
            raise  # the file cannot be opened
        raise UserError(
            f"Cannot lock {what}: the file system of {path} has no flock ({error.strerror}). "
            f"Mount it with flock, or {advice} on another file system."
        ) from error
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same
            path.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        # Removed while it is held: who has opened it meanwhile sees that it has no name any more.
        with suppress(OSError):
            path.unlink()
        lock.release()
        _remove(made)


@contextmanager
def locked_by_main(path: Path, what: str, advice: str, world: World) -> Iterator[None]:
    """`locked` by rank 0 for all ranks; each of them raises its UserError."""
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(path, what, advice))

        main_first(take, world)
        yield


def _this_process() -> dict[str, str | int | None]:
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
    except (OSError, ValueError, KeyError, TypeError):  # it is being written, or the disk was full
        return "another process"


def _remove(made: list[Path]) -> None:
    """Remove folders that were made for a lock and stayed empty, the innermost first."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()
