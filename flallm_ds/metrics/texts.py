"""Read hypotheses and references from files of any project, and join them by id.

A file is text with a sentence on each line, JSON lines, or a table (.csv, .tsv).
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flallm_ds.errors import UserError

# Names of columns, in lower case, that mean the same; the first name of a file counts.
_NAMES = {
    "id": ("id", "key", "name", "sample", "sentence_name"),
    "hypothesis": ("hypothesis", "prediction", "hyp", "pred"),
    "reference": (
        "reference", "ref", "target",
        "ground-truth", "ground_truth",  # codespell:ignore truth
    ),
    "text": ("text", "translation", "sentence"),
    "language": ("language",),
}  # fmt: skip
# The lines of Uni-Sign's files.
_UNI_SIGN = re.compile(
    r"sample: (?P<id>.+?), "
    r"(?:prediction|reference|ground-truth): ?(?P<text>.*)"  # codespell:ignore truth
)
# Labels at the beginning of lines, such as "hyp: " and fairseq's "H-" before a number.
_LABEL = re.compile(r"\s*(?:\w[\w .-]{0,40}[:=|\t]\s*|[A-Z]-)")
# From this number of lines on, references that begin alike are taken for labelled lines.
_MIN_ALIKE = 10

# Maps the first names of `_NAMES` to values, one per sentence.
Columns = dict[str, list[str]]


@dataclass(frozen=True)
class Pairs:
    """Hypotheses with their references, in the order of the references.

    ids and languages: one per pair, or empty if the files have none.
    """

    hypotheses: list[str]
    references: list[str]
    ids: list[str]
    languages: list[str]


def read_pairs(hypotheses: Path, references: Path | None = None) -> Pairs:
    """Read hypotheses and references, and join them.

    references: by default the column of the file of hypotheses. With ids in both files, the
    order may differ. Raises UserError for files that do not fit each other.
    """
    said = read_columns(hypotheses)
    if references is None:
        if "reference" not in said:
            raise UserError(
                f"{hypotheses} must have columns hypothesis and reference if --references is "
                f"not given, got {', '.join(said)}. Give --references."
            )
        meant = said
    else:
        meant = read_columns(references)
    texts = _texts(said, "hypothesis", hypotheses)
    targets = _texts(meant, "reference", references or hypotheses)
    ids = meant.get("id", [])
    if references is not None:
        if ("id" in said) != ("id" in meant):
            with_ids, without = hypotheses, references
            if "id" in meant:
                with_ids, without = references, hypotheses
            raise UserError(
                f"Both files or none must have ids, got ids in {with_ids} and none in "
                f"{without}. Add a column id, or give plain sentences in the same order."
            )
        if "id" in said:
            texts = _by_id(texts, said["id"], ids, hypotheses, references)
    elif ids:
        _check_unique(ids, hypotheses)
    if not targets:
        raise UserError(
            f"{references or hypotheses} must have at least one sentence, got an empty file."
        )
    if len(texts) != len(targets):
        raise UserError(
            f"{hypotheses} must have a hypothesis for each of the {len(targets):,} sentences "
            f"of {references}, got {len(texts):,}. Give them in the same order, or add a "
            "column id to both files."
        )
    languages = meant.get("language") or []
    return Pairs(texts, targets, ids, languages)


def read_columns(path: Path) -> Columns:
    """Read the columns of a file by the first names of `_NAMES`; plain text has `text`.

    Raises UserError for a file that is not one of the formats.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"Cannot read {path}: it is not UTF-8 text ({error.reason}). Save it as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    # Not splitlines(), which also splits at characters within sentences (U+2028).
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    if lines[-1] == "":
        lines.pop()
    if path.suffix in (".jsonl", ".json"):
        columns = _json_columns(lines, path)
    elif path.suffix in (".csv", ".tsv"):
        columns = _table_columns(lines, path)
    else:
        columns = _plain_columns(lines)
    for name in ("hypothesis", "reference", "text"):
        # A trained model may begin all hypotheses alike, but references are made by people.
        _check_alike(columns.get(name, []), path, strict=name == "reference")
    return columns


def _plain_columns(lines: Sequence[str]) -> Columns:
    found = [_UNI_SIGN.fullmatch(line) for line in lines]
    if not lines or None in found:
        return {"text": list(lines)}
    columns: Columns = {"id": [], "text": []}
    for match in found:
        assert match is not None
        columns["id"].append(match["id"])
        columns["text"].append(match["text"])
    return columns


