"""Submit jobs to SLURM, in a chain, and find those that are still in its queue."""

import json
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from flallm_ds.cluster.jobs import Job
from flallm_ds.errors import UserError
from flallm_ds.files import write_json
from flallm_ds.run_check import JOBS

# In RUN/slurm/: the numbers of the jobs that were submitted last.
SUBMITTED = "jobs.json"
_TIMEOUT_S = 120  # of a command of SLURM, whose controller may be busy


def submit_chain(jobs: Sequence[Job]) -> list[int]:
    """Submit jobs of which each starts when the one before has succeeded.

    Returns their numbers. If one is refused, those before it are cancelled. Raises
    UserError.
    """
    job_ids: list[int] = []
    of_run: dict[Path, list[int]] = {}
    try:
        for job in jobs:
            after = job_ids[-1] if job_ids else None
            # With --parsable, sbatch prints JOBID, or JOBID;CLUSTER.
            job_id = int(_run(job.sbatch(after)).split(";")[0])
            job_ids.append(job_id)
            of_run.setdefault(job.run, []).append(job_id)
            write_json(job.folder / SUBMITTED, of_run[job.run])
    except BaseException:  # Ctrl-C, too: no part of a chain may stay
        if job_ids:
            _run(["scancel", *map(str, job_ids)])
        raise
    return job_ids


def check_not_queued(runs: Iterable[Path]) -> None:
    """Raise UserError if a job of a run folder is waiting or running."""
    found: dict[int, Path] = {}
    for run in runs:
        path = run / JOBS / SUBMITTED
        if path.is_file():
            for job_id in json.loads(path.read_text(encoding="utf-8")):
                found[job_id] = run
    if not found:
        return
    # All jobs, because squeue fails for the number of a job that SLURM has forgotten.
    lines = _run(["squeue", "--noheader", "--format=%A %T"]).splitlines()
    states = dict(line.split(maxsplit=1) for line in lines)
    for job_id, run in found.items():
        state = states.get(str(job_id))
        if state is not None:
            raise UserError(
                f"Run folder {run} is in use by SLURM job {job_id} ({state.lower()}). Wait "
                f"for it, end it with scancel {job_id}, or use another --run=FOLDER."
            )


def _run(command: list[str]) -> str:
    """Return what a command of SLURM prints. Raises UserError if it fails."""
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise UserError(
            f"Cannot submit jobs: {command[0]} is not installed on this machine. Submit on a "
            "login node of the cluster, or see the scripts with --dry_run=true."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"Cannot run `{shown}`: no answer of SLURM after {_TIMEOUT_S} s. Try again later."
        ) from error
    if done.returncode != 0:
        reason = "; ".join(done.stderr.strip().splitlines()) or f"code {done.returncode}"
        raise UserError(f"Cannot run `{shown}`: {reason.rstrip('.')}. Check the options.")
    return done.stdout
