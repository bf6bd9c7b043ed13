"""`flallm average`: what it chooses and refuses. tests/training/test_averaging.py has the
weights."""

import json
from pathlib import Path

import pytest

from flallm_ds.cli.average import _chosen, average
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve

STEPS = [5, 7, 10, 15]
# BLEU-4 and chrF of the scored steps, some without a checkpoint by now.
SCORES = {2: (9.0, 9.0), 5: (3.0, 20.0), 10: (3.0, 21.0), 15: (3.0, 20.0)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with four checkpoints, of which three were scored."""
    run = tmp_path / "run"
    run.mkdir()
    config = resolve("visual", None, {"run": str(run)})
    (run / "config.json").write_text(config.to_json(), encoding="utf-8")
    lines = []
    for step, (bleu4, chrf) in SCORES.items():
        lines.append({"kind": "train", "global_step": step, "loss": 1.0})
        scores = {"bleu4": bleu4, "chrf": chrf}
        lines.append({"kind": "dev", "global_step": step, **scores})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    for step in STEPS:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    return run


@pytest.mark.parametrize(
    ("last", "best", "steps", "expected"),
    [
        (None, None, (), STEPS),
        (2, None, (), [10, 15]),
        (None, 2, (), [5, 10]),  # of equal scores the earlier one, as best/ is chosen
        (None, 3, (), [5, 10, 15]),
        (None, None, (15, 7), [7, 15]),
    ],
)
def test_the_checkpoints_are_chosen(
    run: Path,
    last: int | None,
    best: int | None,
    steps: tuple[int, ...],
    expected: list[int],
) -> None:
    assert _chosen(run, "dev", STEPS, last, best, steps) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"last": 0}, r"--last must be at least 2, got 0\. flallm checkpoints export "),
        ({"best": 1}, r"--best must be at least 2, got 1\."),
        ({"last": 5}, r"--last must be at most the number of checkpoints of .*run \(4\), "),
        ({"best": 4}, r"--best must be .* that were scored on dev \(3\), got 4\. A run "),
        ({"last": 2, "best": 2}, r"must be chosen by one of .*, got --last and --best\."),
        ({"steps": (5,)}, r"--steps must be at least two different steps, got 5\."),
        ({"steps": (5, 5)}, r"--steps must be at least two different steps, got 5, 5\."),
        ({"steps": (5, 6)}, r"those of checkpoints of .* \(5, 7, 10, 15\), got 6\. A run "),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    run: Path, tmp_path: Path, given: dict[str, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        average(run, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_too_few_checkpoints_are_refused_with_the_option_that_keeps_more(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"a higher --train\.keep_checkpoints"):
        average(run, out=tmp_path / "out", best=9)
    for step in STEPS[1:]:
        (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"Cannot average the checkpoints of .*: it has one"
    ):
        average(run, out=tmp_path / "out")


def test_a_run_without_checkpoints_and_a_folder_in_use_are_refused(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--out must be a new or an empty folder"):
        average(run, out=run)
    for step in STEPS:
        (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"Cannot find a checkpoint in .*run: "):
        average(run, out=tmp_path / "out", last=2)
