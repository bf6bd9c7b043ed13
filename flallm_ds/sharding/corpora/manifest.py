"""Read any corpus from a manifest: CSV, TSV or JSON lines with a video and a text per row.

Required columns: video, text. Optional columns: start, end (seconds or h:m:s within the
video), split, signer, language, id, bbox ("x0,y0,x1,y1", each 0 to 1: the part of the frame
to keep) and fps (frame rate of a folder of frame images; default 25). A video is a file or
a folder of frame images; its path is relative to the folder of the manifest. Without a
split column, a hash of the path assigns each video to train, dev or test (80, 10 and
10 %): all clips of a video are in one split, which is the same on every machine.
"""

import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from flallm_ds.data.text.languages import language_tag
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    check_text,
    first_three,
    parse_seconds,
    parse_split,
    read_lines,
    read_table,
    split_of,
)

# Columns by the type of their values in JSON.
_NEEDED = ("video", "text")
_STRINGS = (*_NEEDED, "split", "signer", "language", "id")
_NUMBERS = ("start", "end", "fps")
_COLUMNS = (*_NEEDED, "start", "end", "split", "signer", "language", "id", "bbox", "fps")
# Minimum difflib ratio of a misspelt name: "langage" is language, "sign" is not signer.
_MIN_RATIO = 0.82


def read(source: Path, splits: tuple[str, ...], *, language: str = "") -> Corpus:
    """Any corpus with a manifest. --source: a CSV, TSV or JSON lines file (docs/data.md).

    --language: language of the texts (de, German, zh-Hant, ...) if the manifest has no
        such column.
    """
    language = language_tag(language, "--language") if language else ""
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    unused: set[str] = set()
    languages: set[str] = set()
    first_line_of: dict[Any, int] = {}
    quoted: list[str] = []  # numbers of the TSV lines whose text is in quotes
    for line, fields in _read_lines(source):
        what = f"{source}, line {line}:"
        unused |= _unused(fields, what)
        split, row = _read_row(fields, source.parent, language, what)
        _check_once(row, fields.get("id", "").strip(), line, first_line_of, what)
        languages.add(row.language)
        if split in rows:
            rows[split].append(row)
        if source.suffix.lower() == ".tsv" and re.fullmatch('".+"', row.text):
            quoted.append(str(line))
    notes = []
    if unused:
        notes.append(f"columns that are not used: {', '.join(sorted(unused))}")
    if quoted:
        notes.append(
            f"{len(quoted):,} texts begin and end with a double quote, which is kept: a "
            f"TSV has no quoting (lines {first_three(quoted)})"
        )
    language = languages.pop() if len(languages) == 1 else "mixed"
    return Corpus(source.stem, language, rows, notes)


def _unused(fields: dict[str, str], what: str) -> set[str]:
    """Return the names of the columns that are not read.

    Raises UserError for a name that is probably a misspelt column.
    """
    unused = set()
    for name in sorted(fields.keys() - set(_COLUMNS)):
        meant = _meant(name)
        if meant and meant not in fields:
            raise UserError(
                f"{what} columns must be named {', '.join(_COLUMNS)}, got {name!r} and no "
                f"{meant!r}. Rename it to {meant}; if it is another column, use a name that "
                "is less similar."
            )
        unused.add(name or "(without a name)")
    return unused


@cache
def _meant(name: str) -> str | None:
    """Return the column that an unknown name probably stands for, None for no column."""
    plain = name.strip().lower()
    # "start_s", "end time": without "start", each row would be the whole video.
    first = re.split(r"[^a-z]", plain)[0]
    if first in ("start", "end", "split"):
        return first
    # The same letters in another order, then similar names.
    for column in _COLUMNS:
        if sorted(column) == sorted(plain):
            return column
    near = get_close_matches(plain, _COLUMNS, 1, _MIN_RATIO)
    return near[0] if near else None


def _check_once(
    row: Row, own_id: str, line: int, first_line_of: dict[Any, int], what: str
) -> None:
    """Raise UserError if an earlier row has the same id, or the same text, video and times.

    first_line_of: the line of each id and clip so far; this row is added to it.
    """
    # "./a.mp4" and "a.mp4" are the same file. A clip without a start begins at 0.
    place = (os.path.normpath(row.path), row.start_s or 0.0, row.end_s, row.bbox)
    first = first_line_of.setdefault((place, row.text, row.language), line)
    if first != line:
        raise UserError(
            f"{what} a row must occur once, got the video, times and text of line {first} "
            "again. Remove one of the two rows."
        )
    # Only ids from the manifest: an id that is made from the video also contains its times.
    first = first_line_of.setdefault(own_id, line) if own_id else line
    if first != line:
        raise UserError(
            f"{what} id must be unique, got {own_id!r} of line {first} again. Correct the "
            "manifest."
        )


