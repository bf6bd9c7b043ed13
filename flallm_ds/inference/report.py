"""Write hypotheses to a file, read them, and format scores as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flallm_ds.batch import Hypothesis
from flallm_ds.files import replace_file
from flallm_ds.metrics.ceiling import is_low
from flallm_ds.metrics.columns import CEILING, COLUMNS


def write_hypotheses(path: Path, hypotheses: Sequence[Hypothesis]) -> None:
    """Write JSON lines with the fields of `Hypothesis`; `nbest` only if it is not empty."""
    lines = []
    for clip in hypotheses:
        record = asdict(clip)
        if not clip.nbest:
            del record["nbest"]
        lines.append(json.dumps(record, ensure_ascii=False))
    replace_file(path, "\n".join(lines) + "\n")


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """Read a file of `write_hypotheses`."""
    hypotheses = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        nbest = tuple(map(tuple, record.pop("nbest", ())))
        hypotheses.append(Hypothesis(**record, nbest=nbest))
    return hypotheses


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table. rows: maps the name of a system to its stored scores.

    The last column is the BLEU-4 of a perfect model, if it is low for any row.
    """
    columns = list(COLUMNS)
    if any(map(is_low, rows.values())):
        columns.append(CEILING)
    width = max(map(len, rows))
    titles = " | ".join(f"{column.title:>7}" for column in columns)
    lines = [f"| {'':{width}} | {titles} |"]
    # The colon aligns numbers to the right.
    lines.append(f"|{'-' * (width + 2)}|" + f"{'-' * 8}:|" * len(columns))
    for name, scores in rows.items():
        cells = " | ".join(f"{column.text(scores):>7}" for column in columns)
        lines.append(f"| {name:{width}} | {cells} |")
    return "\n".join(lines)
