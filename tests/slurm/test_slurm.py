"""launch/slurm on a real SLURM of two nodes: first with a stand-in for the trainer, then
with the trainer."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flallm_ds.sharding.build import VERBS
from flallm_ds.signsim import write_corpus
from tests.helpers.cluster import NODES, Cluster
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slurm

TRAIN = "launch/slurm/train.sbatch"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")

# Called as `train.py MODE FOLDER [RANK]`; writes what each rank sees to
# FOLDER/{restart}-{rank}.json. In mode "train" it waits for a signal, saves, and asks to
# be run again; RANK ends first. In mode "crash" rank 1 crashes in the first RESTARTS + 1
# starts, while rank 0 waits; in mode "refuse" rank 0 alone refuses the command line. In
# mode "hang" the watchdog ends rank 1 in each start but the second, which saves.
STAND_IN = """
import json, os, pathlib, signal, sys, time

mode, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank, restart = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
stop = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(signal.Signals(number).name))

if mode in ("crash", "refuse", "hang"):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else only KillWait ends rank 0

seen = {"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd()}
part = folder / f"part-{rank}"
part.write_text(json.dumps(seen))
part.rename(folder / f"{restart}-{rank}.json")

if mode == "crash" and restart <= int(sys.argv[3]):
    while rank == 1:
        if (folder / f"{restart}-0.json").exists():
            sys.exit("out of luck")
        time.sleep(0.05)
    time.sleep(60)
if mode == "hang":
    if restart == 1:
        sys.exit(75)
    if rank == 1:
        from flallm_ds.dist import World
        from flallm_ds.training.watchdog import Watchdog

        with Watchdog(folder, World(1, 2, 0, 1), warn_s=0.2, limit_s=0.4):
            time.sleep(60)
    time.sleep(60)
if mode == "refuse":
    if rank == 0:
        sys.exit(2)
    time.sleep(60)
if mode == "train" and restart == 0:
    while not stop:
        time.sleep(0.05)
    (folder / f"saved-{rank}").write_text(stop[0])
    print(f"rank {rank} saved after {stop[0]}")
    # Python shuts down, at its own pace on each rank. By then its handlers are gone: a TERM ends it with 143.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank != int(sys.argv[3]):
        time.sleep(2)
    sys.exit(75)
print(f"rank {rank} is done")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder shaped like the repository: the real scripts, stand-ins for what they start."""
    shutil.copytree(ROOT / "launch" / "slurm", tmp_path / "launch" / "slurm")
    for entry in ("train.py", "evaluate.py"):
        (tmp_path / "launch" / entry).write_text(STAND_IN)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "seen").mkdir()
    return tmp_path


def seen_by(project: Path, rank: int, restart: int = 0) -> dict:
    return json.loads((project / "seen" / f"{restart}-{rank}.json").read_text())


def wait_for_both_ranks(
    cluster: Cluster, project: Path, job_id: int, restart: int = 0
) -> None:
    started = [project / "seen" / f"{restart}-{rank}.json" for rank in range(2)]
    cluster.wait_until(
        lambda: all(path.exists() for path in started), job_id, "two started ranks"
    )


def test_every_node_runs_one_rank_that_sees_the_same_rendezvous(
    cluster: Cluster, project: Path
) -> None:
    stale = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    stale["OMP_NUM_THREADS"] = "1"
    job_id = cluster.submit(TRAIN, "once", "seen", options=TWO_NODES, cwd=project, **stale)
    job = cluster.wait(job_id)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), cluster.describe(job_id)

    environments = [seen_by(project, rank)["env"] for rank in range(2)]
    for rank, env in enumerate(environments):
        assert env["SLURM_PROCID"] == str(rank)
        assert env["SLURM_LOCALID"] == "0"
        assert env["SLURM_NTASKS"] == "2"
        assert env["SLURMD_NODENAME"] == NODES[rank]
        assert env["MASTER_ADDR"] == NODES[0]
        assert env["MASTER_PORT"] == environments[0]["MASTER_PORT"]
        assert 10_000 <= int(env["MASTER_PORT"]) < 30_000
        assert env["OMP_NUM_THREADS"] == "2"
        assert "RANK" not in env and "WORLD_SIZE" not in env
        assert seen_by(project, rank)["cwd"] == str(project)


def test_two_tasks_per_node_get_ranks_in_the_order_of_the_nodes(
    cluster: Cluster, project: Path
) -> None:
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
    job = cluster.wait(cluster.submit(TRAIN, "once", "seen", options=options, cwd=project))
    assert job.state == "COMPLETED", cluster.describe(job.job_id)
    environments = [seen_by(project, rank)["env"] for rank in range(4)]
    assert [env["SLURM_LOCALID"] for env in environments] == ["0", "1", "0", "1"]
    assert [env["SLURMD_NODENAME"] for env in environments] == [
        NODES[0],
        NODES[0],
        NODES[1],
        NODES[1],
    ]


def test_arguments_arrive_verbatim(cluster: Cluster, project: Path) -> None:
    arguments = [
        "once",
        "seen",
        "--run.name",
        "two words",
        "--text=$HOME `id` *",
        "",
        "--a.b=1e-3",
        "ä'\"\\",
    ]
    env = {"FLALLM_PYTHON": sys.executable}
    shutil.rmtree(project / ".venv")
    job = cluster.wait(
        cluster.submit("launch/slurm/evaluate.sbatch", *arguments, cwd=project, **env)
    )
    assert job.state == "COMPLETED", cluster.describe(job.job_id)
    assert seen_by(project, 0)["argv"] == ["launch/evaluate.py", *arguments]


def test_a_run_that_saves_on_usr1_is_requeued(cluster: Cluster, project: Path) -> None:
    job_id = cluster.submit(TRAIN, "train", "seen", "1", options=TWO_NODES, cwd=project)
    wait_for_both_ranks(cluster, project, job_id)
    cluster.signal(job_id, "USR1")
    job = cluster.wait(job_id)

    assert (job.state, job.num_restarts) == ("COMPLETED", 1), cluster.describe(job_id)
    assert [(project / "seen" / f"saved-{rank}").read_text() for rank in range(2)] == [
        "SIGUSR1",
        "SIGUSR1",
    ]
    again = [seen_by(project, rank, restart=1)["env"] for rank in range(2)]
    assert [env["SLURM_RESTART_COUNT"] for env in again] == ["1", "1"]
    assert seen_by(project, 0, restart=1)["argv"] == seen_by(project, 0)["argv"]
    assert "rank 0 saved" in job.output and "rank 0 is done" in job.output, (
        "both runs write to one file"
    )


def test_a_job_requeued_from_outside_saves_on_term_and_starts_again(
    cluster: Cluster, project: Path
) -> None:
    job_id = cluster.submit(TRAIN, "train", "seen", "0", options=TWO_NODES, cwd=project)
    wait_for_both_ranks(cluster, project, job_id)
    cluster.requeue(job_id)
    job = cluster.wait(job_id)

    assert (job.state, job.num_restarts) == ("COMPLETED", 1), cluster.describe(job_id)
    assert [(project / "seen" / f"saved-{rank}").read_text() for rank in range(2)] == [
        "SIGTERM",
        "SIGTERM",
    ]
    assert "rank 1 is done" in job.output


def test_a_cancelled_job_saves_and_does_not_come_back(
    cluster: Cluster, project: Path
) -> None:
    job_id = cluster.submit(TRAIN, "train", "seen", "0", options=TWO_NODES, cwd=project)
    wait_for_both_ranks(cluster, project, job_id)
    cluster.cancel(job_id)
    job = cluster.wait(job_id)

    assert (job.state, job.num_restarts) == ("CANCELLED", 0), cluster.describe(job_id)
    assert [(project / "seen" / f"saved-{rank}").read_text() for rank in range(2)] == [
        "SIGTERM",
        "SIGTERM",
    ]


def test_a_rank_that_crashes_ends_the_job_at_once_and_restarts_have_an_end(
    cluster: Cluster, project: Path
) -> None:
    begun_s = time.monotonic()
    env = {"FLALLM_MAX_RESTARTS": "1"}
    job_id = cluster.submit(
        TRAIN, "crash", "seen", "9", options=TWO_NODES, cwd=project, **env
    )
    job = cluster.wait(job_id, timeout_s=50)
    assert (job.state, job.num_restarts) == ("FAILED", 1), cluster.describe(job_id)
    assert job.output.count("out of luck") == 2
    assert "crashed with code" in job.output and "restart 1 of 1." in job.output
    assert "after 1 restarts. Fix the cause" in job.output
    assert time.monotonic() - begun_s < 50, "rank 0 would have slept for 60 s"
    assert list(project.glob(".restarts-*")) == []


def test_a_job_that_crashes_twice_is_restarted_twice(
    cluster: Cluster, project: Path
) -> None:
    job_id = cluster.submit(TRAIN, "crash", "seen", "1", options=TWO_NODES, cwd=project)
    job = cluster.wait(job_id, timeout_s=60)
    assert (job.state, job.num_restarts) == ("COMPLETED", 2), cluster.describe(job_id)
    assert "restart 2 of 3." in job.output and "rank 1 is done" in job.output
    assert list(project.glob(".restarts-*")) == []


def test_a_hang_counts_as_a_crash_until_the_run_has_saved(
    cluster: Cluster, project: Path
) -> None:
    """Start 1 hangs and is restarted; start 2 saves, so the hang of start 3 is the first
    again; start 4 hangs, too. Rank 0 has no watchdog: srun ends it."""
    env = {"FLALLM_MAX_RESTARTS": "1", "FLALLM_PYTHON": sys.executable}
    env["PYTHONPATH"] = str(ROOT)
    job_id = cluster.submit(TRAIN, "hang", "seen", options=TWO_NODES, cwd=project, **env)
    job = cluster.wait(job_id, timeout_s=120)
    assert (job.state, job.num_restarts) == ("FAILED", 3), cluster.describe(job_id)
    assert job.output.count("the limit of train.stall_limit_s") == 3
    assert job.output.count("restart 1 of 1.") == 2 and "Saved before the" in job.output
    assert "after 1 restarts. Fix the cause" in job.output
    assert list(project.glob(".restarts-*")) == []


def test_a_refused_command_line_is_not_restarted(cluster: Cluster, project: Path) -> None:
    """Rank 1 is ended by srun, whose code is therefore not 2."""
    job_id = cluster.submit(TRAIN, "refuse", "seen", options=TWO_NODES, cwd=project)
    job = cluster.wait(job_id)
    found = (job.state, job.exit_code, job.num_restarts)
    assert found == ("FAILED", 2, 0), cluster.describe(job_id)


def test_a_port_in_use_is_passed_over(cluster: Cluster, project: Path) -> None:
    options = ("--hold", "--nodes=1", "--ntasks-per-node=1")
    job_id = cluster.submit(TRAIN, "once", "seen", options=options, cwd=project)
    first = 10_000 + job_id % 20_000
    # One port that a program uses, one that another job has chosen and not used yet.
    with socket.create_server(("127.0.0.1", first)), claimed(project, job_id + 1) as second:
        assert second == first + 1
        cluster.release(job_id)
        job = cluster.wait(job_id)
    assert job.state == "COMPLETED", cluster.describe(job_id)
    assert seen_by(project, 0)["env"]["MASTER_PORT"] == str(first + 2)


@contextmanager
def claimed(project: Path, job_id: int) -> Iterator[int]:
    """The port that another job has reserved for its rendezvous."""
    command = [sys.executable, str(project / "launch/slurm/port.py"), str(job_id)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        yield int(other.stdout.readline())
        other.stdin.close()
        assert other.wait(timeout=20) == 0


def test_a_waiting_job_may_lose_a_node(cluster: Cluster, project: Path) -> None:
    options = ("--hold", *TWO_NODES)
    job_id = cluster.submit(TRAIN, "once", "seen", options=options, cwd=project)
    cluster.update(job_id, NumNodes="1", NumTasks="1")
    cluster.release(job_id)
    job = cluster.wait(job_id)
    assert job.state == "COMPLETED", cluster.describe(job_id)
    assert seen_by(project, 0)["env"]["SLURM_STEP_NUM_TASKS"] == "1"
    assert not (project / "seen" / "0-1.json").exists()


@pytest.mark.parametrize("per_node", [5, 8])
def test_tasks_that_do_not_divide_among_the_nodes_are_refused(
    cluster: Cluster, project: Path, per_node: int
) -> None:
    """9 tasks on 2 nodes of 4 GPUs: 9 / 2 is 4 in whole numbers."""
    options = ("--nodes=2", "--ntasks=9", f"--ntasks-per-node={per_node}")
    options += ("--cpus-per-task=1",)
    job = cluster.wait(cluster.submit(TRAIN, "once", "seen", options=options, cwd=project))
    assert (job.state, job.exit_code) == ("FAILED", 2), cluster.describe(job.job_id)
    assert "same number of tasks, got 9 tasks on 2 nodes." in job.output


def test_tasks_that_do_not_match_the_gpus_are_refused(
    cluster: Cluster, project: Path
) -> None:
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    job = cluster.wait(cluster.submit(TRAIN, "once", "seen", options=options, cwd=project))
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert "Give sbatch --ntasks-per-node=2." in job.output


def test_a_missing_python_is_named(cluster: Cluster, project: Path) -> None:
    env = {"FLALLM_PYTHON": "/nowhere/python"}
    job = cluster.wait(cluster.submit(TRAIN, "once", "seen", cwd=project, **env))
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert "/nowhere/python" in job.output


def test_an_array_builds_shards_in_parts_to_the_bytes_of_one_build(
    cluster: Cluster, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_corpus(source, 12, num_monolingual=100)
    given = {"short_side": 16, "clips_per_shard": 2, "workers": 1}
    VERBS["signsim"](source, tmp_path / "whole", **given)
    arguments = ["signsim", f"--source={source}", f"--out={out}"]
    arguments += ["--short_side=16", "--clips_per_shard=2"]
    options = ("--array=1-3", "--cpus-per-task=1", f"--output={tmp_path}/%a.out")
    env = {"FLALLM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    script = "launch/slurm/shard.sbatch"
    job_id = cluster.submit(script, *arguments, options=options, cwd=ROOT, **env)
    outputs = [tmp_path / f"{part}.out" for part in (1, 2, 3)]

    def is_merged() -> bool:
        texts = [path.read_text() for path in outputs if path.is_file()]
        return "shards are in" in "".join(texts)

    cluster.wait_until(is_merged, job_id, "merged shards", timeout_s=90)
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert found == whole and len(list(out.glob("*.tar"))) >= 6
    assert not out.with_name("out.parts").exists()


def test_an_array_that_does_not_begin_at_1_is_refused(
    cluster: Cluster, project: Path
) -> None:
    options = ("--array=0-1", "--cpus-per-task=1", f"--output={project}/%a.out")
    job_id = cluster.submit(
        "launch/slurm/shard.sbatch", "phoenix14t", options=options, cwd=project
    )
    output = project / "1.out"
    cluster.wait_until(
        lambda: output.is_file() and bool(output.read_text()), job_id, "output"
    )
    assert output.read_text() == (
        "The array must be 1-N, got 2 jobs from 0 to 1. Give sbatch --array=1-N.\n"
    )


def test_a_chain_whose_first_job_fails_leaves_the_queue(
    cluster: Cluster, tmp_path: Path
) -> None:
    command = [sys.executable, "launch/submit.py", "--stage=both", f"--run={tmp_path}/run"]
    env = {"FLALLM_PYTHON": "/nowhere/python", "PYTHONPATH": str(ROOT)}
    printed = cluster.run(*command, "--gpus=0", "--nodes=2", cwd=ROOT, **env)
    first, second, third = [
        int(line.split()[2].rstrip(":"))
        for line in printed.splitlines()
        if line.startswith("submitted job")
    ]
    job = cluster.wait(first)
    assert (job.state, job.exit_code) == ("FAILED", 2), cluster.describe(first)
    assert "got '/nowhere/python'" in job.output
    for job_id in (second, third):
        assert cluster.wait(job_id).state == "CANCELLED", cluster.describe(job_id)
