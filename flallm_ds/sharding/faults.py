"""Rows that cannot become clips: what is wrong with them, and how many of them may be
left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flallm_ds.errors import UserError

# Sentences kept of each kind: index.json stays small however many rows are faulty.
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Fault:
    """A row that cannot become a clip: the kind, to count by, and one sentence."""

    kind: str
    sentence: str


def check_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> None:
    """Raise UserError if more rows are faulty than may be skipped."""
    if len(faults) > max_skipped:
        raise over_budget(faults, max_skipped, num_rows)


def over_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> UserError:
    """Say in one sentence how many faults of each kind there are, and what the first one is."""
    counts = Counter(fault.kind for fault in faults)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    first = faults[0].sentence.rstrip(".")
    return UserError(
        f"every row must give a clip, but of {num_rows:,} rows {kinds}: {first}. Mend "
        f"them, let more than {max_skipped} be skipped with --max_skipped, or build other "
        "--splits."
    )


def count_faults(faults: Sequence[Fault]) -> dict[str, Any]:
    """Return the count and the first few sentences of each kind of fault."""
    counts: dict[str, Any] = {}
    for fault in faults:
        entry = counts.setdefault(fault.kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= _NUM_EXAMPLES:
            entry["examples"].append(fault.sentence)
    return counts
