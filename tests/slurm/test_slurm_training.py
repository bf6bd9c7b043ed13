"""launch/slurm with the real ranks and the real trainer, on a SLURM of two nodes."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slurm

OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
ENV = {"FLALLM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
TRAIN = "launch/slurm/train.sbatch"
RUN_S = 240  # longest that a tiny run of two ranks on two busy cores may take

JOIN = """
from flallm_ds import dist
from flallm_ds.command import end_process

world = dist.start()
total, = dist.all_reduce_sum([world.rank + 1], world)
print(f"rank {world.rank} of {world.size} ({world.local_rank} of {world.local_size} here): {total:.0f}")
dist.stop()
end_process(0)
"""


def tiny_train_args(folder: Path, stage: str, corpus: Path) -> list[str]:
    """Options of launch/train.py for a tiny run in folder/stage; stage llm reads folder/visual.

    Steps for 5 s or more (so that a test can interrupt them) in two epochs.
    """
    options = {
        "stage": stage,
        "run": folder / stage,
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
    if stage == "llm":
        options["visual_run"] = folder / "visual"
    return [f"--{name}={value}" for name, value in options.items()]


def submit_train(cluster: Cluster, folder: Path, stage: str, corpus: Path) -> int:
    options = (*OPTIONS, f"--output={folder}/%x-%j.out")
    arguments = tiny_train_args(folder, stage, corpus)
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


def test_both_stages_train_on_two_nodes_to_the_end(
    cluster: Cluster, tmp_path: Path, tiny_corpus: Path
) -> None:
    for stage in ("visual", "llm"):
        job = cluster.wait(submit_train(cluster, tmp_path, stage, tiny_corpus), RUN_S)
        assert (job.state, job.num_restarts) == ("COMPLETED", 0), cluster.describe(
            job.job_id
        )
        assert losses(tmp_path / stage), (
            f"no losses in {tmp_path / stage}/metrics.jsonl\n{job.output}"
        )


@pytest.fixture(scope="module")
def undisturbed_losses(
    cluster: Cluster, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = cluster.wait(submit_train(cluster, folder, "visual", tiny_corpus), RUN_S)
    assert (job.state, job.num_restarts) == ("COMPLETED", 0), cluster.describe(job.job_id)
    return losses(folder / "visual")


@pytest.mark.parametrize("how", ["requeue", "USR1"])
def test_an_interrupted_job_ends_with_the_losses_of_an_undisturbed_one(
    cluster: Cluster,
    tmp_path: Path,
    tiny_corpus: Path,
    undisturbed_losses: dict[int, float],
    how: str,
) -> None:
    run = tmp_path / "visual"
    job_id = submit_train(cluster, tmp_path, "visual", tiny_corpus)
    cluster.wait_until(lambda: len(losses(run)) >= 3, job_id, "the first 3 steps", RUN_S)
    if how == "requeue":
        cluster.requeue(job_id)
    else:
        cluster.signal(job_id, how)
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
