"""`flallm submit` without a SLURM; tests/slurm runs the jobs."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from flallm_ds.cluster.jobs import Resources, job_name, train_job, write_jobs
from flallm_ds.cluster.slurm import SUBMITTED, check_not_queued
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.files import locked
from flallm_ds.recipes import options_of_both, resolve, resolve_both
from tests.helpers.early import flallm

RESOURCES = Resources(nodes=2, gpus=4, cpus_per_task=3, time="1:00:00")
# Characters that bash, sbatch or a template might interpret.
NASTY = "a b'c\"$HOME`id`;#{x}%j\\n\nä*"


def directives(script: str) -> dict[str, str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    options = [line.removeprefix("#SBATCH --").partition("=") for line in lines]
    return {name: value for name, _, value in options}


def test_a_dry_run_prints_the_chain_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    done = flallm(
        "submit", "--stage=both", f"--run={run}", "--dry_run", "--gpus=2", "--qos=high"
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    first, second, third = [
        shlex.split(line) for line in done.stdout.splitlines() if line.startswith("sbatch")
    ]
    assert first[-1] == f"{run}_visual/slurm/train.sh"
    assert second[-3:] == [
        "--dependency=afterok:JOB1",
        "--kill-on-invalid-dep=yes",
        f"{run}_llm/slurm/train.sh",
    ]
    assert third[-3] == "--dependency=afterok:JOB2"
    assert third[-1] == f"{run}_llm/slurm/evaluate.sh"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--optim.lrr=1", "did you mean optim.lr"),
        ("--nodez=2", "there is no option --nodez"),
        ("--nodes=0", "--nodes must be at least 1, got 0"),
        ("--gpus=-1", "--gpus must be at least 0, got -1"),
        ("--partition=a b", "--partition must be a value of sbatch --partition"),
        ("--time=1:00\n#SBATCH --uid=0", "--time must be a value of sbatch --time"),
        ("--sbatch=-x", "--sbatch must have options of the form --name=value"),
        ("--sbatch='", "--sbatch must have its quotes in pairs"),
        ("--nodes=3", "data.micro_batches must be at least the number of ranks (3), got 2"),
        ("--data.shards=/no", "must contain index.json"),
        ("--visual.weights=/no", "visual.weights must be a hub id or an existing path"),
        ("--run=/", "--run must be a new folder"),
    ],
)
def test_a_wrong_option_submits_nothing(option: str, sentence: str) -> None:
    done = flallm("submit", "--stage=visual", "--recipe=quickstart", option)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and sentence in done.stderr


def test_a_machine_without_slurm_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = flallm("submit", "--stage=visual", f"--run={run}", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "Cannot submit jobs: sbatch is not installed on this machine." in done.stderr


def test_the_jobs_get_the_options_of_their_stage() -> None:
    given = {"run": "r", "optim.lr": "1", "stage1.train.seed": "2", "stage2.optim.lr": "3"}
    visual, llm = options_of_both("phoenix14t", given)
    assert visual == {"run": "r_visual", "optim.lr": "1", "train.seed": "2"}
    assert llm == {"run": "r_llm", "optim.lr": "3", "visual_run": "r_visual"}
    configs = resolve_both("phoenix14t", given)
    for config, options in zip(configs, (visual, llm), strict=True):
        assert resolve(config.stage, "phoenix14t", options) == config


def test_a_script_asks_for_the_resources() -> None:
    config = RunConfig(stage="visual", run="runs/a")
    text = train_job(config, None, {}, RESOURCES).text()
    found = directives(text)
    assert {"mem", "partition", "account", "qos"}.isdisjoint(found)
    assert found["nodes"] == "2" and found["time"] == "1:00:00"
    assert found["gpus-per-node"] == found["ntasks-per-node"] == "4"
    on_cpus = Resources(nodes=1, gpus=0, cpus_per_task=3, time="", mem="0")
    found = directives(train_job(config, None, {}, on_cpus).text())
    assert found["ntasks-per-node"] == "1" and found["mem"] == "0"
    assert "gpus-per-node" not in found and "time" not in found


def test_a_script_passes_every_option_verbatim(tmp_path: Path) -> None:
    run = tmp_path / NASTY.replace("/", "")
    config = RunConfig(stage="visual", run=str(run))
    job = train_job(config, "mine", {"llm.name": NASTY}, RESOURCES)
    write_jobs([job])
    # What the script sources prints its words instead of running Python.
    (run / "code" / "flallm_ds" / "slurm" / "run.sh").write_text(
        'printf \'%s\\0\' "$PYTHONPATH" "$FLALLM_JOB_FOLDER" "$@"'
    )
    done = subprocess.run(
        ["bash", job.script], capture_output=True, text=True, check=True, env={}
    )
    assert done.stderr == ""
    assert done.stdout.split("\0")[:-1] == [
        str(run / "code"),
        str(run / "slurm"),
        "-P",
        "-m",
        "flallm_ds.cli.train",
        "--stage=visual",
        "--recipe=mine",
        f"--run={run}",
        f"--llm.name={NASTY}",
    ]
    assert job.sbatch(None)[2] == f"--output={run}/slurm/train-%j.out".replace(
        "%", "%%"
    ).replace("-%%j", "-%j")


def test_the_name_of_a_job_is_plain() -> None:
    assert job_name("visual", Path("runs/a b;$(id)\n")) == "flallm-visual-a-b-id-"


def test_a_deepspeed_json_is_copied_for_the_job(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text("{}")
    options = {"train.deepspeed": str(tmp_path / "my.json"), "run": str(tmp_path / "run")}
    config = resolve("visual", None, options)
    job = train_job(config, None, options, RESOURCES)
    assert f"--train.deepspeed={tmp_path}/run/slurm/deepspeed.json" in job.text()
    write_jobs([job])
    (tmp_path / "my.json").write_text('{"changed": 1}')
    assert json.loads((tmp_path / "run" / "slurm" / "deepspeed.json").read_text()) == {}


def test_a_run_that_a_process_uses_is_not_submitted(tmp_path: Path) -> None:
    with locked(tmp_path / "run" / ".lock", "run", ""):
        done = flallm("submit", "--stage=visual", f"--run={tmp_path}/run")
    assert done.returncode == 2
    assert f"Run folder {tmp_path}/run is in use by process" in done.stderr


def test_the_queue_is_asked_for_jobs_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for squeue; tests/slurm asks a real one."""
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 12 RUNNING\necho 14 PENDING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "run" / "slurm" / SUBMITTED
    path.parent.mkdir(parents=True)
    path.write_text("[11, 13]")
    check_not_queued([tmp_path / "run", tmp_path / "other"])
    path.write_text("[13, 14]")
    with pytest.raises(UserError, match=r"in use by SLURM job 14 \(pending\)\. Wait"):
        check_not_queued([tmp_path / "run"])
    squeue.write_text("#!/bin/sh\necho no controller >&2; exit 1\n")
    with pytest.raises(UserError, match=r"Cannot run `squeue .*`: no controller\. Check"):
        check_not_queued([tmp_path / "run"])
