"""Write log.txt of a run: every line that rank 0 prints, with its time."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any, cast

from flallm_ds.dist import World, main_first
from flallm_ds.errors import Preempted, UserError, file_problem
from flallm_ds.run_check import LOG
from flallm_ds.terminal import one_line


class RunLog:
    """Writes the log of rank 0. An error of a write is kept until `check` raises it."""

    def __init__(self, path: Path) -> None:
        """Open the log to append. Raises OSError."""
        self.path = path
        self.problem: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def line(self, text: str) -> None:
        """Append a line with the current time."""
        # A progress bar prints each state after a carriage return: keep the last one.
        text = one_line(text.rsplit("\r", 1)[-1])
        self._try(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def check(self) -> None:
        """Raise UserError if a line could not be written."""
        if self.problem is not None:
            raise UserError(
                f"{file_problem(self.problem)} The log {self.path} is incomplete."
            )

    def close(self) -> None:
        """Close the file, also after an error."""
        self._try("")
        try:
            self._file.close()
        # Closing tries again to write text that a full disk refused.
        except OSError as error:
            self.problem = self.problem or error

    def _try(self, text: str) -> None:
        """Write a text and keep the first OSError."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or str(self.path)
            self.problem = self.problem or error


class _Tee:
    """Writes text to a stream unchanged, and each complete line also to a log."""

    def __init__(self, stream: IO[str], log: RunLog) -> None:
        self._stream, self._log = stream, log
        self._incomplete = ""  # the line that has no end yet

    def write(self, text: str) -> int:
        *lines, self._incomplete = (self._incomplete + text).split("\n")
        for line in lines:
            self._log.line(line)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def run_log(folder: Path, world: World) -> Iterator[RunLog | None]:
    """Log what rank 0 prints while the block runs, and the error that ends the block.

    Yields the log, or None on the other ranks. Every rank must call it. Raises UserError
    on every rank if the log cannot be opened, or if a line could not be written.
    """
    opened: list[RunLog] = []
    main_first(lambda: opened.append(RunLog(folder / LOG)), world)
    if not opened:
        yield None
        # The counterpart of `check` on rank 0, which raises its error here, too.
        main_first(lambda: None, world)
        return
    (log,) = opened
    try:
        log.line(f"== {' '.join(sys.argv)}")
        out, err = _Tee(sys.stdout, log), _Tee(sys.stderr, log)
        with redirect_stdout(cast(IO[str], out)), redirect_stderr(cast(IO[str], err)):
            yield log
    except UserError as error:
        log.line(f"error: {error}")
        raise
    except Preempted as stop:
        log.line(str(stop))
        raise
    # An unexpected error, or Ctrl-C: its traceback is printed only after the block.
    except BaseException:
        for line in traceback.format_exc().splitlines():
            log.line(line)
        raise
    finally:
        log.close()
    main_first(log.check, world)
