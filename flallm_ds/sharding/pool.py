"""Run jobs on all cores with one progress bar.

A job is a whole shard: clips never travel between processes.
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
# Time between two updates of the progress bar.
_POLL_S = 0.2
# Signals that end a build. The parent process handles them for its workers.
_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Stopped(Exception):
    """Another worker failed, so this one leaves."""


class _Shared:
    """What all workers see: how many clips are done, and whether to stop."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Python starts a process here that tracks shared objects. Ctrl-C must not end it
        # before the workers.
        with signals_held():
            self.num_done = context.Value("q", 0)
            self.stop = context.Event()


_shared: _Shared | None = None


def tick() -> None:
    """Count one clip as done."""
    if _shared is not None:
        with _shared.num_done.get_lock():
            _shared.num_done.value += 1


def check_stop() -> None:
    """Raise Stopped if another worker has failed or the user wants to end.

    Cheap enough to be called for every frame.
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
    """Yield (position of the job, its result), as the jobs finish.

    function: of a module; it calls `tick()` once a clip and `check_stop()` often.
    num_workers: processes, 0 for one a core; with 1 the jobs run in this process.
    The first exception of a job stops the others and is raised here.
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
    """Run the jobs in this process; a thread shows their progress."""
    # The same counter as in a worker, so that `tick` and `check_stop` need no second way.
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
    while not done.wait(_POLL_S):
        _show(shared, bar)
    _show(shared, bar)


def _run_in_processes(
    function: Callable[[Any], Any], jobs: Sequence[Any], num_workers: int, bar: Progress
) -> Iterator[tuple[int, Any]]:
    """Run the jobs in worker processes; the first exception stops all of them."""
    shared = _Shared()
    # Spawn: forking a process whose libraries run threads can hang it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _begin_worker, initargs=(shared,))
    positions: dict[Future[Any], int] = {}
    try:
        # `submit` starts the workers. They inherit the blocked signals until they ignore
        # them.
        with signals_held():
            for position, job in enumerate(jobs):
                positions[pool.submit(function, job)] = position
        waiting = set(positions)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            _show(shared, bar)
            # False sorts before True: an error comes before the Stopped that it caused in
            # other workers.
            for future in sorted(done, key=lambda f: isinstance(f.exception(), Stopped)):
                yield positions[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "every worker must live to the end, but one was killed, most often for want of "
            "memory. Use fewer with --workers."
        ) from error
    finally:
        # Workers leave at their next `check_stop`; jobs that wait are not begun.
        shared.stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back; a process that is started meanwhile inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show(shared: _Shared, bar: Progress) -> None:
    bar.update(shared.num_done.value - bar.n)


def _begin_worker(shared: _Shared) -> None:
    global _shared
    _shared = shared
    begin_worker()


def begin_worker() -> None:
    """Initialize a pool's worker: the parent answers the signals; without it the worker
    leaves."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    # A killed parent cannot stop its workers, so a thread waits for its end.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    # Not sys.exit, which would end this thread alone.
    os._exit(1)


def num_cores() -> int:
    """Return the cores that this process may use; a container or SLURM may have limited them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
