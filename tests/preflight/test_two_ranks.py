"""The preflight and the doctor on two ranks under the deepspeed launcher."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.helpers.launching import launch
from tests.helpers.paths import RANKS


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> tuple[Path, str]:
    """The folder with the sentence of each case and rank, and the output."""
    out = tmp_path_factory.mktemp("cases")
    for rank in range(2):
        folder = out / f"machine-{rank}" / "shards"
        folder.mkdir(parents=True)
        shutil.copy(tiny_corpus / "shards" / "index.json", folder)
    # The second machine has a shard of other bytes.
    path = out / "machine-1" / "shards" / "index.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    done = launch(RANKS / "preflight.py", f"--out={out}")
    assert done.returncode == 0, done.stdout[-6000:]
    return out, done.stdout


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("versions", "has deepspeed 0.18.0, rank 0 on HOST has "),
        ("code", "runs other code of flallm_ds than rank 0 on HOST"),
        ("run", "/.preflight-"),
        ("shards", "does not see the same shards shards as rank 0 on HOST (the finger"),
    ],
)
def test_a_difference_of_one_machine_is_refused_by_all_ranks(
    cases: tuple[Path, str], case: str, sentence: str
) -> None:
    for rank in range(2):
        said = (cases[0] / f"{case}.rank-{rank}").read_text()
        host = socket.gethostname()
        assert said.startswith(f"Cannot start on these machines: rank 1 on {host} ")
        assert sentence.replace("HOST", host) in said


def test_equal_machines_start_and_leave_no_files(cases: tuple[Path, str]) -> None:
    out, _ = cases
    for rank in range(2):
        assert (out / f"equal.rank-{rank}").read_text() == ""
    assert not list(out.rglob(".preflight-*")) and not (out / "new").exists()


def test_a_warning_is_printed_once_and_does_not_end_the_start(
    cases: tuple[Path, str],
) -> None:
    out, output = cases
    assert (out / "clocks.rank-1").read_text() == ""
    assert output.count("warning: the clock of rank 1 on") == 1
    assert " is 60 s ahead of that of rank 0 on " in output


def test_the_doctor_prints_one_table_and_measures_the_network(
    cases: tuple[Path, str],
) -> None:
    words = [line.split() for line in cases[1].splitlines()]
    checks = [" ".join(line[:3]) for line in words]
    for check in ("versions ok python", "devices ok 2", "run folder ok"):
        assert checks.count(check) == 1
    network = [
        line for line in words if line[:4] == ["all-reduce", "within", "a", "machine"]
    ]
    assert len(network) == 1 and network[0][4] in ("ok", "warning")
    assert float(network[0][5]) > 0
