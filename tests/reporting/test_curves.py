"""Test the charts of a report: what is drawn of metrics.jsonl, and how."""

import math
import re
from pathlib import Path

import pytest

from flallm_ds.config import RunConfig
from flallm_ds.reporting.curves import MAX_POINTS, Chart, Line, charts_of
from flallm_ds.reporting.runs import Run
from flallm_ds.reporting.svg import HEIGHT, WIDTH, axes_of, draw


def run_of(records: list[dict[str, object]], name: str = "run") -> Run:
    config = RunConfig(stage="visual", run=name)
    return Run(Path(name), name, config, records, [], [], {})


def steps(num: int, **values: object) -> list[dict[str, object]]:
    record = {"kind": "train", "epoch": 0, "seconds": 1.0, "frames": 10, **values}
    return [{**record, "global_step": step} for step in range(1, num + 1)]


def titles(run: Run) -> list[str]:
    return [chart.title for chart in charts_of([run])]


def test_a_chart_is_drawn_only_for_what_was_recorded() -> None:
    assert titles(run_of(steps(3, loss=2.0))) == ["Training loss", "Throughput"]
    assert titles(run_of([])) == []
    more = steps(3, loss=2.0, gpu_memory_gb=3.5, note="text", broken_clips=0)
    assert titles(run_of(more)) == ["Training loss", "Throughput", "Gpu memory gb"]
    measured = steps(3, loss=2.0, mfu=0.25, device_gb=40.5, tokens=5, slowest_rank=1)
    assert titles(run_of(measured))[2:] == [
        "Target tokens",
        "Model FLOPS utilization",
        "Peak memory of a device",
    ]
    assert charts_of([run_of(measured)])[3].lines[0].y == [25.0] * 3
    broken = steps(3, loss=2.0, broken_clips=1)
    assert "Broken clips" in titles(run_of(broken))


def test_a_long_run_becomes_few_points_with_their_range() -> None:
    records = steps(100_000, loss=1.0)
    for record in records[1::2]:
        record["loss"] = 3.0
    (line,) = charts_of([run_of(records)])[0].lines
    assert len(line.x) == MAX_POINTS and line.x[-1] == 100_000
    assert all(abs(y - 2.0) < 0.01 for y in line.y)
    assert set(line.low) == {1.0} and set(line.high) == {3.0}
    assert len(draw(charts_of([run_of(records)])[0])) < 30_000


def test_the_throughput_of_several_steps_is_their_frames_by_their_time() -> None:
    """The mean of the rates of the steps would be 55 frames per second."""
    records = steps(2 * MAX_POINTS, loss=1.0)
    for record in records[1::2]:
        record |= {"seconds": 0.1}
    throughput = charts_of([run_of(records)])[1]
    assert throughput.title == "Throughput"
    assert throughput.lines[0].y[0] == pytest.approx(20 / 1.1)


def test_values_that_are_not_finite_are_left_out() -> None:
    records = steps(4, loss=1.0, grad_norm=0.0)
    records[1]["loss"] = math.nan
    records[2]["loss"] = math.inf
    chart = charts_of([run_of(records)])[0]
    assert chart.lines[0].x == [1.0, 4.0]
    # A norm of 0 has no place on a logarithmic axis.
    assert "Gradient norm" not in titles(run_of(records))


def test_the_best_epoch_of_each_run_is_marked() -> None:
    runs = []
    for name, bleus in (("a", [1.0, 5.0, 4.0]), ("b", [2.0, 3.0])):
        records: list[dict[str, object]] = []
        for epoch, bleu4 in enumerate(bleus, 1):
            records.append(
                {"kind": "dev", "global_step": 10 * epoch, "epoch": epoch, "bleu4": bleu4}
            )
        runs.append(run_of(records, name))
    (chart,) = charts_of(runs)
    assert chart.title == "BLEU-4 on dev"
    assert chart.best == [(20.0, 5.0), (20.0, 3.0)]
    svg = draw(chart)
    assert svg.count('<circle class="best') == 2 and "best 5<" in svg and "best 3<" in svg


@pytest.mark.parametrize(
    ("ys", "is_log", "low", "high"),
    [
        ([0.5, 6.1], False, 0.0, 7.5),
        ([20.0, 23.5], False, 20.0, 24.0),
        ([3.0, 3.0], False, 0.0, 3.0),
        ([-2.0, -1.0], False, -2.0, -1.0),
        ([0.02, 30.0], True, 0.01, 100.0),
        ([1.0, 1.0], True, 1.0, 10.0),
    ],
)
def test_an_axis_fits_its_values(
    ys: list[float], is_log: bool, low: float, high: float
) -> None:
    chart = Chart("t", [Line(0, "run", [1.0, 2.0], ys)], is_log=is_log)
    _, axis = axes_of(chart)
    assert (axis.low, axis.high) == (pytest.approx(low), pytest.approx(high))
    assert len(axis.ticks()) >= 2


def test_every_point_is_inside_the_chart() -> None:
    line = Line(0, "run", [0.0, 50.0, 100.0], [1e-3, 2.0, 7.7], marked=True)
    svg = draw(Chart("t", [line]))
    (points,) = re.findall(r'polyline class="line c0" points="([^"]*)"', svg)
    for point in points.split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    assert svg.count("<circle") == 3


def test_the_names_of_runs_are_escaped() -> None:
    svg = draw(Chart('"<b>', [Line(0, "<i>", [1.0], [1.0])]))
    assert "<b>" not in svg and "<i>" not in svg and '""' not in svg
    assert "&lt;i&gt;: from 1 to 1" in svg
