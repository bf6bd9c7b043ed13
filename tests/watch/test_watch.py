"""`flallm watch` and `flallm metrics` on run folders with planted files. A folder of a real
run is in tests/training/test_meter.py."""

import csv
import json
import os
import pty
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest

from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.training.heartbeats import ENDED, FOLDER, Heartbeat
from flallm_ds.training.records import StepRecord, as_csv
from flallm_ds.watch.alarms import alarms
from flallm_ds.watch.state import GONE_S, RECENT, SILENT_S, RunReader
from flallm_ds.watch.table import phase
from tests.helpers.early import flallm
from tests.helpers.paths import ROOT

NOW = 1_800_000_000.0


def step(number: int, **other: object) -> str:
    """The line of a healthy step in metrics.jsonl."""
    values = {
        "epoch": 0, "step": number, "num_steps": 1000, "loss": 2.5, "lr": 1e-3,
        "grad_norm": 1.0, "skipped_steps": 0, "frames": 1000, "tokens": 200,
        "seconds": 2.0, "waiting_s": 0.1, "frames_per_s": 500.0, "tokens_per_s": 100.0,
        "mfu": 0.4, "slowest_rank": 1, "slowest_host": "n1", "slowest_s": 1.2,
        "mean_s": 1.0, "device_gb": 61.2, "host_gb": 38.1, "broken_clips": 0,
        "left_s": 3700.0,
    }  # fmt: skip
    assert set(values) == {field.name for field in fields(StepRecord)}
    record = {"kind": "train", "global_step": number, **values, **other}
    return json.dumps(record) + "\n"


