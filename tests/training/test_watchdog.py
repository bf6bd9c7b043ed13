"""A rank that stops is named, and its job ends as after a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flallm_ds.dist import World
from flallm_ds.training.watchdog import STALE_S, Heartbeat, Watchdog
from tests.helpers.launching import command, environment, flags, tiny_options
from tests.helpers.paths import ROOT


def watchdog(folder: Path, rank: int, size: int = 3) -> Watchdog:
    return Watchdog(folder, World(rank, size, rank, size), warn_s=60, limit_s=0)


def beats_of(phases: list[tuple[int, str, float]]) -> list[Heartbeat]:
    """Heartbeats at time 1000, each by step, phase and age of its file."""
    return [
        Heartbeat(rank, f"n{rank}", 1, step, phase, since=900, written=1000 - age)
        for rank, (step, phase, age) in enumerate(phases)
    ]


def test_a_rank_without_a_fresh_heartbeat_is_named(tmp_path: Path) -> None:
    beats = beats_of([(7, "step", 1), (7, "step", 2 * STALE_S), (7, "step", 1)])
    said = watchdog(tmp_path, 0)._sentence(beats, 1000, 95)
    assert said.startswith("warning: no progress for 95 s: rank 1 on n1 has not been heard")
    assert "rank 0" not in said and "rank 2" not in said


def test_the_rank_in_another_phase_is_named(tmp_path: Path) -> None:
    beats = beats_of([(7, "step", 1), (7, "step", 1), (7, "data loading", 1)])
    said = watchdog(tmp_path, 0)._sentence(beats, 1000, 95)
    assert ": rank 2 on n2 is in data loading since " in said and "rank 0" not in said


def test_a_stopped_rank_is_named_and_the_job_ends(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    """SIGSTOP of one of three ranks, as of a machine that hangs."""
    run = tmp_path / "visual"
    options = tiny_options(
        tiny_corpus,
        "visual",
        run,
        **{
            "train.epochs": 1000,
            "eval.every_epochs": 1000,
            "data.micro_batches": 3,
            "train.stall_warn_s": 15,
            "train.stall_limit_s": 20,
        },
    )
    process = subprocess.Popen(
        command(ROOT / "launch" / "train.py", *flags("visual", options), ranks=3),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    stopped = 0
    try:
        deadline = time.monotonic() + 300
        while not stopped and time.monotonic() < deadline:
            time.sleep(0.5)
            stopped = pid_of_rank(run, 1)
        assert stopped, "training must start"
        os.kill(stopped, signal.SIGSTOP)
        output, _ = process.communicate(timeout=300)
    finally:
        if stopped:
            with suppress(ProcessLookupError):  # the launcher has killed it
                os.kill(stopped, signal.SIGKILL)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "warning: no progress for " in output, output[-4000:]
    assert ": rank 1 on " in output and " has not been heard of since " in output
    assert "The job ends; run the same command again to resume." in output
    stacks = (run / "heartbeats" / "rank-00000.stacks.txt").read_text(encoding="utf-8")
    assert "trainer.py" in stacks
    assert process.returncode != 0


ORPHAN = """
import sys, time
from pathlib import Path
from flallm_ds.dist import World
from flallm_ds.training.watchdog import Watchdog

is_orphan = sys.argv[2] == "orphan"
with Watchdog(Path(sys.argv[1]), World(0, 1, 0, 1), 0.2, 0, lambda: is_orphan) as dog:
    dog.beat("step", 3)
    time.sleep(300 if is_orphan else 2)
"""


@pytest.mark.parametrize(("kind", "code"), [("orphan", 124), ("child", 0)])
def test_a_rank_that_waits_without_a_launcher_ends(
    tmp_path: Path, kind: str, code: int
) -> None:
    """It waits for another rank that was killed with the launcher, say."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, tmp_path, kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    said = "the limit of train.stall_warn_s without a launcher. The job ends"
    assert (said in done.stdout) == (kind == "orphan")


def pid_of_rank(run: Path, rank: int) -> int:
    """The process of a rank that has made a step; 0 before."""
    path = run / "heartbeats" / f"rank-{rank:05d}.json"
    if not path.is_file():
        return 0
    beat = json.loads(path.read_text(encoding="utf-8"))
    return int(beat["pid"]) if beat["step"] >= 2 else 0


@pytest.mark.parametrize("limit", [0, 30])
def test_a_run_that_moves_is_left_alone(tmp_path: Path, limit: float, capsys) -> None:
    with Watchdog(tmp_path, World(0, 1, 0, 1), warn_s=0.2, limit_s=limit) as dog:
        for step in range(10):
            dog.beat("step", step)
            time.sleep(0.05)
    assert capsys.readouterr().out == ""
    beat = json.loads((tmp_path / "heartbeats" / "rank-00000.json").read_text())
    assert (beat["rank"], beat["step"], beat["phase"]) == (0, 9, "ended")
