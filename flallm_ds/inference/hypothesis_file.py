"""Write hypotheses to a file and read them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flallm_ds.batch import Hypothesis
from flallm_ds.files import replace_file


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
    # Not splitlines(), which also splits at characters within sentences (U+2028).
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        record = json.loads(line)
        nbest = tuple(map(tuple, record.pop("nbest", ())))
        hypotheses.append(Hypothesis(**record, nbest=nbest))
    return hypotheses
