"""Describe and count rows that cannot become clips, and limit how many are skipped."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flallm_ds.errors import UserError

# Sentences stored for each kind: index.json stays small with any number of faults.
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Fault:
    """Describe a row that cannot become a clip: the kind of fault, and one sentence."""

    kind: str
    sentence: str


def check_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> None:
    """Raise UserError if there are more than `max_skipped` faults."""
    if len(faults) > max_skipped:
        raise over_budget(faults, max_skipped, num_rows)


def over_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> UserError:
    """Return an error with the number of faults of each kind, and the first fault."""
    # Name only the first fault: the message must stay one line.
    counts = Counter(fault.kind for fault in faults)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    first = faults[0].sentence.rstrip(".")
    return UserError(
        f"Cannot use {len(faults):,} of {num_rows:,} rows, {kinds}: {first}. Fix these "
        f"rows, skip more than {max_skipped} with --max_skipped, or build other --splits."
    )


def count_faults(faults: Sequence[Fault]) -> dict[str, Any]:
    """Return the number and the first few sentences of each kind of fault."""
    counts: dict[str, Any] = {}
    for fault in faults:
        entry = counts.setdefault(fault.kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= _NUM_EXAMPLES:
            entry["examples"].append(fault.sentence)
    return counts
