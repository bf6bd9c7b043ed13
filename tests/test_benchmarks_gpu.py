"""The benchmark of a GPU: its task can be built and loads frames on any machine."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.launching import environment
from tests.helpers.paths import ROOT


def test_the_measured_task_is_built_and_gives_steps(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from benchmarks import gpu
        from flallm_ds import dist
        task = gpu.stage_1(Path({str(tmp_path)!r}), 8, 12, None)
        decoder, threads, side = next(gpu.sides(task, (2,)))
        steps = list(gpu.steps_of(side, 3))
        frames = sum(len(b.frames_NHWC) for batches in steps for b in batches)
        print("found", decoder, threads, len(steps), frames)
        dist.stop()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = ended.stdout.split("found ")[1].split()
    assert found[:2] == ["cpu", "2"]
    # an epoch of 8 clips is one step, with 1 in 4 of 12 frames
    assert found[2:] == ["3", str(3 * 8 * 3)]


@pytest.mark.gpu
def test_the_page_has_a_row_for_each_decoder() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--clips=8", "--frames=12"]
    small = ["--steps=2", "--rounds=1", "--threads=2"]
    ended = subprocess.run(
        [*command, *small],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    for row in ("| cpu | 2 |", "| nvjpeg | 2 |"):
        assert ended.stdout.count(row) == 2
    assert "| fused, bfloat16 |" in ended.stdout
