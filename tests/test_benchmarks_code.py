"""loss_compare and code_measures on small inputs; that losses are equal to the bit is for
people to run."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.code_measures import cycles, measures, read
from benchmarks.loss_compare import checkout, compare
from flallm_ds.errors import UserError


def record(step: int, loss: float) -> dict[str, Any]:
    return {
        "stage": "llm",
        "kind": "train",
        "global_step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 0.1,
    }


def test_the_first_number_that_differs_is_named() -> None:
    first = [record(1, 2.5), record(2, 1.25)]
    compare(first, [dict(one) for one in first], "a", "b")
    with pytest.raises(
        UserError, match=r"loss at stage llm, step 2 is 1\.25 \(a\) and 1\.2500000000000002"
    ):
        compare(first, [first[0], record(2, 1.2500000000000002)], "a", "b")
    with pytest.raises(
        UserError, match=r"global_step at stage llm, step 2 is 2 \(a\) and 3 \(b\)"
    ):
        compare(first, [first[0], record(3, 1.25)], "a", "b")
    with pytest.raises(UserError, match=r"a wrote 2 records, but b wrote 1"):
        compare(first, first[:1], "a", "b")


def test_a_commit_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="must be commits of this repository, got 'no-such-commit'"
    ):
        checkout("no-such-commit", tmp_path / "tree")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_a_tree_is_measured(tmp_path: Path) -> None:
    wide = f"x = '{'-' * 90}'\n"
    write(
        tmp_path,
        {
            "flallm_ds/config.py": "class RunConfig:\n    run: str\n    data: DataConfig\n",
            "flallm_ds/a.py": "from flallm_ds.b import B\n" + wide,
            "flallm_ds/b.py": "def f(some):\n    from flallm_ds import a\n\n    return [v for v in some]\n",
            "launch/train.py": "import os\n",
            "shards/build.py": "import os\n",
            "tests/test_a.py": "x = 1\n" * 22,
        },
    )
    sources = list(read(tmp_path, "flallm_ds"))
    assert cycles(sources) == [["flallm_ds.a", "flallm_ds.b"]]
    found = measures(tmp_path)
    assert found["lines of the product"] == "11" and found["files"] == "5"
    assert found["largest file"] == "4 (flallm_ds/b.py)"
    assert found["longest function"] == "4 (flallm_ds/b.py:f)"
    assert (found["import cycles"], found["imports inside functions"]) == ("1", "1")
    assert found["lines over 90 columns"] == "9.1 %"
    assert found["comprehensions per 1,000 lines"] == "90.9"
    assert found["options of a training run"] == "1"
    assert found["lines of tests / lines of the product"] == "2.00"
