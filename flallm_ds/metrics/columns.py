"""The table of metrics: one row for each, which everything that stores or shows scores reads.

`score` computes the values. The results of an evaluation, the table on the screen, the
model card, metrics.jsonl and TensorBoard take their keys, order, titles and format from
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One metric, in percent."""

    key: str
    """Of its value in `Scores.values` and in every file."""
    title: str
    """Above its values on the screen and in the model card."""
    logged: bool = False
    """Whether each scoring of training writes it to metrics.jsonl and TensorBoard."""

    def text(self, scores: Mapping[str, Any]) -> str:
        """Format this metric of stored scores; empty where they were made without it."""
        return f"{scores[self.key]:.2f}" if self.key in scores else ""


# In the order in which values are stored and shown.
COLUMNS = (
    Column("bleu1", "BLEU-1"),
    Column("bleu2", "BLEU-2"),
    Column("bleu3", "BLEU-3"),
    Column("bleu4", "BLEU-4", logged=True),
    Column("rouge_l", "ROUGE-L", logged=True),
    Column("chrf", "chrF", logged=True),
)

# BLEU-4 of a perfect model. It depends on the tokenizer, so `ceiling` computes it and not
# `score`.
CEILING = Column("ceiling_bleu4", "ceiling")

# {key of a signature: title of its line in the model card}, in the order of these lines.
SIGNATURES = {
    "bleu_signature": "BLEU",
    "rouge_signature": "ROUGE-L",
    "chrf_signature": "chrF",
}


def has_scores(record: Any) -> bool:
    """Whether a value that was read from a JSON file is a record with scores."""
    return isinstance(record, dict) and any(column.key in record for column in COLUMNS)
