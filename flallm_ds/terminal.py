"""What a person sees on a terminal or in a log file: text that can always be written, and
progress."""

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

LOG_EVERY_S = 10.0  # between two lines of progress: a log file keeps every line

# C0 and C1 controls but tab and newline, DEL, line separators, and what changes the
# direction of a line.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_NOBODY_READS = (errno.EPIPE, errno.EIO)  # `| head` has ended; the terminal is gone

_write_error: OSError | None = None  # the first one that is a fault, e.g. of a full disk


def printable(text: str) -> str:
    r"""Replace controls that would steer a terminal, bidirectional ones too, by their
    escapes (`\x1b`)."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Make text of a corpus or a model printable on one line."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def prepare() -> None:
    """Make stdout and stderr such that no print ever fails; called once, at the start of
    a command.

    A character that the encoding lacks is written as its escape. When nobody reads the
    output any more, the command goes on without it: its result is in files, and its exit
    code says how it ended. Texts of corpora and models go to stdout, where control
    characters are escaped.
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
                # python -u writes through
                line_buffering=stream.line_buffering or stream.write_through,
            )
            setattr(sys, name, text)
    if not shows_bars():
        # Read when huggingface_hub is imported, which is later: bars of downloads and of
        # loading weights.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _Text(io.TextIOWrapper):
    """A stream that people read: where it cannot be written, what comes after is dropped."""

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
        if error.errno not in _NOBODY_READS and _write_error is None:
            _write_error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # also for what is buffered, and for what a library writes
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _EscapingText(_Text):
    def write(self, text: str) -> int:
        return super().write(printable(text))


def write_error() -> str:
    """Why output was lost, e.g. "No space left on device"; empty if it was not, or if
    nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return (_write_error.strerror or str(_write_error)) if _write_error is not None else ""


def shows_bars() -> bool:
    """Whether stderr is a terminal on which a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress(Protocol):
    """What `progress` yields."""

    n: int

    def update(self, n: int) -> Any:
        """Count `n` more as done."""


@contextmanager
def progress(total: int, title: str) -> Iterator[Progress]:
    """Show how many of `total` clips are done, on stderr: a bar on a terminal, lines in a
    log file."""
    if shows_bars():
        # only where a bar is shown
        from tqdm import tqdm

        with tqdm(
            total=total,
            unit="clip",
            desc=title,
            smoothing=0.05,
            mininterval=0.2,
            dynamic_ncols=True,
        ) as bar:
            yield bar
    else:
        lines = ProgressLines(total, title)
        try:
            yield lines
        finally:
            lines.say()


class ProgressLines:
    """Plain lines now and then, with rate and time left; for where no bar can be drawn."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title, self.n = total, title, 0
        self._begin = self._said = time.monotonic()

    def update(self, n: int) -> None:
        self.n += n
        if time.monotonic() - self._said >= LOG_EVERY_S:
            self.say()

    def say(self) -> None:
        """Print a line."""
        self._said = time.monotonic()
        seconds = self._said - self._begin
        rate = self.n / seconds if seconds else 0.0
        end = (
            f"left {clock((self.total - self.n) / rate)}"
            if 0 < self.n < self.total
            else clock(seconds)
        )
        line = f"{self.title}: {self.n}/{self.total} clips  {rate:.1f} clips/s  {end}"
        print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
