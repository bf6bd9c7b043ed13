"""The process of a command: how signals end it, which rank it is, and how it ends."""

import atexit
import os
import signal
import sys
import threading
import types
from typing import NoReturn


def answer_signals(importing: bool = False) -> None:
    """Let Ctrl-C, SIGTERM and a lost terminal (SIGHUP) end the process without a traceback.

    They unwind the command, so that it tidies up; a second Ctrl-C does not wait for that.
    A signal that is ignored, as SIGHUP under nohup, stays ignored. In a run of several
    ranks, SIGTERM and SIGHUP end each rank at once: one that waits for another would not
    wake up. importing: set before slow imports, during which Ctrl-C ends at once.
    """
    sys.unraisablehook = _report_ignored
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave if importing else _interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL and not importing and not _is_rank():
            signal.signal(number, _end)


def end_at_once() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end a process in which nothing is to be tidied up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


def _interrupt(number: int, frame: types.FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _report_ignored(ignored: "sys.UnraisableHookArgs") -> None:
    """Report an exception of a destructor as Python does, except a Ctrl-C."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)


def _end(number: int, frame: types.FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _leave(number: int, frame: types.FrameType | None) -> NoReturn:
    if process_rank() == 0:
        os.write(2, b"stopped.\n")
    os._exit(128 + number)


_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def process_rank() -> int:
    """Return this process's rank as its launcher set it, before any process group exists."""
    for name in _RANKS:
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _is_rank() -> bool:
    """Return whether a launcher started this process as one of several."""
    return any(int(os.environ.get(name, "1")) > 1 for name in _WORLD_SIZES)


def end_process(code: int) -> NoReturn:
    """End as Python does; after a process group, without taking the interpreter down.

    A gloo thread that waits for the interpreter while it is taken down aborts the
    finished process (https://github.com/pytorch/pytorch/issues/190489), and the launcher
    then reports a failed run. gloo's threads cannot be joined: DeepSpeed keeps the group
    that owns them.
    """
    # Not imported here: dist needs torch, which takes seconds.
    ranks = sys.modules.get("flallm_ds.dist")
    # A profiler writes its file when the interpreter ends.
    if ranks is None or not ranks.was_started or sys.getprofile() is not None:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
