"""launch/slurm with the real ranks and the real trainer, on a SLURM of two nodes."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from flallm_ds.commit import commit_of
from tests.helpers.cluster import Cluster
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slurm

OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
ENV = {"FLALLM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
TRAIN = "launch/slurm/train.sbatch"
RUN_S = 600  # longest that a tiny run of two ranks on two busy cores may take

JOIN = """
from flallm_ds import dist
from flallm_ds.process import end_process

world = dist.start()
total, = dist.all_reduce_sum([world.rank + 1], world)
print(f"rank {world.rank} of {world.size} ({world.local_rank} of {world.local_size} here): {total:.0f}")
dist.stop()
end_process(0)
"""


def tiny_train_args(run: Path, stage: str, corpus: Path) -> list[str]:
    """Options of launch/train.py for a tiny run.

    Steps for 5 s or more (so that a test can interrupt them) in two epochs.
    """
    options = {
        "stage": stage,
        "run": run,
        "data.shards": corpus / "shards",
        "data.crop_size": 28,
        "data.frame_size": 32,
        "data.batch_clips": 4,
        "visual.weights": "none",
        "visual.frozen_stages": 0,
        "visual.width": 8,
        "llm.name": corpus / "llm",
        "train.epochs": 2,
        "eval.every_epochs": 2,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def submit_train(cluster: Cluster, run: Path, corpus: Path) -> int:
    options = (*OPTIONS, f"--output={run.parent}/%x-%j.out")
    arguments = tiny_train_args(run, "visual", corpus)
    return cluster.submit(TRAIN, *arguments, options=options, cwd=ROOT, **ENV)


def losses(run: Path) -> dict[int, float]:
    """The training loss of each step that metrics.jsonl of a run folder holds so far."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.split("\n")[:-1]  # the last line may be half written
    records = [json.loads(line) for line in lines]
    return {
        record["global_step"]: record["loss"]
        for record in records
        if record["kind"] == "train"
    }


def test_the_ranks_of_two_nodes_join_one_process_group(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm").symlink_to(ROOT / "launch" / "slurm")
    (tmp_path / "launch" / "train.py").write_text(JOIN)
    job = cluster.wait(
        cluster.submit(TRAIN, options=OPTIONS, cwd=tmp_path, **ENV), timeout_s=90
    )
    assert job.state == "COMPLETED", cluster.describe(job.job_id)
    assert "rank 0 of 2 (0 of 1 here): 3" in job.output
    assert "rank 1 of 2 (0 of 1 here): 3" in job.output


@pytest.fixture(scope="module")
def undisturbed_losses(
    cluster: Cluster, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.wait(submit_train(cluster, folder / "visual", tiny_corpus), RUN_S)
    assert (job.state, job.num_restarts) == ("COMPLETED", 0), cluster.describe(job.job_id)
    return losses(folder / "visual")


def test_an_interrupted_job_ends_with_the_losses_of_an_undisturbed_one(
    cluster: Cluster,
    tmp_path: Path,
    tiny_corpus: Path,
    undisturbed_losses: dict[int, float],
) -> None:
    run = tmp_path / "visual"
    job_id = submit_train(cluster, run, tiny_corpus)
    cluster.wait_until(lambda: len(losses(run)) >= 3, job_id, "the first 3 steps", RUN_S)
    cluster.signal(job_id, "USR1")
    cluster.wait_until(
        lambda: cluster.job(job_id).state == "PENDING", job_id, "the requeue"
    )
    num_before = len(losses(run))
    job = cluster.wait(job_id, RUN_S)

    assert (job.state, job.num_restarts) == ("COMPLETED", 1), cluster.describe(job_id)
    assert num_before < len(undisturbed_losses), "the job was not interrupted in mid-run"
    assert losses(run) == undisturbed_losses


def test_the_doctor_checks_two_nodes(
    cluster: Cluster, tmp_path: Path, tiny_corpus: Path
) -> None:
    options = (*OPTIONS, f"--output={tmp_path}/%x-%j.out")
    arguments = [f"--run={tmp_path / 'new'}", f"--shards={tiny_corpus / 'shards'}"]
    job_id = cluster.submit(
        "launch/slurm/doctor.sbatch", *arguments, options=options, cwd=ROOT, **ENV
    )
    job = cluster.wait(job_id, timeout_s=RUN_S)
    assert job.state == "COMPLETED", cluster.describe(job_id)
    words = [line.split() for line in job.output.splitlines()]
    for check in ("versions ok", "run folder ok", "clocks ok"):
        assert sum(" ".join(line).startswith(check) for line in words) == 1, job.output
    assert "shared by 2 machines" in job.output
    assert not (tmp_path / "new").exists()


def test_submit_runs_both_stages_and_the_evaluation_in_a_chain(
    cluster: Cluster,
    tmp_path: Path,
    tiny_corpus: Path,
    undisturbed_losses: dict[int, float],
) -> None:
    """The first job is requeued in mid-epoch, and resumes on one node instead of two."""
    run = tmp_path / "two words; $HOME"
    visual, llm = Path(f"{run}_visual"), Path(f"{run}_llm")
    command = [
        sys.executable,
        "launch/submit.py",
        *tiny_train_args(run, "both", tiny_corpus),
    ]
    command += ["--nodes=2", "--gpus=0", "--cpus_per_task=1", "--time=1:00:00"]
    commit = commit_of(ROOT)[0]
    printed = cluster.run(*command, cwd=ROOT, **ENV)
    job_ids = [int(number) for number in re.findall(r"^submitted job (\d+)", printed, re.M)]
    first, second, last = job_ids
    with pytest.raises(AssertionError, match=f"in use by SLURM job {first} "):
        cluster.run(*command, cwd=ROOT, **ENV)

    cluster.wait_until(
        lambda: len(losses(visual)) >= 3, first, "the first 3 steps", timeout_s=RUN_S
    )
    cluster.requeue(first)
    cluster.wait_until(lambda: cluster.job(first).state == "PENDING", first, "the requeue")
    num_before = len(losses(visual))
    cluster.update(first, NumNodes="1", NumTasks="1")
    assert cluster.job(second).state == "PENDING", "the second stage waits for the first"
    for job_id in job_ids:
        job = cluster.wait(job_id, RUN_S)
        assert job.state == "COMPLETED", cluster.describe(job_id)

    assert cluster.job(first).num_restarts == 1
    assert num_before < len(undisturbed_losses), "the job was not interrupted in mid-run"
    assert losses(visual) == pytest.approx(undisturbed_losses, abs=1e-4)
    assert ranks_of_each_start(visual) == [2, 1] and ranks_of_each_start(llm) == [2]
    assert losses(llm) and (llm / "evaluation" / "test.json").is_file()
    # The jobs ran the copies of the code, and know the commit of the checkout.
    assert f"{visual}/code/flallm_ds/cli/train.py" in starts(visual)[0]["command"]
    assert starts(llm)[0]["commit"] == commit

    printed = cluster.run(*command, "--dry_run", cwd=ROOT, **ENV)
    assert f"stage visual is finished, and gets no job: {visual}" in printed
    assert printed.count("sbatch --parsable") == 1


def starts(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "versions.json").read_text())["starts"]


def ranks_of_each_start(run: Path) -> list[int]:
    return [start["ranks"] for start in starts(run)]
