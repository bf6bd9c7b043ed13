"""The line that rank 0 prints every few seconds."""

from dataclasses import fields

import pytest

from flallm_ds.training.progress import Progress
from flallm_ds.training.records import StepRecord


def record(**values: object) -> StepRecord:
    """A step; fields that are not given are 0."""
    known: dict = dict.fromkeys((field.name for field in fields(StepRecord)), 0)
    return StepRecord(
        **known | {"num_steps": 1000, "mfu": None, "device_gb": None} | values
    )


def lines_of(capsys, records: list[StepRecord], own_s: list[float], hosts: list[str]):
    """Print the records; a line is due after the last one."""
    progress = Progress(every_s=0.0, enabled=True, stage="llm")
    progress.start(epochs=80)
    progress.every_s = 1e9
    for one in records[:-1]:
        progress.step(one, own_s, hosts)
    progress.every_s = 0.0
    progress.step(records[-1], own_s, hosts)
    return capsys.readouterr().out.splitlines()


def test_a_line_is_about_all_steps_since_the_last_one(capsys) -> None:
    first = record(loss=3.0, frames=1000, tokens=100, seconds=1.0, waiting_s=0.1, mfu=0.5)
    second = record(
        epoch=2, step=120, loss=2.0, frames=4000, tokens=700, seconds=3.0, waiting_s=0.3,
        mfu=0.3, device_gb=61.24, host_gb=8.06, left_s=45296,
    )  # fmt: skip
    (line,) = lines_of(capsys, [first, second], [1.0, 2.0], ["n1.cluster", "n2.cluster"])
    assert line == (
        "llm  epoch 3/80  step 120/1000  loss 2.500  1,250 frames/s  200 tokens/s  "
        "MFU 35 %  waiting 10.0 %  memory 61+8.1 GB  slowest 1 (n2) +33 %  left 12:34:56"
    )


def test_a_cpu_has_no_mfu_and_one_rank_is_not_the_slowest(capsys) -> None:
    (line,) = lines_of(capsys, [record(step=1, seconds=2.0, host_gb=1.0)], [1.0], ["n1"])
    assert "MFU" not in line and "slowest" not in line
    assert "waiting 0.0 %  memory 1.0 GB  left 0:00" in line


def test_a_line_of_a_large_run_stays_below_160_columns(capsys) -> None:
    large = record(
        epoch=79, step=9999, num_steps=9999, loss=2.345, frames=123456, tokens=23456,
        seconds=1.0, waiting_s=1.0, mfu=0.41, device_gb=139.0, host_gb=512.0, left_s=359999,
    )  # fmt: skip
    own_s = [1.0] * 511 + [1.2]
    (line,) = lines_of(capsys, [large], own_s, ["n0042.cluster"] * 512)
    assert "slowest 511 (n0042) +20 %" in line
    assert len(line) <= 161, len(line)


def test_the_time_left_follows_from_the_steps_of_this_job() -> None:
    progress = Progress(every_s=1e9, enabled=True, stage="llm")
    progress.start(epochs=2)
    # Resumed in the middle of the first epoch.
    assert progress.advance(0, 6, 10, 2.0) == pytest.approx(2.0 * 14)
    assert progress.advance(0, 7, 10, 4.0) == pytest.approx(3.0 * 13)
