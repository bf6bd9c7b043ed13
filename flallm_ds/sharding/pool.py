"""Run jobs in worker processes, with one progress bar for all of them.

A job is a complete shard, so no clips are sent between processes.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from flallm_ds.errors import UserError
from flallm_ds.terminal import Progress, progress

Job = TypeVar("Job")
Result = TypeVar("Result")
# Seconds between two updates of the progress bar.
_POLL_S = 0.2
# Signals that stop a build. Workers ignore them: the parent process stops the workers.
_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Stopped(Exception):
    """Raised in a worker to stop it, after another worker has failed."""


class _Shared:
    """Share the number of finished clips and a request to stop with all workers."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Python starts a process here that tracks shared objects. Ctrl-C must not stop that
        # process.
        with signals_held():
            self.num_done = context.Value("q", 0)
            self.stop = context.Event()


_shared: _Shared | None = None


def tick() -> None:
    """Count one clip as finished."""
    if _shared is not None:
        with _shared.num_done.get_lock():
            _shared.num_done.value += 1


def check_stop() -> None:
    """Raise Stopped if another worker has failed or the user stops the build.

    Cheap enough to call for every frame.
    """
    if _shared is not None and _shared.stop.is_set():
        raise Stopped


def run(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    num_workers: int,
    num_clips: int,
    title: str,
) -> Generator[tuple[int, Result]]:
    """Run the jobs, and yield (position of the job, result) as each finishes.

    function: a function of a module. It calls `tick()` once per clip and `check_stop()`
    often. num_workers: number of processes, 0 for one per core. With 1, the jobs run in
    this process. The first exception of a job stops the others and is raised here.
    """
    num_workers = min(num_workers or num_cores(), len(jobs))
    with progress(num_clips, title) as bar:
        if num_workers <= 1:
            yield from _run_here(function, jobs, bar)
        else:
            yield from _run_in_processes(function, jobs, num_workers, bar)


def _run_here(
    function: Callable[[Any], Any], jobs: Sequence[Any], bar: Progress
) -> Iterator[tuple[int, Any]]:
    """Run the jobs in this process. A thread shows the progress."""
    # As in a worker, `tick` and `check_stop` use this object.
    global _shared
    _shared = _Shared()
    watcher_done = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(_shared, bar, watcher_done), daemon=True
    )
    watcher.start()
    try:
        for position, job in enumerate(jobs):
            yield position, function(job)
    finally:
        watcher_done.set()
        watcher.join()
        _shared = None


def _watch(shared: _Shared, bar: Progress, done: threading.Event) -> None:
    """Update the progress bar until `done` is set."""
    while not done.wait(_POLL_S):
        _show(shared, bar)
    _show(shared, bar)


def _run_in_processes(
    function: Callable[[Any], Any], jobs: Sequence[Any], num_workers: int, bar: Progress
) -> Iterator[tuple[int, Any]]:
    """Run the jobs in worker processes. The first exception stops all workers."""
    shared = _Shared()
    # Spawn, not fork: a forked process can hang if libraries have started threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _begin_worker, initargs=(shared,))
    positions: dict[Future[Any], int] = {}
    try:
        # `submit` starts the workers. They inherit the blocked signals, so no signal can
        # stop a worker before it ignores them.
        with signals_held():
            for position, job in enumerate(jobs):
                positions[pool.submit(function, job)] = position
        waiting = set(positions)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            _show(shared, bar)
            # False sorts before True: raise the error itself, not the Stopped that it
            # caused in other workers.
            for future in sorted(done, key=lambda f: isinstance(f.exception(), Stopped)):
                yield positions[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "Cannot finish: a worker process was killed, most often for lack of memory. Use "
            "fewer --workers."
        ) from error
    finally:
        # Running jobs stop at the next `check_stop`, and waiting jobs are cancelled.
        shared.stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """Block Ctrl-C, SIGTERM and SIGHUP, also in processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show(shared: _Shared, bar: Progress) -> None:
    """Set the progress bar to the number of finished clips."""
    bar.update(shared.num_done.value - bar.n)


def _begin_worker(shared: _Shared) -> None:
    """Initialize a worker of `run`."""
    global _shared
    _shared = shared
    begin_worker()


def begin_worker() -> None:
    """Initialize a worker: ignore the signals, and exit when the parent process ends."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    # A killed parent cannot stop its workers, so a thread of the worker waits for the end
    # of the parent.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Wait until the parent process ends, then exit."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    # sys.exit would end only this thread.
    os._exit(1)


def num_cores() -> int:
    """Return the number of cores that this process may use.

    A container or SLURM may limit them.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
