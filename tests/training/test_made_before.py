"""Shards and exports of an earlier version are still read; checkpoints are refused."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from flallm_ds.cli.evaluate import evaluate
from flallm_ds.sharding.verify import verify
from tests.helpers.launching import environment
from tests.helpers.paths import ROOT

STAGES = ("joint", "llm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made_before")
    with tarfile.open(ROOT / "tests" / "made_before" / "first_layout.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_shards_verify(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    verify(Path("shards"), workers=1)


@pytest.mark.parametrize("stage", STAGES)
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


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_of_the_first_format_are_refused(made: Path, stage: str) -> None:
    """BREAKING in the changelog: they do not fit another number of ranks."""
    run = made / f"run_{stage}"
    starts = json.loads((run / "versions.json").read_text(encoding="utf-8"))["starts"]
    words = starts[0]["command"][1:]
    words = [word for word in words if not word.startswith("--train.max_steps")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *words],
        cwd=made,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout[-4000:]
    assert (
        "was written by version 0.1 of flallm_ds. Resume with that version" in done.stdout
    )
