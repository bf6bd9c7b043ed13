"""The engine on two ranks under every ZeRO, on a CPU. The cases run in engine_ranks.py, in one launch."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch

ZEROS = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case returned; the same on both ranks."""
    out = tmp_path_factory.mktemp("engine")
    done = launch(Path(__file__).with_name("engine_ranks.py"), f"--out={out}")
    assert done.returncode == 0, done.stdout[-6000:]
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    differing = [name for name in first if str(first[name]) != str(second[name])]  # nan is nan
    assert not differing
    return dict(first)


@pytest.mark.parametrize("zero", ZEROS)
def test_gradient_norms_of_groups_are_those_of_plain_pytorch(results: dict[str, Any], zero: str) -> None:
    """Two micro-batches on two ranks against all four in one process; one weight is frozen; clipping is on."""
    steps = results[f"grad_norms/{zero}"]
    for step in steps:
        assert step["norms"] == pytest.approx(step["expected"], rel=1e-5)
        if zero != "none":
            assert step["grad_norm"] == pytest.approx(step["norms"]["all"], rel=1e-5)
    assert steps[0]["norms"]["last"] != pytest.approx(steps[1]["norms"]["last"], rel=1e-2)
