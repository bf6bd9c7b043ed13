"""The records of a run, one JSON object per line of metrics.jsonl; no slow import.

Records of kind "train" are steps, those of kind "probe" gradient norms. Other kinds are
scored splits.
"""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """A training step. The numbers are of all ranks together; see docs/watching.md.

    All ranks meet several times in a step, so a step takes the same time on each.
    """

    epoch: int  # from 0
    step: int  # number of steps done in this epoch
    num_steps: int  # of an epoch
    loss: float
    lr: float
    grad_norm: float
    skipped_steps: int
    frames: int  # kept frames, or features
    tokens: int  # target tokens
    seconds: float
    waiting_s: float  # for data, of the rank that waited longest
    frames_per_s: float
    tokens_per_s: float
    mfu: float | None  # share of the peak FLOPS of all devices; None if unknown
    slowest_rank: int  # with the longest own time
    slowest_host: str
    slowest_s: float  # its own time: waiting for data, and forward passes
    mean_s: float  # mean own time of the ranks
    device_gb: float | None  # peak memory of the fullest device; None on a CPU
    host_gb: float  # peak memory of the largest process
    broken_clips: int  # since the start of this job
    left_s: float  # estimated time to the end of the run

    def values(self) -> dict[str, Any]:
        """Return the known values by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def parse_records(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the records of complete lines; a running job may not have completed the last."""
    records = []
    for line in lines:
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run folder; empty if it has no metrics.jsonl yet."""
    path = run / METRICS
    if not path.is_file():
        return []
    return parse_records(path.read_text(encoding="utf-8").splitlines(keepends=True))


def as_csv(records: Iterable[dict[str, Any]], kind: str) -> str:
    """Return the records of a kind as a CSV table, one line a record.

    The columns of steps are the same for all runs: the fields of `StepRecord`, in this
    order, empty where a record has no value.
    """
    rows = [record for record in records if record["kind"] == kind]
    names = {"global_step": None}
    if kind == "train":
        names |= dict.fromkeys(field.name for field in fields(StepRecord))
    # A dict keeps the order in which names are first seen.
    for row in rows:
        names |= dict.fromkeys(row)
    names.pop("kind", None)
    text = io.StringIO()
    table = csv.DictWriter(text, list(names), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
