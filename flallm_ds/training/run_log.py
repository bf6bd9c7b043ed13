"""log.txt of a run: every line that rank 0 prints, with its time."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any, cast

from flallm_ds.dist import World, main_first
from flallm_ds.errors import Preempted, UserError, file_problem
from flallm_ds.terminal import one_line

LOG = "log.txt"


class RunLog:
    """The open log of rank 0. A write that fails is kept in mind and raised by `check`."""

    def __init__(self, path: Path) -> None:
        """Open the log to append. Raises OSError."""
        self.path = path
        self.problem: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def line(self, text: str) -> None:
        text = one_line(text.rsplit("\r", 1)[-1])  # of a progress bar the last state
        self._try(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def check(self) -> None:
        """Raise UserError where a line could not be written."""
        if self.problem is not None:
            raise UserError(
                f"The log {self.path} is not complete. {file_problem(self.problem)}"
            )

    def close(self) -> None:
        self._try("")
        try:
            self._file.close()
        except OSError as error:  # what could not be written before
            self.problem = self.problem or error

    def _try(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or str(self.path)
            self.problem = self.problem or error


class _Tee:
    """A stream that passes everything on as it is, and gives each whole line to the log."""

    def __init__(self, stream: IO[str], log: RunLog) -> None:
        self._stream, self._log = stream, log
        self._begun = ""

    def write(self, text: str) -> int:
        # The last part has no end yet: keep it for the next write.
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._log.line(line)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def run_log(folder: Path, world: World) -> Iterator[RunLog | None]:
    """Log what rank 0 prints meanwhile, and the error that it ends with. None on the other ranks.

    Raises UserError on every rank where the log cannot be opened, or where a line was
    lost.
    """
    opened: list[RunLog] = []
    main_first(lambda: opened.append(RunLog(folder / LOG)), world)
    if not opened:
        yield None
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
    except BaseException:
        for line in traceback.format_exc().splitlines():
            log.line(line)
        raise
    finally:
        log.close()
    main_first(log.check, world)
