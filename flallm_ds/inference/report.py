"""Results as text: the table of scores and the file of hypotheses."""

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
    """Write JSON lines: key, hypothesis, reference, corpus, language, and nbest if there
    is one."""
    lines = []
    for one in hypotheses:
        record = asdict(one)
        if not one.nbest:
            del record["nbest"]
        lines.append(json.dumps(record, ensure_ascii=False))
    replace_file(path, "\n".join(lines) + "\n")


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """Read what `write_hypotheses` wrote."""
    hypotheses = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        nbest = tuple(map(tuple, record.pop("nbest", ())))
        hypotheses.append(Hypothesis(**record, nbest=nbest))
    return hypotheses


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return scores as text that is also Markdown. rows: {name of the system: its stored scores}.

    The last column is BLEU-4 of a perfect model, where that of any row is low.
    """
    columns = list(COLUMNS)
    if any(map(is_low, rows.values())):
        columns.append(CEILING)
    width = max(map(len, rows))
    titles = " | ".join(f"{column.title:>7}" for column in columns)
    lines = [f"| {'':{width}} | {titles} |"]
    # A colon aligns the numbers to the right.
    lines.append(f"|{'-' * (width + 2)}|" + f"{'-' * 8}:|" * len(columns))
    for name, scores in rows.items():
        cells = " | ".join(f"{column.text(scores):>7}" for column in columns)
        lines.append(f"| {name:{width}} | {cells} |")
    return "\n".join(lines)
