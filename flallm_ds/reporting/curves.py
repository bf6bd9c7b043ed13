"""From the records of metrics.jsonl to the charts of a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flallm_ds.metrics.columns import COLUMNS, has_scores
from flallm_ds.reporting.runs import Run

Record = Mapping[str, Any]

# Points of a line: as many as a chart has pixels, so that long runs stay small.
MAX_POINTS = 300
# Fields of a training step that are no measurement, or that follow from other fields.
_NOT_DRAWN = {
    "kind", "global_step", "epoch", "step", "num_steps", "frames", "seconds", "left_s",
    "frames_per_s", "tokens_per_s", "slowest_rank",
}  # fmt: skip
# Counts of events that are rare: drawn if there was one.
_COUNTS = ("skipped_steps", "broken_clips")


@dataclass(frozen=True)
class Line:
    """A line of a chart: points (x, y), and the range of y that each point stands for.

    run: position of its run in the report. marked: whether each point is a measurement to
    be drawn as a dot.
    """

    run: int
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart over training steps. best: the point (x, y) of the best score of each run."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    is_log: bool = False
    best: Sequence[tuple[float, float]] = field(default=())


@dataclass(frozen=True)
class Quantity:
    """What one chart shows of a training step.

    value: of a step. weight: the points of a long run are means of steps with this weight.
    """

    title: str
    value: Callable[[Record], Any]
    unit: str = ""
    is_log: bool = False
    weight: Callable[[Record], float] = lambda record: 1.0


def _seconds(record: Record) -> float:
    return float(record.get("seconds") or 0.0)


def _per_second(name: str, factor: float = 1.0) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        if name not in record or not _seconds(record):
            return None
        return factor * float(record[name]) / _seconds(record)

    return value


def _field(name: str, factor: float = 1.0) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        found = _number(record.get(name))
        return None if found is None else factor * found

    return value


# Fields of training steps with a title, in the order of the page. Others follow, by name.
_QUANTITIES = {
    "loss": Quantity("Training loss", _field("loss")),
    "frames": Quantity(
        "Throughput", _per_second("frames"), "frames per second", weight=_seconds
    ),
    "waiting_s": Quantity(
        "Waiting for data",
        _per_second("waiting_s", 100.0),
        "% of the time",
        weight=_seconds,
    ),
    "tokens": Quantity(
        "Target tokens", _per_second("tokens"), "tokens per second", weight=_seconds
    ),
    "mfu": Quantity("Model FLOPS utilization", _field("mfu", 100.0), "% of the peak"),
    "device_gb": Quantity("Peak memory of a device", _field("device_gb"), "GB"),
    "host_gb": Quantity("Peak memory of a process", _field("host_gb"), "GB"),
    "slowest_s": Quantity("Own time of the slowest rank", _field("slowest_s"), "s"),
    "mean_s": Quantity("Own time of the ranks, mean", _field("mean_s"), "s"),
    "grad_norm": Quantity("Gradient norm", _field("grad_norm"), is_log=True),
    "lr": Quantity("Learning rate", _field("lr")),
}


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts for which at least one run has measurements."""
    charts = [_chart(runs, _QUANTITIES["loss"]), *_score_charts(runs)]
    for name, quantity in _QUANTITIES.items():
        if name != "loss":
            charts.append(_chart(runs, quantity))
    charts.append(_probe_chart(runs))
    for name in _other_fields(runs):
        charts.append(_chart(runs, Quantity(_title(name), _field(name))))
    return [chart for chart in charts if chart.lines]


# --- training steps


def _chart(runs: Sequence[Run], quantity: Quantity) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        steps = [record for record in run.records if record.get("kind") == "train"]
        line = _line(steps, quantity)
        if line is not None:
            lines.append(replace(line, run=number, label=run.name))
    return Chart(quantity.title, lines, quantity.unit, quantity.is_log)


def _line(records: Sequence[Record], quantity: Quantity) -> Line | None:
    """Return the line of a quantity, or None if no record has it."""
    points = []
    for record in records:
        value = _number(quantity.value(record))
        if value is not None and (value > 0 or not quantity.is_log):
            points.append((float(record["global_step"]), value, quantity.weight(record)))
    if not points:
        return None
    x_N, y_N, weight_N = np.array(points).T

    # Neighbouring steps become one point: their weighted mean, with their range.
    num_points = min(MAX_POINTS, len(points))
    x, y, low, high = [], [], [], []
    for part in np.array_split(np.arange(len(points)), num_points):
        weights = weight_N[part] if weight_N[part].any() else None
        # The mean of norms over orders of magnitude would be the largest one.
        mean = np.median(y_N[part]) if quantity.is_log else None
        x.append(float(x_N[part[-1]]))
        y.append(float(np.average(y_N[part], weights=weights) if mean is None else mean))
        low.append(float(y_N[part].min()))
        high.append(float(y_N[part].max()))
    if num_points == len(points):
        low, high = [], []
    return Line(0, "", x, y, low, high, marked=num_points == 1)


def _number(value: Any) -> float | None:
    """Return a finite number, or None. JSON files of Python may contain NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and np.isfinite(value) else None


def _other_fields(runs: Sequence[Run]) -> list[str]:
    """Return the other numbers of training steps, such as memory, in alphabetic order."""
    found: set[str] = set()
    for run in runs:
        for record in run.records:
            if record.get("kind") != "train" or has_scores(record):
                continue
            for name, value in record.items():
                if _number(value) is not None and (value or name not in _COUNTS):
                    found.add(name)
    return sorted(found - _NOT_DRAWN - set(_QUANTITIES))


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


# --- scores and gradient norms of layers


def _score_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for each metric that training logs, with the best epoch marked."""
    split = runs[0].config.eval.split
    charts = []
    for column in COLUMNS:
        if not column.logged:
            continue
        lines, best = [], []
        for number, run in enumerate(runs):
            scored = [r for r in run.records if _number(r.get(column.key)) is not None]
            if not scored:
                continue
            x = [float(record["global_step"]) for record in scored]
            y = [float(record[column.key]) for record in scored]
            lines.append(Line(number, run.name, x, y, marked=True))
            top = int(np.argmax(y))
            best.append((x[top], y[top]))
        charts.append(Chart(f"{column.title} on {split}", lines, best=best))
    return charts


def _probe_chart(runs: Sequence[Run]) -> Chart:
    """Return the chart of the gradient norms of the last layers (`train.probe_every`)."""
    lines = []
    for number, run in enumerate(runs):
        records = [record for record in run.records if record.get("kind") == "probe"]
        for name in ("visual", "language"):
            line = _line(records, Quantity("", _field(name), is_log=True))
            if line is not None:
                label = f"{run.name}: last {name} layer"
                lines.append(replace(line, run=number, label=label))
    return Chart("Gradient norms of the last layers", lines, is_log=True)
