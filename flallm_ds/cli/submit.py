"""`flallm submit`: train on a SLURM cluster, one job for each stage and one for the scores."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from flallm_ds.cli.checks import check_runs, check_shards
from flallm_ds.cluster.jobs import Job, Resources, evaluate_job, train_job, write_jobs
from flallm_ds.cluster.slurm import check_not_queued, submit_chain
from flallm_ds.command import main
from flallm_ds.config import RunConfig
from flallm_ds.data.plan import micro_batches_of_rank
from flallm_ds.errors import UserError
from flallm_ds.files import locked
from flallm_ds.recipes import options_of_both, resolve, resolve_both
from flallm_ds.run_check import LOCK, check_run_folder, is_finished

NO_SPLIT = "none"


def submit(
    *,
    stage: str | None = None,
    recipe: str | None = None,
    nodes: int = 1,
    gpus: int = 1,
    split: str = "test",
    time: str = "24:00:00",
    partition: str = "",
    account: str = "",
    qos: str = "",
    mem: str = "",
    cpus_per_task: int = 8,
    max_restarts: int = 3,
    sbatch: str = "",
    dry_run: bool = False,
    **overrides: str,
) -> None:
    """Submit a training to SLURM: a job for each stage, then one that scores the result.

    The options of `flallm train` are checked before anything is submitted. Each job runs a
    copy of the code in RUN/code; its script and its output are in RUN/slurm. The same
    command resumes a run that has ended early; stages that are finished get no job.

    Example: flallm submit --nodes=4 --gpus=8 --recipe=mine --stage=both --partition=gpu

    Options:
        stage: visual, llm, joint or both
        recipe: a recipe of `flallm recipes`; quickstart by default
        nodes: number of nodes of a training job; the evaluation uses one
        gpus: GPUs of each node, one task for each; 0 for CPU nodes, with one task each
        split: the split that the last job scores; none for no such job
        time: limit of each job; a longer training is requeued
        partition: as in sbatch; that of the cluster by default
        account: as in sbatch
        qos: as in sbatch
        mem: memory of a node, as in sbatch; 0 is all
        cpus_per_task: CPU cores of each task
        max_restarts: restarts of a job after crashes and hangs
        sbatch: more options of sbatch, "--exclude=node7 --constraint=a100"
        dry_run: print the scripts and the commands, and write nothing
    """
    resources = Resources(
        nodes,
        gpus,
        cpus_per_task,
        time,
        partition,
        account,
        qos,
        mem,
        _words("sbatch", sbatch),
        max_restarts,
    )
    jobs = chain(stage, recipe, overrides, split, resources)
    if dry_run:
        show(jobs)
        return
    if not jobs:  # every stage is finished, and no split is to be scored
        return
    runs = list(dict.fromkeys(job.run for job in jobs))
    check_not_queued(runs)
    for run in runs:
        _check_unlocked(run)
    write_jobs(jobs)
    report(jobs, submit_chain(jobs))


def chain(
    stage: str | None,
    recipe: str | None,
    overrides: Mapping[str, str],
    split: str,
    resources: Resources,
) -> list[Job]:
    """Return the jobs of a training, of which each needs the one before.

    Raises UserError for options that the jobs would refuse.
    """
    options: tuple[Mapping[str, str], ...] = (overrides,)
    configs: tuple[RunConfig, ...]
    if stage == "both":
        configs = resolve_both(recipe, overrides)
        options = options_of_both(recipe, overrides)
    else:
        configs = (resolve(stage, recipe, overrides),)
    check(configs, split, resources)
    jobs: list[Job] = []
    for config, given in zip(configs, options, strict=True):
        if _is_finished(config):
            print(f"stage {config.stage} is finished, and gets no job: {config.run}")
        else:
            jobs.append(train_job(config, recipe, given, resources))
    if split != NO_SPLIT:
        jobs.append(evaluate_job(Path(configs[-1].run), split, resources))
    return jobs


def _words(option: str, text: str) -> tuple[str, ...]:
    """Return the words of a text, as a shell separates them. Raises UserError."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(
            f"--{option} must have its quotes in pairs, got {text!r} ({error})."
        ) from error


def check(configs: Sequence[RunConfig], split: str, resources: Resources) -> None:
    """Raise UserError for what the jobs would refuse when they start, perhaps days later."""
    check_runs(configs)
    for config in configs:
        check_run_folder(config)
        micro_batches_of_rank(config.data.micro_batches, 0, resources.num_tasks)
    if split != NO_SPLIT:
        check_shards(configs[-1].data.shards, (split,))


def _is_finished(config: RunConfig) -> bool:
    """Return whether a stage is trained to its end."""
    checkpoints = Path(config.run) / "checkpoints"
    if not checkpoints.is_dir():
        return False
    # Imports torch, which takes seconds.
    from flallm_ds.training.checkpoint import committed, read_state

    found = committed(checkpoints)
    return bool(found) and is_finished(config, read_state(found[-1]))


def _check_unlocked(run: Path) -> None:
    """Raise UserError if a process uses the run folder, a job of SLURM or not."""
    if (run / LOCK).exists():
        with locked(run / LOCK, f"Run folder {run}", "use another --run=FOLDER"):
            pass


def show(jobs: Sequence[Job]) -> None:
    """Print the scripts, and the commands that would submit them."""
    for job in jobs:
        print(f"# {job.script}\n{job.text()}")
    previous = None
    for number, job in enumerate(jobs, 1):
        print(shlex.join(job.sbatch(previous)))
        previous = f"JOB{number}"
    print("dry run: nothing was written or submitted")


def report(jobs: Sequence[Job], job_ids: Sequence[int]) -> None:
    """Print the numbers of the jobs, and how to follow and to end them."""
    before = None
    for job, job_id in zip(jobs, job_ids, strict=True):
        when = "" if before is None else f", after {before}"
        print(f"submitted job {job_id}: {job.name}{when}")
        before = job_id
    print(f"squeue --jobs={','.join(map(str, job_ids))}")
    for job, job_id in zip(jobs, job_ids, strict=True):
        print(shlex.join(["tail", "-F", str(job.output(job_id))]))
    # Not at the top: the table of verbs imports nothing, but would be imported in a circle.
    from flallm_ds.cli import FLALLM

    if "watch" in FLALLM.verbs:
        for run in dict.fromkeys(job.run for job in jobs):
            print(shlex.join(["flallm", "watch", str(run)]))
    print(f"stop: scancel {' '.join(map(str, job_ids))}")


if __name__ == "__main__":
    main(submit)
