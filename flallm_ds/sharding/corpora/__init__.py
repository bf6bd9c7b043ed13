"""Define Row and Corpus, which every importer returns, and read tables.

There is one module per corpus; no other code depends on a corpus. An importer is
`read(source, splits, **own_options) -> Corpus`; `sharding/rows.py` lists the importers.
An importer reads tables only. The build checks that videos exist and decode, in the same
way for every corpus.
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

from flallm_ds.data.codecs.sizes import Box
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
_MAX_S = 1e7  # 115 days; a larger time is a mistake
# Unicode categories that are invisible on their own: controls, spaces, combining marks.
_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me"))
# Letters and symbols without a visible shape.
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")


@dataclass(frozen=True)
class Row:
    """One clip as it is listed in the table of a corpus."""

    id: str  # from the corpus
    # A video file or a folder of frame images. The build reports a missing one.
    path: Path
    text: str
    language: str
    signer: str = ""
    video: str = ""  # the source video or broadcast that the clip was cut from
    start_s: float | None = None
    end_s: float | None = None
    gloss: str = ""
    bbox: Box | None = None  # x0, y0, x1, y1 from 0 to 1: the part of the frame to keep
    image_fps: float = 25.0  # frame rate of a folder of frame images
    # Height and width that frames are stretched to before they are scaled to short_side.
    stretch_hw: tuple[int, int] | None = None


@dataclass(frozen=True)
class Corpus:
    """Hold the rows of each split in table order, and notes for the user about reading."""

    name: str
    language: str
    rows: dict[str, list[Row]]
    notes: list[str] = field(default_factory=list)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text file without their line ends (LF, CRLF or CR).

    Raises UserError that names the file, and the line that is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"Cannot read table {path}: it does not exist. Check --source.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Cannot read table {path}: {error.strerror}. Check the file."
        ) from error
    # Excel's "Unicode text" is UTF-16, which UTF-8 would report as a wrong byte.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{path} must be a text file in UTF-8, got UTF-16. Save it as UTF-8."
        )
    try:
        lines = _LINE_END.split(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # The bytes before the wrong one can be decoded; they give the line number.
        before = error.object[: error.start].decode("utf-8")
        number = len(_LINE_END.split(before))
        byte = error.object[error.start]
        raise UserError(
            f"{path}, line {number}: the text must be UTF-8, got byte 0x{byte:02x} "
            f"({error.reason}). Save the file as UTF-8."
        ) from error
    # UTF-16 without a byte order mark is valid UTF-8 with a NUL after each letter.
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(
                f"{path}, line {number}: the text must be UTF-8, got a NUL byte. Save the "
                "file as UTF-8."
            )
    return lines


def read_table(
    path: Path, delimiter: str, columns: Sequence[str], quoted: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a table with one row per line.

    columns: the columns that the header must have. quoted: whether fields in double quotes
    are unquoted (csv's minimal quoting); otherwise quotes are ordinary characters. Raises
    UserError that names the file and the line.
    """
    # Check the delimiter first: with a wrong one, every column seems to be missing.
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
            raise UserError(
                f"{what} a row must have {len(header)} fields, got {len(fields)}. Correct "
                "the table."
            )
        yield number, dict(zip(header, fields, strict=True))


def _fields(line: str, delimiter: str, quoted: bool, what: str) -> list[str]:
    """Split one line into fields. An open quote cannot extend to the next rows."""
    if not quoted:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise UserError(
            f"{what} a field in double quotes must close on its line and double each quote "
            f"inside, got {line!r:.80} ({error}). Correct the quotes."
        ) from error


def _check_delimiter(
    line: str,
    delimiter: str,
    columns: Sequence[str],
    quoted: bool,
    path: Path,
) -> None:
    """Raise UserError if the header has all columns with another delimiter or in quotes."""
    # Find the delimiters with which the line has all columns.
    fits = []
    for one in _DELIMITERS:
        names = {field.strip(' "') for field in line.split(one)}
        if names.issuperset(columns):
            fits.append(one)
    # With none: a column is missing, which _check_header reports.
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
    """Raise UserError for a column that is missing or occurs twice."""
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
                f"{path}, line 1: the header must have the column {name!r}, got "
                f"{delimiter.join(header)[:200]!r}. Check that the file is the table of "
                "the corpus."
            )


def check_text(text: str, what: str) -> None:
    """Raise UserError for a text with a line break or a control character.

    what: the start of the message.
    """
    if found := _NOT_IN_A_TEXT.search(text):
        raise UserError(
            f"{what} must be one line without TABs and control characters, got "
            f"{found[0]!r} in {text!r:.60}. Correct the table."
        )


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    for char in text:
        if unicodedata.category(char) not in _INVISIBLE and char not in _FILLERS:
            return False
    return True


def first_line(path: Path) -> str:
    """Read the first line of a text file, which shows the delimiter of its columns."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(100_000)
    except OSError as error:
        raise UserError(
            f"Cannot read table {path}: {error.strerror}. Check the file."
        ) from error


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order. Links to folders are followed.

    Hidden files and folders are skipped: macOS writes "._clip.mp4" next to clip.mp4.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # Without this, a link to one of its parent folders would never end.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk descends into the folders that remain in this list, in this order.
        folders[:] = sorted(filter(_is_visible, folders))
        for name in sorted(filter(_is_visible, names)):
            yield Path(place, name)


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def find_file(source: Path, usual: str, pattern: str) -> Path | None:
    """Find source/usual, or else the one file below the source that matches the pattern.

    Returns None if there is none. Raises UserError if two matching files differ.
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
    """Return whether two paths are the same file or have the same bytes."""
    return path.samefile(other) or filecmp.cmp(path, other, shallow=False)


def parse_seconds(value: str, what: str, required: bool = False) -> float | None:
    """Parse a time in seconds or as h:m:s. An empty one is None unless it is required.

    Raises UserError. what: the start of the message.
    """
    if not value.strip() and not required:
        return None
    fields = value.split(":")
    if len(fields) <= 3 and all(map(_NUMBER.fullmatch, fields)):
        seconds = clock_seconds(list(map(float, fields)))
        if seconds < _MAX_S:
            return seconds
    raise UserError(
        f"{what} must be seconds (at least 0) or h:m:s, got {value!r}. Correct the table."
    )


def clock_seconds(parts: Sequence[float]) -> float:
    """Return the seconds of a time that is given as [s], [m, s] or [h, m, s]."""
    return sum(part * 60.0**place for place, part in enumerate(reversed(parts)))


def parse_split(value: str, what: str) -> str:
    """Return train, dev or test for any name of the split.

    Raises UserError. what: the start of the message.
    """
    split = SPLIT_NAMES.get(value.strip().lower())
    if split is None:
        names = ", ".join(SPLIT_NAMES)
        raise UserError(
            f"{what} split must be one of {names}, got {value!r}. Correct the table."
        )
    return split


def split_of(video: str) -> str:
    """Return train, dev or test (80, 10 and 10 %) for a source video, by its name.

    All clips of a source video are in one split.
    """
    # A hash, not a random draw: a video keeps its split on every machine, and when the
    # corpus grows.
    percent = int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big") % 100
    if percent < 80:
        return "train"
    return "dev" if percent < 90 else "test"


def first_three(names: Sequence[str]) -> str:
    """Return the first three names, for a note."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
