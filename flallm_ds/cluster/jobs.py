"""Write the SLURM jobs of a run: one script per stage, and one that scores the result.

    RUN/code/   a copy of the package, from which the jobs run
    RUN/slurm/  train.sh  evaluate.sh  deepspeed.json (a copy of train.deepspeed)
                jobs.json  train-JOBID.out  evaluate-JOBID.out

The scripts have one template. What they do on the nodes is in launch/slurm/run.sh.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flallm_ds.commit import copy_code
from flallm_ds.config import RunConfig
from flallm_ds.errors import require
from flallm_ds.files import write_file
from flallm_ds.run_check import CODE, JOBS

# No space, quote or line break: sbatch reads these values from a comment of the script.
_VALUE = re.compile(r"[\w.,:=+/@%-]+", re.ASCII)
_NOT_IN_A_NAME = re.compile(r"[^\w.-]+", re.ASCII)
DEEPSPEED = "deepspeed.json"
_MAX_NAME = 100  # characters of a job's name, which squeue and sacct cut off anyway

_SCRIPT = """\
#!/bin/bash
# Written by flallm submit. To resume the run, submit the same command again.
{directives}
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

export FLALLM_PYTHON={python}
export FLALLM_MAX_RESTARTS={max_restarts}
export FLALLM_JOB_FOLDER={job_folder}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
# -P: the code is that of PYTHONPATH, not of the current folder.
source {run_sh} -P -m \\
    {command}
"""


@dataclass(frozen=True)
class Resources:
    """What a job asks SLURM for. Empty texts are left to the cluster.

    gpus: GPUs of each node, with one task each; 0 for one task per node, on its CPUs.
    more: further options of sbatch, as words. Raises UserError for wrong values.
    """

    nodes: int
    gpus: int
    cpus_per_task: int
    time: str
    partition: str = ""
    account: str = ""
    qos: str = ""
    mem: str = ""
    more: tuple[str, ...] = ()
    max_restarts: int = 3

    def __post_init__(self) -> None:
        least = {"nodes": 1, "gpus": 0, "cpus_per_task": 1, "max_restarts": 0}
        for name, low in least.items():
            value = getattr(self, name)
            require(value >= low, f"--{name} must be at least {low}, got {value}.")
        for name in ("time", "partition", "account", "qos", "mem"):
            value = getattr(self, name)
            require(
                not value or _VALUE.fullmatch(value) is not None,
                f"--{name} must be a value of sbatch --{name} without spaces and quotes, got "
                f"{value!r}.",
            )
        for word in self.more:
            require(
                word.startswith("--"),
                "--sbatch must have options of the form --name=value, separated by spaces, "
                f"got {word!r}.",
            )

    @property
    def num_tasks(self) -> int:
        """Return the number of ranks of the job."""
        return self.nodes * max(1, self.gpus)

    def directives(self, job_name: str) -> str:
        """Return the #SBATCH lines of a script."""
        options: dict[str, str | int] = {
            "job-name": job_name,
            "nodes": self.nodes,
            "ntasks-per-node": max(1, self.gpus),
            "cpus-per-task": self.cpus_per_task,
            "gpus-per-node": self.gpus or "",
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "mem": self.mem,
        }
        lines: list[str] = []
        for name, value in options.items():
            if value != "":
                lines.append(f"#SBATCH --{name}={value}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """A job that is to be submitted.

    kind: train or evaluate. run: the run folder. module, options: what each rank runs.
    deepspeed: the JSON that is copied next to the script, if any.
    """

    kind: str
    name: str
    run: Path
    module: str
    options: Mapping[str, str]
    resources: Resources
    deepspeed: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the script and of the outputs."""
        return self.run / JOBS

    @property
    def script(self) -> Path:
        """Return the path of the script."""
        return self.folder / f"{self.kind}.sh"

    def output(self, job_id: int | str) -> Path:
        """Return the file of the job's output. job_id: `%j` stands for it in sbatch."""
        return self.folder / f"{self.kind}-{job_id}.out"

    def text(self) -> str:
        """Return the script. Paths are absolute; those of the options are as given."""
        code = self.run.absolute() / CODE
        words = [self.module]
        for name, value in self.options.items():
            words.append(shlex.quote(f"--{name}={value}"))
        return _SCRIPT.format(
            directives=self.resources.directives(self.name),
            # The Python of an image, for example; by default this one.
            python=shlex.quote(os.environ.get("FLALLM_PYTHON") or sys.executable),
            max_restarts=self.resources.max_restarts,
            job_folder=shlex.quote(str(self.folder.absolute())),
            code=shlex.quote(str(code)),
            run_sh=shlex.quote(str(code / "flallm_ds" / "slurm" / "run.sh")),
            command=" \\\n    ".join(words),
        )

    def sbatch(self, after: int | str | None) -> list[str]:
        """Return the command that submits the job. after: the job that must succeed first."""
        # In sbatch, %j is the job's number and %% a percent sign.
        folder = str(self.folder.absolute()).replace("%", "%%")
        words = ["sbatch", "--parsable", f"--output={folder}/{self.kind}-%j.out"]
        words += self.resources.more
        if after is not None:
            # A job whose condition cannot come true would stay in the queue.
            words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        return [*words, str(self.script.absolute())]


def train_job(
    config: RunConfig, recipe: str | None, options: Mapping[str, str], resources: Resources
) -> Job:
    """Return the job that trains one stage.

    options: those of its command line, without the stage and the recipe.
    """
    words: dict[str, str] = {"stage": config.stage}
    if recipe is not None:
        words["recipe"] = recipe
    words |= {"run": config.run, **options}
    run = Path(config.run)
    deepspeed = None
    # The job must not depend on a file of the checkout that may change. Without such a
    # file, ds_configs/NAME.json is that of the package.
    json = Path(config.train.deepspeed)
    if config.train.deepspeed and json.is_file():
        deepspeed = json
        words["train.deepspeed"] = str(run.absolute() / JOBS / DEEPSPEED)
    name = job_name(config.stage, run)
    return Job("train", name, run, "flallm_ds.cli.train", words, resources, deepspeed)


def evaluate_job(run: Path, split: str, resources: Resources) -> Job:
    """Return the job that scores a run on a split, on one node."""
    options = {"run": str(run), "split": split}
    name = job_name("evaluate", run)
    one_node = replace(resources, nodes=1)
    return Job("evaluate", name, run, "flallm_ds.cli.evaluate", options, one_node)


def job_name(what: str, run: Path) -> str:
    """Return the name of a job, without characters that a shell or SLURM may interpret."""
    name = _NOT_IN_A_NAME.sub("-", f"flallm-{what}-{run.absolute().name}")
    return name[:_MAX_NAME]


def write_jobs(jobs: Sequence[Job]) -> None:
    """Copy the code to the run folder of each job, and write the scripts. Raises OSError."""
    copied: set[Path] = set()
    for job in jobs:
        # The evaluation of a run uses the copy of its training.
        if job.run not in copied:
            copy_code(job.run / CODE)
        copied.add(job.run)
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.deepspeed is not None:
            write_file(job.folder / DEEPSPEED, job.deepspeed.read_bytes())
        write_file(job.script, job.text().encode())
