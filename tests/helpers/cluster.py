"""A real SLURM of two nodes on this one machine: own daemons, ports, keys and state, gone
when closed."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from flallm_ds.dist import free_port
from tests.helpers.paths import ROOT

# Names that are addresses: MASTER_ADDR is a node's name, and no other resolves without
# touching /etc/hosts.
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "sinfo",
)
FINAL_STATES = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
}

# cred_expire is also how long a requeued job waits before it may start again: at least 5
# s, by default 120. config_overrides lets a node claim CPUs and memory that the machine
# does not have.
SLURM_CONF = """\
ClusterName=flallm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_unavailable() -> str | None:
    """The reason why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing): run .ci/install_slurm --yes"
    if os.geteuid() != 0:
        return "slurmd must run as root"
    return None


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says about a job, and what the job has printed."""

    job_id: int
    state: str
    exit_code: int
    num_restarts: int
    output: str


class Cluster:
    """Two nodes of 16 CPUs and 2 pretended GPUs each; `with Cluster() as cluster` starts
    and removes them."""

    def __init__(self) -> None:
        # Not pytest's tmp_path: munged wants a folder that others may enter, and a socket
        # a short path.
        self.root = Path(tempfile.mkdtemp(prefix="flallm-slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        # In a session of its own: a signal to pytest's group must not end it.
        self._reaper = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/reaper.py"), str(self.root)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        ours = ("SLURM_", "SBATCH_")  # set inside a job; they would steer sbatch
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(ours)
        }
        sbin = f"{inherited.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        self._env = inherited | {"PATH": sbin, "SLURM_CONF": str(self.root / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self,
        script: str,
        *arguments: str,
        options: tuple[str, ...] = (),
        cwd: Path,
        **env: str,
    ) -> int:
        """`sbatch [options] script [arguments]` in the folder cwd; returns the job's number."""
        job_id = self._run(
            "sbatch", "--parsable", *options, script, *arguments, cwd=cwd, extra_env=env
        )
        return int(job_id.split(";")[0])

    def run(self, *command: str, cwd: Path, **env: str) -> str:
        """What a command prints that calls sbatch itself. AssertionError if it fails."""
        return self._run(*command, cwd=cwd, extra_env=env)

    def job(self, job_id: int) -> Job:
        shown = self._run("scontrol", "show", "job", str(job_id))
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        # A path may contain spaces.
        (path,) = re.findall(r"^ *StdOut=(.*)$", shown, re.MULTILINE)
        output = Path(path)
        return Job(
            job_id=job_id,
            state=fields["JobState"],
            exit_code=int(fields["ExitCode"].split(":")[0]),
            num_restarts=int(fields["Restarts"]),
            output=output.read_text(errors="replace") if output.is_file() else "",
        )

    def wait(self, job_id: int, timeout_s: float = 60) -> Job:
        """The job once it has ended for good; AssertionError with all that is known if it
        has not in time."""
        self.wait_until(
            lambda: self.job(job_id).state in FINAL_STATES,
            job_id,
            "the job's end",
            timeout_s,
        )
        return self.job(job_id)

    def wait_until(
        self, condition: Callable[[], bool], job_id: int, what: str, timeout_s: float = 30
    ) -> None:
        """Poll until the condition holds; AssertionError with all that is known if it
        does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"no sign of {what} after {timeout_s} s\n{self.describe(job_id)}"
                )
            time.sleep(0.2)

    def requeue(self, job_id: int) -> None:
        """What an operator, or PreemptMode=REQUEUE, does to a job: TERM, KillWait, KILL,
        wait again."""
        self._run("scontrol", "requeue", str(job_id))

    def release(self, job_id: int) -> None:
        """Let a job that was submitted with --hold start."""
        self._run("scontrol", "release", str(job_id))

    def update(self, job_id: int, **values: str) -> None:
        """Change properties of a waiting job, such as NumNodes."""
        words = [f"{name}={value}" for name, value in values.items()]
        self._run("scontrol", "update", f"JobId={job_id}", *words)

    def cancel(self, job_id: int) -> None:
        """Plain scancel: TERM, then KILL after KillWait."""
        self._run("scancel", str(job_id))

    def signal(self, job_id: int, name: str) -> None:
        """What `#SBATCH --signal` without "B:" does near the time limit: signal the
        tasks, not the script."""
        self._run("scancel", f"--signal={name}", str(job_id))

    def describe(self, job_id: int) -> str:
        """Everything that helps to see why a job is not where a test expects it."""
        job = self.job(job_id)
        parts = [
            self._run("scontrol", "show", "job", str(job_id)),
            self._run("sinfo", "--long", "--Node"),
        ]
        parts += [f"--- output of job {job_id}\n{job.output[-6000:]}"]
        parts += [
            f"--- {log.name}\n{_tail(log)}" for log in sorted(self.root.glob("*.log"))
        ]
        return "\n".join(parts)

    def close(self) -> None:
        """Cancel all jobs, end the daemons and every process they have left, remove the
        folder."""
        for daemon in reversed(self._daemons):  # slurmd, slurmctld, munged
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()

    def _start(self) -> None:
        self.root.chmod(0o755)
        (self.root / "state").mkdir()
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._write_config()
        self._spawn(
            "munged",
            "--foreground",
            f"--socket={self.root / 'munge.socket'}",
            f"--key-file={key}",
            f"--pid-file={self.root / 'munged.pid'}",
            f"--seed-file={self.root / 'munged.seed'}",
        )
        self._wait_for_daemons((self.root / "munge.socket").exists, "munged's socket")
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        self._wait_for_daemons(self._are_nodes_idle, "two idle nodes")

    def _write_config(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 "
            "Gres=gpu:2"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        config = SLURM_CONF.format(
            host=host, root=self.root, controller_port=controller_port, nodes=nodes
        )
        (self.root / "slurm.conf").write_text(config)
        for number in range(2):
            (self.root / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-1]\n")

    def _spawn(self, *command: str) -> None:
        log = self.root / f"{len(self._daemons)}-{command[0]}.log"
        with log.open("wb") as out:
            daemon = subprocess.Popen(
                command,
                env=self._env,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self._daemons.append(daemon)

    def _are_nodes_idle(self) -> bool:
        command = ["sinfo", "--noheader", "--Node", "--format=%t"]
        sinfo = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=30
        )
        return sinfo.stdout.split() == ["idle"] * len(NODES)

    def _wait_for_daemons(
        self, condition: Callable[[], bool], what: str, timeout_s: float = 30
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {log.name}\n{_tail(log)}"
                    for log in sorted(self.root.glob("*.log"))
                )
                raise RuntimeError(
                    f"no sign of {what}; ended by themselves: {dead}\n{logs}"
                )
            time.sleep(0.1)

    def _run(
        self,
        *command: str,
        cwd: Path | None = None,
        extra_env: dict[str, str] | None = None,
    ) -> str:
        env = self._env | (extra_env or {})
        done = subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            printed = done.stdout + done.stderr
            raise AssertionError(
                f"{' '.join(command)} ended with {done.returncode}: {printed}"
            )
        return done.stdout.strip()


def _find(program: str) -> str | None:
    return shutil.which(
        program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    )


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _tail(log: Path, num_lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