def append(run: Path, text: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def beat(run: Path, rank: int, phase: str = "step", age: float = 1.0, **other) -> None:
    """Plant the heartbeat of a rank that is `age` seconds old."""
    made = Heartbeat(rank, f"n{rank}", 1, 7, phase, NOW - age, NOW - age, 1.0 + rank, 0.1)
    for name, value in other.items():
        setattr(made, name, value)
    made.write(run)


def checkpoint(run: Path, age: float, size: int = 1000) -> None:
    folder = run / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    (folder / "rank-00000.000.safetensors").write_bytes(bytes(size))
    (folder / "manifest.json").write_text("{}")
    os.utime(folder / "manifest.json", (NOW - age, NOW - age))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a healthy run on 2 ranks."""
    folder = tmp_path / "run"
    (folder / FOLDER).mkdir(parents=True)
    config = RunConfig(stage="visual", run=str(folder))
    (folder / "config.json").write_text(config.to_json())
    for rank in range(2):
        beat(folder, rank)
    append(folder, "".join(map(step, range(1, 8))))
    checkpoint(folder, age=60)
    return folder


def alarms_of(run: Path) -> list[str]:
    return alarms(RunReader(run).read(NOW))


def test_a_healthy_run_has_no_alarm(run: Path) -> None:
    state = RunReader(run).read(NOW)
    assert alarms(state) == []
    assert state.is_running and phase(state) == "step"


def test_a_silent_rank_is_named(run: Path) -> None:
    beat(run, 1, age=2 * SILENT_S)
    (said,) = alarms_of(run)
    assert said.startswith("rank silent: rank 1 on n1 has not been heard of since ")


def test_ranks_without_progress_are_named_with_their_phase(run: Path) -> None:
    for rank in range(2):
        beat(run, rank, since=NOW - 600)
    (said,) = alarms_of(run)
    assert said.startswith("no progress for 10:00: rank 0 on n0 is in step since ")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"broken_clips": 3}, "3 broken clips; log.txt names them"),
        ({"waiting_s": 1.5}, "25 % of the time is waiting for data"),
        ({"loss": float("nan")}, "the loss is nan"),
    ],
)
def test_a_step_that_needs_attention_is_an_alarm(run: Path, changed, said) -> None:
    append(run, step(8, **changed))
    if "waiting_s" in changed:  # the mean over 9 steps
        append(run, step(9, waiting_s=2.3))
    assert alarms_of(run) == [said]


def test_a_rising_loss_is_an_alarm(run: Path) -> None:
    for number in range(8, 2 * RECENT + 1):
        append(run, step(number, loss=2.0 if number <= RECENT else 3.0))
    (said,) = alarms_of(run)
    assert said.startswith("the loss is rising: 2.035, then 3.000, over 100 steps each")


def test_an_old_checkpoint_is_an_alarm_while_the_run_trains(run: Path) -> None:
    manifest = run / "checkpoints" / "step-00000007" / "manifest.json"
    os.utime(manifest, (NOW - 7200, NOW - 7200))
    assert alarms_of(run) == ["last checkpoint 2:00:00 ago; train.save_every_minutes is 30"]
    for rank in range(2):
        beat(run, rank, ENDED)
    assert alarms_of(run) == []


def test_a_disk_without_room_for_two_checkpoints_is_an_alarm(run: Path) -> None:
    file = run / "checkpoints" / "step-00000007" / "rank-00000.000.safetensors"
    with file.open("r+b") as sparse:
        sparse.truncate(2**42)
    (said,) = alarms_of(run)
    assert said.startswith("disk nearly full: ")


def test_a_run_has_ended_when_all_ranks_have_or_none_gives_a_sign(run: Path) -> None:
    reader = RunReader(run)
    assert not reader.read(NOW).has_ended
    beat(run, 0, ENDED)
    assert not reader.read(NOW).has_ended
    beat(run, 1, ENDED)
    (run / "log.txt").write_text("2026-01-01 00:00:00 stage visual is finished: r\n")
    state = reader.read(NOW)
    assert state.has_ended and phase(state) == "ended"
    assert state.last_line.endswith("stage visual is finished: r")
    for rank in range(2):
        beat(run, rank, age=2 * GONE_S)
    assert reader.read(NOW).has_ended


def test_heartbeats_of_an_earlier_start_do_not_count(run: Path) -> None:
    """The run is started again on one rank, and loads its models."""
    (run / "versions.json").write_text(json.dumps({"starts": [{"ranks": 1}]}))
    os.utime(run / "versions.json", (NOW - 0.5, NOW - 0.5))
    reader = RunReader(run)
    state = reader.read(NOW)
    assert state.beats == [] and phase(state) == "starting" and not state.has_ended
    (run / "log.txt").write_text("2026-01-01 00:00:00 error: Cannot read the LLM.\n")
    assert reader.read(NOW).has_ended
    beat(run, 0, age=0.1)
    beat(run, 1, age=0.1)
    assert [b.rank for b in reader.read(NOW).beats] == [0]


def test_only_new_lines_are_read_until_a_resume_replaces_the_file(run: Path) -> None:
    reader = RunReader(run)
    assert len(reader.read(NOW).steps) == 7
    line = step(8)
    append(run, line[:20])  # the run is writing
    assert len(reader.read(NOW).steps) == 7
    append(run, line[20:])
    append(run, json.dumps({"kind": "dev", "global_step": 8, "epoch": 1, "bleu4": 3.0}))
    append(run, "\n")
    state = reader.read(NOW)
    assert len(state.steps) == 8 and state.best == state.last_score
    (run / "new").write_text(step(1))
    (run / "new").replace(run / "metrics.jsonl")
    state = reader.read(NOW)
    assert len(state.steps) == 1 and state.best is None


def test_watch_once_prints_one_table_and_no_control_characters(run: Path) -> None:
    for rank in range(2):
        beat(run, rank, written=time.time(), since=time.time())
    beat(run, 1, written=time.time() - 2 * SILENT_S, since=time.time())
    done = flallm("watch", run, "--once", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/75  step 7/1000" in done.stdout
    assert "500 frames/s  100 tokens/s  MFU 40.0 %" in done.stdout
    assert "device 61.2 GB, host 38.1 GB" in done.stdout
    assert "left        1:01:40" in done.stdout
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    # The slowest first.
    assert rows.index(["1", "n1", "step"]) < rows.index(["0", "n0", "step"])
    assert "ALARM  rank silent: rank 1 on n1" in done.stdout
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_many_ranks_are_shown_by_machine(run: Path) -> None:
    for rank in range(20):
        beat(run, rank, host=f"n{rank // 10}", written=time.time(), since=time.time())
    beat(run, 12, "data loading", host="n1", written=time.time(), since=time.time())
    done = flallm("watch", run, "--once", COLUMNS="120")
    assert "10, slowest 19" in done.stdout and "step (9), data loading (1)" in done.stdout
    assert ", 20 ranks on 2 machines" in done.stdout


def test_a_live_table_ends_by_itself_when_the_run_has_ended(run: Path) -> None:
    """On a terminal, as a pseudo-terminal is one."""
    for rank in range(2):
        beat(run, rank, ENDED)
    (run / "log.txt").write_text("2026-01-01 00:00:00 stage visual is finished: r\n")
    own, other = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flallm_ds", "watch", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=other,
        env=environment,
    )
    os.close(other)
    shown = b""
    with suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(own, 4096):
            shown += part
    os.close(own)
    assert process.wait(timeout=60) == 0
    assert b"stage visual is finished" in shown and b"own s/step" in shown


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot watch .*: it has no config\.json"):
        RunReader(tmp_path)


# --- metrics


def test_steps_become_a_table_with_the_same_columns_for_every_run(run: Path) -> None:
    append(run, step(8)[:20])  # the run is writing
    out = run / "steps.csv"
    done = flallm("metrics", run, f"--out={out}")
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["global_step", *(field.name for field in fields(StepRecord))]
    assert list(rows[0]) == names and len(rows) == 7
    assert rows[6]["step"] == "7" and rows[6]["mfu"] == "0.4"
    old = as_csv([{"kind": "train", "global_step": 1, "loss": 2.0}], "train")
    assert old.splitlines()[0] == ",".join(names)


def test_scores_become_a_table_and_an_unknown_kind_is_refused(run: Path) -> None:
    append(run, '{"kind": "dev", "global_step": 7, "epoch": 1, "bleu4": 3.0}\n')
    out = run / "dev.csv"
    assert flallm("metrics", run, f"--out={out}", "--kind=dev").returncode == 0
    assert out.read_text() == "global_step,epoch,bleu4\n7,1,3.0\n"
    done = flallm("metrics", run, f"--out={out}", "--kind=test")
    assert done.returncode == 2
    assert "(train, dev), got test." in done.stderr
