"""What every importer yields, and how tables are read.

There is one module per corpus; nothing else knows a corpus. An importer is `read(source,
splits, **its own options) -> Corpus`, and `sharding/rows.py` lists them. It reads tables
only: whether videos are there and decode is the business of the build, the same for every
corpus.
"""

import codecs
import csv
import filecmp
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from flallm_ds.data.codecs.video import Box
from flallm_ds.errors import UserError

SPLITS = ("train", "dev", "test")
SIGNSIM_FILE = "signsim.json"  # marks the synthetic corpus, which has PHOENIX14T's layout
SPLIT_NAMES = {
    "train": "train",
    "dev": "dev",
    "test": "test",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
}

# The characters that tables are separated by, with their names in messages.
_DELIMITERS = {",": "commas", "\t": "TABs", "|": "|", ";": "semicolons"}
_LINE_END = re.compile(r"\r\n|\r|\n")
_NOT_IN_A_TEXT = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
# float alone would also take "1_000", "nan" and digits of other scripts.
_NUMBER = re.compile(r"\s*\+?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?\s*", re.IGNORECASE)
_MAX_S = 1e7  # 115 days: beyond it a time is a mistake
# Unicode categories that are drawn as nothing: controls, spaces, combining marks.
_UNSEEN = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"))
# letters and symbols drawn as nothing
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")


@dataclass(frozen=True)
class Row:
    """One clip of a corpus as its table has it."""

    id: str  # the corpus's own
    # a video file or a folder of frame images; may be absent, which the build reports
    path: Path
    text: str
    language: str
    signer: str = ""
    video: str = ""  # the source video or broadcast that the clip was cut from
    start_s: float | None = None
    end_s: float | None = None
    gloss: str = ""
    bbox: Box | None = None  # x0, y0, x1, y1 from 0 to 1: the part to keep
    image_fps: float = 25.0  # of a folder of frame images
    # The size that a frame is meant to be seen at, before short_side.
    stretch_hw: tuple[int, int] | None = None


@dataclass(frozen=True)
class Corpus:
    """The rows of each split in table order, and notes for the user on how they were read."""

    name: str
    language: str
    rows: dict[str, list[Row]]
    notes: list[str] = field(default_factory=list)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text file without their ends (LF, CRLF or CR).

    Raises UserError that names the file, and the line of what is no UTF-8 text.
    """
    if not path.is_file():
        raise UserError(f"a table must be there, but is not: {path}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"a table must be readable, but {error.strerror}: {path}."
        ) from error
    # Excel's "Unicode text" is UTF-16, which UTF-8 would report as a wrong byte.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        got = f"got UTF-16: {path}. Save it as UTF-8."
        raise UserError(f"a table must be readable text in UTF-8, {got}")
    try:
        lines = _LINE_END.split(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # What is before the wrong byte can be decoded, and gives its line.
        before = error.object[: error.start].decode("utf-8")
        number = len(_LINE_END.split(before))
        byte = error.object[error.start]
        raise UserError(
            f"{path}, line {number}: a table must be readable text in UTF-8, got "
            f"byte 0x{byte:02x} ({error.reason}). Save it as UTF-8."
        ) from error
    # UTF-16 without a mark at its start is valid UTF-8 with a NUL after each letter.
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(
                f"{path}, line {number}: a table must be readable text in UTF-8, got a NUL "
                "byte. Save it as UTF-8."
            )
    return lines


def read_table(
    path: Path, delimiter: str, columns: Sequence[str], quoted: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a table with one row a line.

    columns: those that its header line must have. quoted: fields in double quotes are
    unquoted (csv's minimal quoting), else quotes are ordinary characters. Raises
    UserError that names the file and line of what does not fit.
    """
    # A wrong delimiter first: without it, every column would be missing.
    lines = read_lines(path)
    _check_delimiter(lines[0], delimiter, columns, quoted, path)
    names = _fields(lines[0], delimiter, quoted, f"{path}, line 1:")
    header = list(map(str.strip, names))
    _check_header(header, delimiter, columns, path)
    for number, line in enumerate(lines[1:], 2):
        what = f"{path}, line {number}:"
        fields = _fields(line, delimiter, quoted, what)
        # Blank lines, and the ",,," that spreadsheets write below the last row.
        if not "".join(fields).strip():
            continue
        if len(fields) != len(header):
            wanted = f"a row must have {len(header)} fields"
            raise UserError(f"{what} {wanted}, got {len(fields)}. Correct the table.")
        yield number, dict(zip(header, fields, strict=True))


def _fields(line: str, delimiter: str, quoted: bool, what: str) -> list[str]:
    """Split one line into its fields, alone: an open quote cannot swallow the next rows."""
    if not quoted:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise UserError(
            f"{what} a field in double quotes must close on its line and have each quote "
            f"within it doubled, got {line!r:.80} ({error}). Correct the quotes."
        ) from error


