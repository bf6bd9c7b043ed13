"""Define the metrics: key, title, order and format of each.

`score` computes the values. Everything that stores or shows them reads this table: the
results of an evaluation, the printed table, the model card, metrics.jsonl and TensorBoard.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One metric, in percent."""

    key: str
    """Name of the value in `Scores.values` and in files."""
    title: str
    """Column title in the printed table and in the model card."""
    logged: bool = False
    """Whether training writes the metric to metrics.jsonl and TensorBoard."""
    is_error: bool = False
    """Whether lower is better."""
    always: bool = True
    """Whether all scores have it. Error rates are not computed in training, and BLEURT
    needs a checkpoint."""

    def text(self, scores: Mapping[str, Any]) -> str:
        """Format this metric of stored scores; empty if they do not contain it."""
        return f"{scores[self.key]:.2f}" if self.key in scores else ""

    def interval_text(self, scores: Mapping[str, Any]) -> str:
        """Format the 95 % interval of this metric of stored scores; empty without one."""
        bounds = scores.get("intervals", {}).get(self.key)
        return "" if bounds is None else f"{bounds[0]:.1f}-{bounds[1]:.1f}"


# In the order in which scores are stored and shown.
COLUMNS = (
    Column("bleu1", "BLEU-1"),
    Column("bleu2", "BLEU-2"),
    Column("bleu3", "BLEU-3"),
    Column("bleu4", "BLEU-4", logged=True),
    Column("rouge_l", "ROUGE-L", logged=True),
    Column("chrf", "chrF", logged=True),
    Column("bleurt", "BLEURT", always=False),
    Column("ter", "TER", is_error=True, always=False),
    Column("wer", "WER", is_error=True, always=False),
    Column("cer", "CER", is_error=True, always=False),
)

# Title of intervals in tables.
INTERVAL_TITLE = "95 % interval"

# BLEU-4 of a perfect model. It depends on the tokenizer of the model, so it is computed by
# `ceiling` instead of `score`.
CEILING = Column("ceiling_bleu4", "ceiling")

# Maps the key of each signature to its title in the model card, in the order of the card.
SIGNATURES = {
    "bleu_signature": "BLEU",
    "rouge_signature": "ROUGE-L",
    "chrf_signature": "chrF",
    "bleurt_signature": "BLEURT",
    "ter_signature": "TER",
    "wer_signature": "WER",
    "cer_signature": "CER",
}


def shown_columns(rows: Iterable[Mapping[str, Any]]) -> list[Column]:
    """Return the columns of a table: those of all scores, and others that any row has."""
    found = list(rows)
    shown = []
    for column in COLUMNS:
        if column.always or any(column.key in scores for scores in found):
            shown.append(column)
    return shown


def has_scores(record: Any) -> bool:
    """Return whether a value from a JSON file is a record with at least one score."""
    return isinstance(record, dict) and any(column.key in record for column in COLUMNS)
