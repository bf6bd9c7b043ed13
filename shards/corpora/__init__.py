"""What every importer yields, and how tables are read. One module per corpus; nothing else knows a corpus.

An importer is `read(source, splits, **its own options) -> Corpus`; `shards/build.py` lists them. It reads
tables only: whether videos are there and decode is the build's business, the same for every corpus.
"""

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flallm_ds.data.video import VIDEO_SUFFIXES, Box
from flallm_ds.errors import UserError

SPLITS = ("train", "dev", "test")
SIGNSIM_FILE = "signsim.json"  # marks a folder of the synthetic corpus, which has PHOENIX14T's layout
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "dev", "valid": "dev", "validation": "dev"}


@dataclass(frozen=True)
class Row:
    """One clip of a corpus as its table has it."""

    id: str  # the corpus's own
    path: Path  # a video file or a folder of frame images; may be absent, which the build reports
    text: str
    language: str
    signer: str = ""
    video: str = ""  # the source video or broadcast that the clip was cut from
    start_s: float | None = None
    end_s: float | None = None
    gloss: str = ""
    bbox: Box | None = None  # x0, y0, x1, y1 from 0 to 1: the part to keep
    image_fps: float = 25.0  # of a folder of frame images
    stretch_hw: tuple[int, int] | None = None  # the size a frame is meant to be seen at, before short_side


@dataclass(frozen=True)
class Corpus:
    """The rows of each split in table order, and what the user should know about how they were read."""

    name: str
    language: str
    rows: dict[str, list[Row]]
    notes: list[str] = field(default_factory=list)


def read_table(
    path: Path, delimiter: str, columns: Sequence[str], quoted: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a table with a header line that has at least `columns`; LF or CRLF, UTF-8.

    quoted: fields in double quotes are unquoted (csv's minimal quoting), else quotes are ordinary characters.
    Raises UserError that names the file and line of what does not fit.
    """
    if not path.is_file():
        raise UserError(f"a table must be there, but is not: {path}.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(
                file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            )
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(
                    f"a table must have the column {missing[0]!r}, but its first line is "
                    f"{delimiter.join(header)[:200]!r}: {path}. Check that it is the corpus's own table."
                )
            for fields in reader:
                if not any(fields):
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"a row must have {len(header)} fields, but has {len(fields)}: {path}, line "
                        f"{reader.line_num}. Correct the table."
                    )
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(
            f"a table must be readable UTF-8 text, but {error}: {path}. Correct the table."
        ) from error


def first_line(path: Path) -> str:
    """The first line of a text file, to tell by which character it is separated."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(100_000)
    except OSError as error:
        raise UserError(f"a table must be readable, but {error.strerror}: {path}.") from error


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder in a fixed order, hidden ones left out; links to folders are followed."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def videos_below(folder: Path) -> dict[str, Path]:
    """Every video file below a folder, by its name without suffix."""
    found: dict[str, Path] = {}
    for path in files_below(folder):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.setdefault(path.stem, path)
    return found


def find_file(source: Path, usual: str, pattern: str) -> Path | None:
    """source/usual, or else the first file below whose name matches the pattern; None without one."""
    if (source / usual).is_file():
        return source / usual
    return min(source.rglob(pattern), default=None)


def read_seconds(value: str, what: str, required: bool = False) -> float | None:
    """A time given as seconds or as h:m:s, None for an empty one unless it is required.

    Raises UserError that begins with `what`.
    """
    if not value.strip() and not required:
        return None
    try:
        parts = [float(part) for part in value.split(":")]
    except ValueError:
        parts = [-1.0]
    seconds = sum(part * 60.0**place for place, part in enumerate(reversed(parts)))
    if len(parts) > 3 or not all(0 <= part < 1e7 for part in parts) or seconds >= 1e7:
        raise UserError(f"{what} must be seconds from 0 up, or h:m:s, but is {value!r}. Correct the table.")
    return seconds


def read_split(value: str, what: str) -> str:
    """train, dev or test by any of its names. Raises UserError that begins with `what`."""
    split = SPLIT_NAMES.get(value.strip().lower())
    if split is None:
        raise UserError(f"{what} split must be one of {', '.join(SPLIT_NAMES)}, but is {value!r}.")
    return split


def split_of(video: str) -> str:
    """train, dev or test (80, 10 and 10 %) for a source video, by its name alone: never by clip."""
    percent = int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big") % 100
    return "train" if percent < 80 else "dev" if percent < 90 else "test"


def first_of(names: Sequence[str]) -> str:
    """The first three, for a note."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
