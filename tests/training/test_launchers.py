"""Test which ancestors count as launchers, and whether their end is noticed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flallm_ds.training.launchers import Launcher, is_gone, launcher_name, launchers_of
from tests.helpers.paths import ROOT

LAUNCHERS = {
    "/v/bin/python /v/bin/deepspeed --num_gpus=2 launch/train.py": "deepspeed",
    "python3.11 -u -m deepspeed.launcher.launch --x=1": "deepspeed.launcher.launch",
    "/usr/bin/python -X dev -W ignore -m torch.distributed.run": "torch.distributed.run",
    "python -O /v/bin/torchrun launch/train.py": "torchrun",
    "/usr/bin/mpirun -n 2 python launch/train.py": "mpirun",
    "slurmstepd: [12.0]": "slurmstepd",
}
OTHERS = [
    "-bash",
    "bash -c deepspeed",
    "nohup deepspeed launch/train.py",
    "tmux new deepspeed",
    "timeout 60 deepspeed launch/train.py",
    "python sweep.py deepspeed",
    "python -m sweep deepspeed",
    "python -c deepspeed()",
    "python -X",
    "vi deepspeed",
    "",
]


@pytest.mark.parametrize("words", LAUNCHERS)
def test_a_launcher_is_known_by_its_program_or_module(words: str) -> None:
    assert launcher_name(words.split(" ")) == LAUNCHERS[words]


@pytest.mark.parametrize("words", OTHERS)
def test_other_ancestors_may_end_before_a_run(words: str) -> None:
    assert launcher_name(words.split(" ")) is None


def test_launchers_of_this_process_are_found_behind_other_ancestors(tmp_path) -> None:
    """torchrun, then a script, then the process."""
    show = (
        "import os; from flallm_ds.training.launchers import launchers_of;"
        "print([one.name for one in launchers_of(os.getpid())])"
    )
    script = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    for name in ("torchrun", "wrapper.py"):
        (tmp_path / name).write_text(script)
    command = [sys.executable, tmp_path / "torchrun", tmp_path / "wrapper.py", "-c", show]
    assert subprocess.check_output(command, text=True) == "['torchrun']\n"


# A node agent that waits until its parent has ended, and then starts a rank.
AGENT = """
import os, subprocess, sys, time
deadline = time.monotonic() + 60
while os.getppid() != 1 and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[1]]))
"""


def test_a_launcher_that_ended_while_the_rank_started_is_found(tmp_path) -> None:
    show = (
        "import os; from flallm_ds.training.launchers import launchers_of;"
        "print([(one.name, one.has_ended()) for one in launchers_of(os.getpid())])"
    )
    module = tmp_path / "deepspeed" / "launcher" / "launch.py"
    module.parent.mkdir(parents=True)
    module.write_text(AGENT)
    for package in (module.parent, module.parent.parent):
        (package / "__init__.py").touch()
    # The shell ends at once.
    command = f"cd {tmp_path}; {sys.executable} -m deepspeed.launcher.launch '{show}' &"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    said = subprocess.check_output(["sh", "-c", command], env=environment, text=True)
    assert said == "[('deepspeed.launcher.launch', False), ('deepspeed', True)]\n"


def test_the_end_of_a_process_is_seen_before_and_after_its_parent_asks_for_its_code():
    child = subprocess.Popen(["sleep", "300"])
    # Popen may return some milliseconds before the kernel shows the command line.
    while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
        time.sleep(0.001)
    start_ticks = int(Path(f"/proc/{child.pid}/stat").read_text().split()[21])
    launcher = Launcher("torchrun", child.pid, os.getpid(), start_ticks)
    assert not launcher.has_ended() and not is_gone(child.pid)
    assert Launcher("torchrun", child.pid, os.getpid(), start_ticks - 1).has_ended(), (
        "the id is used again"
    )
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert launcher.has_ended() and is_gone(child.pid)
    child.wait()
    assert launcher.has_ended() and is_gone(child.pid)
    assert launchers_of(child.pid) == []