def _json_columns(lines: Sequence[str], path: Path) -> Columns:
    """Read JSON lines: an object on each line, all with the same keys."""
    columns: Columns = {}
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"Cannot read {path}, line {number}: it is not JSON ({error}). Write an "
                "object on each line."
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number} must be an object with a sentence, got "
                f"{line!r:.40}. Write an object on each line."
            )
        if number == 1:
            names = _find_names(record)
            columns = {name: [] for name in names}
        for name, key in names.items():
            value = record.get(key)
            if isinstance(value, int):  # an id
                value = str(value)
            if not isinstance(value, str):
                raise UserError(
                    f"{path}, line {number} must have a text {key!r}, got {value!r}. "
                    "Correct the file."
                )
            columns[name].append(value)
    return columns


def _table_columns(lines: Sequence[str], path: Path) -> Columns:
    """Read a table with a header, or with the two columns id and text."""
    header = lines[0] if lines else ""
    delimiter = next((mark for mark in "\t|;" if mark in header), ",")
    # Quotes are ordinary characters in the tables of PHOENIX14T.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True))
    except csv.Error as error:
        raise UserError(
            f"Cannot read {path} as a table: {error}. Write it as csv, or as JSON lines."
        ) from error
    rows = [row for row in rows if any(row)]
    width = len(rows[0]) if rows else 0
    names = _find_names({field.strip(): "" for field in rows[0]}) if rows else {}
    places: Mapping[str, int]
    if set(names) - {"id", "language"}:
        titles = [field.strip() for field in rows.pop(0)]
        places = {name: titles.index(title) for name, title in names.items()}
    elif width == 2:
        places = {"id": 0, "text": 1}
    else:
        raise UserError(
            f"{path} must have a header with columns such as id and text, got "
            f"{header!r:.80}. Name the columns."
        )
    columns: Columns = {name: [] for name in places}
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise UserError(
                f"Each row of {path} must have {width} fields, got {len(row)} in row "
                f"{number}. Correct the table."
            )
        for name, place in places.items():
            columns[name].append(row[place])
    return columns


def _find_names(record: Mapping[str, Any]) -> dict[str, str]:
    """Return {first name of `_NAMES`: key of the record}."""
    by_lower_case = {key.lower(): key for key in record}
    found: dict[str, str] = {}
    for name, alternatives in _NAMES.items():
        for alternative in alternatives:
            if alternative in by_lower_case:
                found[name] = by_lower_case[alternative]
                break
    return found


def _texts(columns: Columns, role: str, path: Path) -> list[str]:
    """Return the sentences of a file. role: hypothesis or reference."""
    for name in (role, "text"):
        if name in columns:
            return columns[name]
    names = ", ".join(columns) or "no known column"
    raise UserError(
        f"{path} must have a column {role} or text, got {names}. Name the column."
    )


def _by_id(
    texts: Sequence[str],
    ids: Sequence[str],
    wanted: Sequence[str],
    path: Path,
    reference_path: Path,
) -> list[str]:
    """Return the texts in the order of the ids `wanted`. Raises UserError if ids differ."""
    _check_unique(ids, path)
    _check_unique(wanted, reference_path)
    by_id = dict(zip(ids, texts, strict=True))
    _check_missing([one for one in wanted if one not in by_id], path, reference_path)
    known = set(wanted)
    _check_missing([one for one in ids if one not in known], reference_path, path)
    return [by_id[one] for one in wanted]


def _check_missing(missing: Sequence[str], path: Path, other: Path) -> None:
    if missing:
        raise UserError(
            f"{path} must have every id of {other}, got none for {missing[0]!r} "
            f"({len(missing)} missing in all). Score the same clips in both files."
        )


def _check_unique(ids: Sequence[str], path: Path) -> None:
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise UserError(
                f"Each id of {path} must come once, got {one!r} twice. Remove one of them."
            )
        seen.add(one)


def _check_alike(texts: Sequence[str], path: Path, strict: bool) -> None:
    """Raise UserError if all lines begin with the same label, which is not a sentence.

    strict: refuse any common beginning of many different lines, not only labels.
    """
    if len(set(texts)) < 2:
        return
    # The common beginning of all texts is that of the first and the last in order.
    first, last = min(texts), max(texts)
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    common = first[:length]
    label = _LABEL.match(common)
    begin = label.group() if label else ""
    if strict and len(texts) >= _MIN_ALIKE and common.strip():
        begin = common
    if begin:
        raise UserError(
            f"Each text of {path} must be a sentence, got {len(texts)} that begin with "
            f"{begin!r}. Remove it (sed 's/^{begin}//'), or give a table with the columns id "
            "and text."
        )
