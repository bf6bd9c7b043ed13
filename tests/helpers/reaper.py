"""Remove a cluster once the process that made it has ended, by kill -9 as well: `python
reaper.py ROOT`, with a pipe of that process as stdin."""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path


def processes_of(root: Path) -> list[int]:
    """The daemons and all that they have started: slurmstepd and the jobs are no children of
    ours, but all of them carry our SLURM_CONF."""
    mark = f"SLURM_CONF={root}/slurm.conf\0".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def remove(root: Path) -> None:
    """Kill every process of a cluster, and remove its folder."""
    for _ in range(3):  # a process may fork while we look
        for pid in processes_of(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()  # until the other end of the pipe is closed
    remove(Path(sys.argv[1]))
