"""Ways to save memory change no number, under ZeRO-3 on two ranks. memory_ranks.py runs them, in one launch.

Ranks have unequal numbers of clips and of target tokens, down to one clip of one frame, one token, and none.
"""

import json
from pathlib import Path

import pytest
from launching import launch
from memory_ranks import CASES, STEPS
from safetensors.torch import load_file

PAIRS = [(plain, saving) for plain, saving in zip([*CASES][::2], [*CASES][1::2], strict=True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory")
    done = launch(Path(__file__).with_name("memory_ranks.py"), f"--out={out}")
    assert done.returncode == 0, done.stdout[-6000:]
    return out


@pytest.mark.parametrize(("plain", "saving"), PAIRS)
def test_saving_memory_changes_no_loss_and_no_parameter(results: Path, plain: str, saving: str) -> None:
    for rank in (0, 1):
        losses = json.loads((results / f"losses-{rank}.json").read_text())
        assert losses[saving] == pytest.approx(losses[plain], rel=1e-5, abs=1e-5)
        assert len(losses[plain]) == STEPS and min(losses[plain]) == 0 < max(losses[plain])
    names = list(CASES)
    first, second = (load_file(results / f"{names.index(name)}.safetensors") for name in (plain, saving))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # AdamW's first steps are as long as the rate whatever the gradient, so noise shows where that is 0.
        far = (tensor.double() - second[name].double()).abs()
        assert far.mean() < 2e-6 and far.max() < 2e-3, name
