"""Any sign corpus by a manifest: CSV, TSV or JSON lines with a video and a text a row.

Columns: video, text; optionally start, end (seconds or h:m:s within the video), split, signer, language, id,
bbox ("x0,y0,x1,y1", each 0 to 1: the part of the picture to keep) and fps (of a folder of frame images; 25).
A video is a file or a folder of frame images; its path is relative to the manifest's folder. Without a split
column, a video's clips go to train, dev or test (80, 10 and 10 %) by a hash of its path: never one video to
two splits, and the same on every machine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flallm_ds.errors import UserError
from shards.corpora import Corpus, Row, read_seconds, read_split, read_table, split_of

_COLUMNS = ("video", "text", "start", "end", "split", "signer", "language", "id", "bbox", "fps")


def read(source: Path, splits: tuple[str, ...], *, language: str = "") -> Corpus:
    """Any corpus by a manifest. --source: the CSV, TSV or JSON lines file (columns: see docs/data.md).

    --language: of the texts (de, en, zh, ...), where the manifest has no such column.
    """
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    unused: set[str] = set()
    languages: set[str] = set()
    for line, fields in _read_lines(source):
        unused |= fields.keys() - set(_COLUMNS)
        what = f"{source}, line {line}:"
        split, row = _read_row(fields, source.parent, language, what)
        languages.add(row.language)
        if split in rows:
            rows[split].append(row)
    notes = [f"columns that are not used: {', '.join(sorted(unused))}"] if unused else []
    return Corpus(source.stem, languages.pop() if len(languages) == 1 else "mixed", rows, notes)


def _read_row(fields: dict[str, str], folder: Path, language: str, what: str) -> tuple[str, Row]:
    """(split, row) of one line. Raises UserError that begins with `what`."""
    video = fields.get("video", "").strip()
    if not video:
        raise UserError(f"{what} video must name a file or folder, but is empty. Correct the manifest.")
    language = fields.get("language", "").strip() or language
    if not language:
        raise UserError(f"{what} a text must have a language, but has none. Give --language.")
    start_s = read_seconds(fields.get("start", ""), f"{what} start")
    end_s = read_seconds(fields.get("end", ""), f"{what} end")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise UserError(f"{what} end must be above start, but is {end_s:g}. Correct the manifest.")
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
    return read_split(split, what) if split else split_of(video), row


def _made_id(video: str, start_s: float | None, end_s: float | None) -> str:
    return video if start_s is None and end_s is None else f"{video}:{start_s or 0:g}-{end_s or 'end'}"


def _read_box(value: str, what: str) -> tuple[float, float, float, float] | None:
    if not value.strip():
        return None
    try:
        x0, y0, x1, y1 = (float(part) for part in value.strip("[]() ").split(","))
    except ValueError:
        x0, y0, x1, y1 = 0.0, 0.0, 0.0, 0.0
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(f"{what} bbox must be x0,y0,x1,y1 with each from 0 to 1, but is {value!r}.")
    return x0, y0, x1, y1


def _read_fps(value: str, what: str) -> float:
    if not value.strip():
        return Row.image_fps
    try:
        fps = float(value)
    except ValueError:
        fps = 0.0
    if not 1 <= fps <= 480:
        raise UserError(f"{what} fps must be from 1 to 480, but is {value!r}. Correct the manifest.")
    return fps


def _read_lines(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    suffix = source.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return read_table(source, "," if suffix == ".csv" else "\t", ("video", "text"))
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _read_json_lines(source)
    raise UserError(f"--source must be a .csv, .tsv or .jsonl manifest, but is {source}.")


def _read_json_lines(source: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with source.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _plain(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise UserError(f"a manifest must be JSON lines, but {error}: {source}.") from error


def _plain(fields: Any) -> dict[str, str]:
    """A JSON object's values as the strings that a CSV would hold."""
    if not isinstance(fields, dict):
        raise ValueError(f"a line is {json.dumps(fields)[:50]} where an object must be")
    return {
        name: "" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in fields.items()
    }
