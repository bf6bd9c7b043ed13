"""The cluster of these tests leaves nothing on the machine."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.cluster import why_unavailable
from tests.helpers.paths import ROOT
from tests.helpers.reaper import processes_of

pytestmark = pytest.mark.slurm

# What a pytest does that is in a test when it is ended.
HOLDER = """
import sys, time
from pathlib import Path
from tests.helpers.cluster import Cluster

with Cluster() as cluster:
    job_id = cluster.submit("--wrap=sleep 600", cwd=Path(sys.argv[1]))
    cluster.wait_until(lambda: cluster.job(job_id).state == "RUNNING", job_id, "a start")
    print(cluster.root, flush=True)
    time.sleep(600)
"""


def test_a_terminated_pytest_leaves_no_daemon_job_or_folder(tmp_path: Path) -> None:
    if reason := why_unavailable():
        pytest.skip(reason)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        root = Path(holder.stdout.readline().strip())
        # munged, slurmctld, two slurmd, slurmstepd, the job's shell and its sleep.
        assert becomes_true(lambda: len(processes_of(root)) >= 7)
        holder.terminate()
    assert becomes_true(lambda: not processes_of(root) and not root.exists())


def becomes_true(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
