"""The result of a check, and the table of many."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flallm_ds.command_help import table

State = Literal["ok", "warning", "failure"]
OK: State = "ok"
WARNING: State = "warning"
FAILURE: State = "failure"
# Widths of the first two columns: of the longest check, and of the longest state.
_WIDTHS = (24, 7)


@dataclass(frozen=True)
class Result:
    """What a check found. found: without a full stop. remedy: what to do, if not ok."""

    check: str
    state: State
    found: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What was found and what to do, each with its full stop."""
        return f"{self.found}. {self.remedy}".rstrip()


def table_of(results: Iterable[Result]) -> str:
    """Return the lines of a table: check, state, what was found and what to do."""
    rows = []
    for result in results:
        text = result.found if result.state == OK else result.sentence
        rows.append((result.check, result.state, text))
    return table(rows, _WIDTHS)
