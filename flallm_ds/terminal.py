"""Print text and progress on a terminal or to a log file, without ever failing."""

import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

# Seconds between two lines of progress in a log file.
LOG_EVERY_S = 10.0

# C0 and C1 control characters except tab and newline, DEL, line separators, and characters
# that change the direction of a line.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# No process reads the output any more: `| head` has ended, or the terminal was closed.
_NO_READER = (errno.EPIPE, errno.EIO)

# The first error of another kind, e.g. a full disk.
_write_error: OSError | None = None


def printable(text: str) -> str:
    r"""Replace control and bidirectional characters by their escapes (`\x1b`)."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Make the text of a corpus or a model printable on one line."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def note(sentence: str) -> None:
    """Print a sentence for the user on stderr."""
    print(printable(sentence), file=sys.stderr, flush=True)


def prepare() -> None:
    """Set up stdout and stderr so that no print fails. Call it once, at the start.

    A character that the encoding does not have is written as its escape. If the reader of
    the output ends, the command continues without output: its results are in files and its
    exit code is correct. Control characters are escaped on stdout, because texts of corpora
    and models are printed there.
    """
    for name, kind in (("stdout", _EscapingText), ("stderr", _Text)):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            stream.flush()
            text = kind(
                io.BufferedWriter(io.FileIO(stream.fileno(), "w", closefd=False)),
                encoding=stream.encoding,
                errors="backslashreplace",
                # `python -u` sets write_through.
                line_buffering=stream.line_buffering or stream.write_through,
            )
            setattr(sys, name, text)
    if not shows_bars():
        # huggingface_hub reads this when it is imported, which is later. It turns off the
        # bars of downloads and of loading weights.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _Text(io.TextIOWrapper):
    """A text stream that drops all further output once a write fails."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        global _write_error
        if error.errno not in _NO_READER and _write_error is None:
            _write_error = error
        # Redirect the descriptor itself, for buffered text and for the output of libraries.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


class _EscapingText(_Text):
    """A text stream that escapes control characters."""

    def write(self, text: str) -> int:
        return super().write(printable(text))


def write_error() -> str:
    """Return why output was lost, e.g. "No space left on device"; empty if none was."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _write_error is None:
        return ""
    return _write_error.strerror or str(_write_error)


def shows_bars() -> bool:
    """Return whether stderr is a terminal on which a progress bar can be updated."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress(Protocol):
    """A progress display, as `progress` yields it."""

    # Number of clips done.
    n: int

    def update(self, n: int) -> Any:
        """Count `n` more as done."""


@contextmanager
def progress(total: int, title: str, unit: str = "clip") -> Iterator[Progress]:
    """Show on stderr how many of `total` clips are done, as a bar or as lines of a log.

    unit: what is counted instead of clips, in the singular.
    """
    if shows_bars():
        # Imported only if a bar is shown.
        from tqdm import tqdm

        with tqdm(
            total=total,
            unit=unit,
            desc=title,
            smoothing=0.05,
            mininterval=0.2,
            dynamic_ncols=True,
        ) as bar:
            yield bar
    else:
        lines = ProgressLines(total, title, unit)
        try:
            yield lines
        finally:
            lines.print_line()


class ProgressLines:
    """Print lines with clips per second and remaining time, at most every LOG_EVERY_S."""

    def __init__(self, total: int, title: str, unit: str = "clip") -> None:
        self.total, self.title, self.unit, self.n = total, title, f"{unit}s", 0
        self._begin = self._printed = time.monotonic()

    def update(self, n: int) -> None:
        """Count `n` more clips as done, and print a line if it is time."""
        self.n += n
        if time.monotonic() - self._printed >= LOG_EVERY_S:
            self.print_line()

    def print_line(self) -> None:
        """Print a line."""
        self._printed = time.monotonic()
        seconds = self._printed - self._begin
        rate = self.n / seconds if seconds else 0.0
        end = clock(seconds)
        if 0 < self.n < self.total:
            end = f"left {clock((self.total - self.n) / rate)}"
        done = f"{self.title}: {self.n}/{self.total} {self.unit}"
        line = f"{done}  {rate:.1f} {self.unit}/s  {end}"
        print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
