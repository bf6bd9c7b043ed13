"""Shards, checkpoints and exports that an earlier version made are still read."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from flallm_ds.cli.evaluate import evaluate
from flallm_ds.sharding.verify import verify
from tests.helpers.launching import environment, losses
from tests.helpers.paths import ROOT

LAST_LOSS = {"joint": 1.824872, "llm": 1.821694}  # of the runs that were not stopped


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made_before")
    with tarfile.open(ROOT / "tests" / "made_before" / "first_layout.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_shards_verify(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    verify(Path("shards"), workers=1)


@pytest.mark.parametrize("stage", LAST_LOSS)
def test_exports_give_the_same_hypotheses(
    made: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    run = Path(f"run_{stage}")
    evaluate(run=str(run), split="dev", beams=1)
    lines = (
        (run / "evaluation" / "dev.hypotheses.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    found = {record["key"]: record["hypothesis"] for record in map(json.loads, lines)}
    best = json.loads((run / "best" / "flallm.json").read_text(encoding="utf-8"))["scores"][
        "epoch"
    ]
    lines = (run / "hypotheses.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["epoch"] == best]
    assert found == {record["key"]: record["hypothesis"] for record in records} != {}


@pytest.mark.parametrize("stage", LAST_LOSS)
def test_checkpoints_resume(made: Path, stage: str) -> None:
    """To the loss of the step after them, which depends on weights, dropout and data alike."""
    run = made / f"run_{stage}"
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    command = json.loads((run / "versions.json").read_text(encoding="utf-8"))["starts"][0][
        "command"
    ]
    assert config["stage"] == stage
    words = [word for word in command[1:] if not word.startswith("--train.max_steps")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *words],
        cwd=made,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "resumed at epoch 39, step 1" in done.stdout
    assert losses(run)[-1] == pytest.approx(LAST_LOSS[stage], rel=1e-4)