def _check_delimiter(
    line: str,
    delimiter: str,
    columns: Sequence[str],
    quoted: bool,
    path: Path,
) -> None:
    """Raise UserError if a header has all columns, but by another delimiter or in quotes."""
    # The delimiters by which the line has all columns.
    fits = []
    for one in _DELIMITERS:
        names = {field.strip(' "') for field in line.split(one)}
        if names.issuperset(columns):
            fits.append(one)
    # None does: a column is missing, which _check_header reports.
    if not fits:
        return
    wanted, other = _DELIMITERS[delimiter], _DELIMITERS[fits[0]]
    if delimiter not in fits:
        raise UserError(
            f"{path}, line 1: fields must be separated by {wanted}, got {line[:200]!r} "
            f"with {other}. Save the table with {wanted}."
        )
    if not quoted and f'"{columns[0]}"' in line:
        raise UserError(
            f"{path}, line 1: a table separated by {wanted} must have no quotes around its "
            f"fields, got {line[:200]!r}. Save it without quoting."
        )


def _check_header(
    header: Sequence[str],
    delimiter: str,
    columns: Sequence[str],
    path: Path,
) -> None:
    """Raise UserError for a column that is missing or there twice."""
    # Columns without a name may repeat: nothing reads them.
    for name, count in Counter(header).items():
        if name and count > 1:
            raise UserError(
                f"{path}, line 1: each column must have its own name, got {name!r} twice. "
                "Rename one."
            )
    for name in columns:
        if name not in header:
            raise UserError(
                f"a table must have the column {name!r}, but its first line is "
                f"{delimiter.join(header)[:200]!r}: {path}. Check that it is the corpus's "
                "own table."
            )


def check_text(text: str, what: str) -> None:
    """Raise UserError that begins with `what` for a text with a line break or control
    character."""
    if found := _NOT_IN_A_TEXT.search(text):
        raise UserError(
            f"{what} must be one line without TABs and control characters, got "
            f"{found[0]!r} in {text!r:.60}. Correct the table."
        )


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, zero-width and combining characters
    alone."""
    for char in text:
        if unicodedata.category(char) not in _UNSEEN and char not in _FILLERS:
            return False
    return True


def first_line(path: Path) -> str:
    """Read the first line of a text file, to tell by which character it is separated."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(100_000)
    except OSError as error:
        raise UserError(
            f"a table must be readable, but {error.strerror}: {path}."
        ) from error


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order; links to folders are followed.

    Hidden files and folders are left out: macOS writes "._clip.mp4" next to clip.mp4.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # Without this, a link to a folder above it would never end.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk descends into what is left in this list, in its order.
        folders[:] = sorted(filter(_is_visible, folders))
        for name in sorted(filter(_is_visible, names)):
            yield Path(place, name)


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def find_file(source: Path, usual: str, pattern: str) -> Path | None:
    """Find source/usual, or else the one file below whose name matches the pattern.

    Returns None without one. Raises UserError if there are several that differ.
    """
    if (source / usual).is_file():
        return source / usual
    found: Path | None = None
    for path in files_below(source):
        if not fnmatch(path.name, pattern) or not path.is_file():
            continue
        if found is None:
            found = path
        elif not same_content(found, path):
            raise UserError(
                f"--source must hold one {pattern}, got two that differ: {found} and "
                f"{path}. Move one of them away."
            )
    return found


def same_content(path: Path, other: Path) -> bool:
    """Whether two files are one, or byte by byte alike."""
    return path.samefile(other) or filecmp.cmp(path, other, shallow=False)


def read_seconds(value: str, what: str, required: bool = False) -> float | None:
    """Read a time given as seconds or as h:m:s, None for an empty one unless it is required.

    Raises UserError that begins with `what`.
    """
    if not value.strip() and not required:
        return None
    fields = value.split(":")
    if len(fields) <= 3 and all(map(_NUMBER.fullmatch, fields)):
        seconds = clock_seconds(list(map(float, fields)))
        if seconds < _MAX_S:
            return seconds
    wanted = f"{what} must be seconds from 0 up, or h:m:s"
    raise UserError(f"{wanted}, but is {value!r}. Correct the table.")


def clock_seconds(parts: Sequence[float]) -> float:
    """Return the seconds of a clock's parts: s, m:s or h:m:s."""
    return sum(part * 60.0**place for place, part in enumerate(reversed(parts)))


def read_split(value: str, what: str) -> str:
    """Return train, dev or test for any of its names.

    Raises UserError that begins with `what`.
    """
    split = SPLIT_NAMES.get(value.strip().lower())
    if split is None:
        names = ", ".join(SPLIT_NAMES)
        raise UserError(f"{what} split must be one of {names}, but is {value!r}.")
    return split


def split_of(video: str) -> str:
    """Draw train, dev or test (80, 10 and 10 %) for a source video, by its name: never by
    clip."""
    # A hash instead of a draw: the same on every machine, and for a corpus that grows.
    percent = int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big") % 100
    if percent < 80:
        return "train"
    return "dev" if percent < 90 else "test"


def first_of(names: Sequence[str]) -> str:
    """Return the first three, for a note."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
