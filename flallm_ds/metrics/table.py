"""Format scores as Markdown tables, which are also readable as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from flallm_ds.metrics.ceiling import is_low
from flallm_ds.metrics.columns import CEILING, INTERVAL_TITLE, shown_columns

# The least width of a column.
MIN_COLUMN = 7


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table. rows: maps the name of a system to its stored scores.

    Scores with intervals have a second line. A metric that not all scores have, such as an
    error rate, has a column if any row has it.
    The last column is the BLEU-4 of a perfect model, if it is low for any row.
    """
    columns = shown_columns(rows.values())
    if any(map(is_low, rows.values())):
        columns.append(CEILING)
    cells: list[list[str]] = [["", *(column.title for column in columns)]]
    for name, scores in rows.items():
        cells.append([name, *(column.text(scores) for column in columns)])
        if "intervals" in scores:
            bounds = [column.interval_text(scores) for column in columns]
            cells.append([INTERVAL_TITLE, *bounds])
    return markdown(cells)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. cells: the titles first; the first column is text."""
    first = max(len(row[0]) for row in cells)
    rest = max(MIN_COLUMN, *(len(cell) for row in cells for cell in row[1:]))
    lines = []
    for row in cells:
        numbers = " | ".join(f"{cell:>{rest}}" for cell in row[1:])
        lines.append(f"| {row[0]:{first}} | {numbers} |")
    # The colon aligns numbers to the right.
    rule = f"|{'-' * (first + 2)}|" + f"{'-' * (rest + 1)}:|" * (len(cells[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])