def _read_row(
    fields: dict[str, str], folder: Path, language: str, what: str
) -> tuple[str, Row]:
    """Return (split, row) of one line. Raises UserError. what: the start of the message."""
    video = fields.get("video", "").strip()
    if not video:
        raise UserError(
            f"{what} video must be a file or folder, got an empty field. Correct the "
            "manifest."
        )
    for name in ("text", "signer", "id"):
        check_text(fields.get(name, "").strip(), f"{what} {name}")
    # The language of the row has priority over --language.
    named = fields.get("language", "").strip()
    language = language_tag(named, f"{what} language") if named else language
    if not language:
        raise UserError(f"{what} a text must have a language, got none. Set --language.")
    start_s = parse_seconds(fields.get("start", ""), f"{what} start")
    end_s = parse_seconds(fields.get("end", ""), f"{what} end")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise UserError(
            f"{what} end must be above start ({start_s or 0:g}), got {end_s:g}. Correct "
            "the manifest."
        )
    split = fields.get("split", "").strip()
    row = Row(
        id=fields.get("id", "").strip() or _made_id(video, start_s, end_s),
        path=folder / video,
        text=fields.get("text", "").strip(),
        language=language,
        signer=fields.get("signer", "").strip(),
        video=video,
        start_s=start_s,
        end_s=end_s,
        bbox=_read_box(fields.get("bbox", ""), what),
        image_fps=_read_fps(fields.get("fps", ""), what),
    )
    return parse_split(split, what) if split else split_of(video), row


def _made_id(video: str, start_s: float | None, end_s: float | None) -> str:
    """Return an id for a row without one: the video, with its times if it has some."""
    if start_s is None and end_s is None:
        return video
    return f"{video}:{start_s or 0:g}-{end_s or 'end'}"


def _read_box(value: str, what: str) -> tuple[float, float, float, float] | None:
    if not value.strip():
        return None
    try:
        x0, y0, x1, y1 = map(float, value.strip("[]() ").split(","))
    except ValueError:
        # Not four numbers: use an empty box, which is refused below.
        x0, y0, x1, y1 = 0.0, 0.0, 0.0, 0.0
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(
            f"{what} bbox must be x0,y0,x1,y1, each from 0 to 1, with x0 below x1 and y0 "
            f"below y1, got {value!r}. Correct the manifest."
        )
    return x0, y0, x1, y1


def _read_fps(value: str, what: str) -> float:
    if not value.strip():
        return Row.image_fps
    try:
        fps = float(value)
    except ValueError:
        fps = 0.0
    if not 1 <= fps <= 480:
        raise UserError(
            f"{what} fps must be from 1 to 480, got {value!r}. Correct the manifest."
        )
    return fps


def _read_lines(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    suffix = source.suffix.lower()
    if suffix == ".csv":
        return read_table(source, ",", _NEEDED, quoted=True)
    if suffix == ".tsv":
        return read_table(source, "\t", _NEEDED, quoted=False)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _read_json_lines(source)
    raise UserError(
        f"--source must be a .csv, .tsv or .jsonl manifest, got {source}. Save it as one of "
        "these."
    )


def _read_json_lines(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(read_lines(source), 1):
        if not line.strip():
            continue
        try:
            yield number, _plain(json.loads(line, object_pairs_hook=_object))
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(
                f"Cannot read {source}, line {number}: {why}. Correct the manifest: one JSON "
                "object per line."
            ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError for a name that occurs twice."""
    # json.loads alone would silently keep the last value.
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"each name must occur once, got {name!r} twice")
        fields[name] = value
    return fields


def _plain(fields: Any) -> dict[str, str]:
    """Return the values of a JSON object as strings, as they would be in a CSV.

    null is an empty field, except for video and text. Raises ValueError for a value of
    another type.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"a line must be a JSON object, got {json.dumps(fields)[:50]}")
    # A misspelt "text" is reported later, with the correct name.
    if "text" not in fields and "text" not in map(_meant, fields):
        names = ", ".join(fields)[:50] or "no name"
        raise ValueError(f"the object must have 'text', got {names}")
    plain = {}
    for name, value in fields.items():
        _check_type(name, value)
        if isinstance(value, list):
            plain[name] = ",".join(map(str, value))
        else:
            plain[name] = "" if value is None else str(value)
    return plain


def _check_type(name: str, value: Any) -> None:
    """Raise ValueError for a JSON value whose type is wrong for its column."""
    if value is None and name not in _NEEDED:
        return
    if name in _STRINGS and not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {json.dumps(value)[:50]}")
    # In Python, a bool is an int.
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    if name in _NUMBERS and not is_number:
        got = json.dumps(value)[:50]
        raise ValueError(f"{name} must be a number or a string, got {got}")
