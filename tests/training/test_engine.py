"""The engine on two ranks under every ZeRO, on a CPU. The cases run in engine_ranks.py,
in one launch."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.helpers.launching import launch
from tests.helpers.paths import RANKS

TUNINGS = ("full", "pattern", "lora", "dora", "frozen", "lora_and_pattern")
RESUMED = (
    "mbart/lora/zero2",
    "mbart/dora/zero3",
    "llama/lora_and_pattern/zero3_offload",
)
ZEROS = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case returned; the same on both ranks."""
    out = tmp_path_factory.mktemp("engine")
    done = launch(RANKS / "engine.py", f"--out={out}")
    assert done.returncode == 0, done.stdout[-6000:]
    first, second = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    # nan is nan
    differing = [name for name in first if str(first[name]) != str(second[name])]
    assert not differing
    return {"out": out, **first}


@pytest.mark.parametrize("zero", ZEROS)
def test_gradient_norms_of_groups_are_those_of_plain_pytorch(
    results: dict[str, Any], zero: str
) -> None:
    """Two micro-batches on two ranks against all four in one process; one weight is
    frozen; clipping on."""
    steps = results[f"grad_norms/{zero}"]
    for step in steps:
        assert step["norms"] == pytest.approx(step["expected"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(step["norms"]["all"], rel=1e-5)
    assert steps[0]["norms"]["last"] != pytest.approx(steps[1]["norms"]["last"], rel=1e-2)


@pytest.mark.parametrize("zero", ZEROS)
def test_a_gradient_that_is_not_finite_moves_nothing_on_any_rank(
    results: dict[str, Any], zero: str
) -> None:
    found = results[f"not_finite/{zero}"]
    assert found["stuck"] == [False, True] and found["same"]
    assert found["finite"] == [True, False], (
        "an optimizer's moment that is not finite must be seen"
    )


def losses(results: dict[str, Any], case: str) -> list[float]:
    return list(results[f"tuned/{case}"]["losses"])


@pytest.mark.parametrize("how", TUNINGS)
def test_an_llm_that_zero3_loaded_in_parts_is_tuned_as_a_whole_one(
    results: dict[str, Any], how: str
) -> None:
    """Dropout is on, also that of the low-rank layers."""
    np.testing.assert_allclose(
        losses(results, f"mbart/{how}/zero3"),
        losses(results, f"mbart/{how}/zero2"),
        rtol=1e-6,
    )


def test_low_rank_layers_give_the_same_losses_with_offload_and_in_a_decoder_only_llm(
    results: dict[str, Any],
) -> None:
    for one, other in (
        ("mbart/lora/zero3_offload", "mbart/lora/zero2"),
        ("llama/lora/zero3", "llama/lora/zero2"),
    ):
        np.testing.assert_allclose(losses(results, one), losses(results, other), rtol=1e-6)


@pytest.mark.parametrize("how", TUNINGS)
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_what_is_trained_moves_and_what_is_frozen_stays_to_the_bit(
    results: dict[str, Any], how: str, zero: str
) -> None:
    found = results[f"tuned/mbart/{how}/{zero}"]
    assert found["losses"][-1] < found["losses"][0]
    assert found["changed"] == found["trained"]
    assert "adapter.weight" in found["trained"]
    assert (found["num_frozen"] > 0) == (how != "full")
    assert (found["num_trained"] == 2) == (how == "frozen")


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_with_frozen_parameters_is_resumed_with_the_same_losses(
    results: dict[str, Any], case: str
) -> None:
    found = results[f"resumed/{case}"]
    assert found["resumed"] == found["whole"][2:]
    assert found["whole"][2] != found["whole"][0]


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_leaves_frozen_parameters_out_and_refuses_others(
    results: dict[str, Any], case: str
) -> None:
    found = results[f"resumed/{case}"]
    assert "was saved with other frozen parameters. Use the" in found["another_base"]
    assert "\n" not in found["another_base"]
    stored = set()
    for file in (results["out"] / "saved" / case).glob("step-*/rank-*.safetensors"):
        with safe_open(file, framework="np") as opened:
            stored |= {name.split("|")[1] for name in opened.keys()}  # noqa: SIM118
    assert stored == set(found["trained"]) | set(found["buffers"])


@pytest.mark.parametrize("how", ["lora", "frozen"])
def test_what_is_made_after_zero_init_takes_its_precision(
    results: dict[str, Any], how: str
) -> None:
    """In bf16; DeepSpeed would fail on fp32 adapters in the same model."""
    found = results[f"bf16/{how}"]
    assert found["dtypes"] == ["torch.bfloat16"]
    np.testing.assert_allclose(
        found["losses"], losses(results, f"mbart/{how}/zero3"), rtol=2e-3
    )


def test_groups_that_deepspeed_makes_have_the_timeout_of_ours(
    results: dict[str, Any],
) -> None:
    """They would have torch's default of 30 minutes, and of 10 with nccl."""
    assert len(results["timeouts"]) > 1
    assert set(results["timeouts"]) == {20.0}


PRECISIONS = (
    "bf16/zero1",
    "bf16/zero2",
    "bf16/zero3_offload",
    "bf16_states/zero2",
    "bf16_states/zero3",
    "fp16/zero2",
    "fp16/zero3",
)


@pytest.mark.parametrize("case", PRECISIONS)
def test_a_run_in_low_precision_is_resumed_with_the_same_losses(
    results: dict[str, Any], case: str
) -> None:
    """The master weights are fp32, unless the states are bf16; an fp16 run resumes with its
    loss scale."""
    found = results[f"precise/{case}"]
    assert found["resumed"] == found["whole"]
    assert found["scales"][0] == found["scales"][1]
    precision = case.split("/")[0]
    states = "bfloat16" if precision == "bf16_states" else "float32"
    kinds = ("exp_avg", "exp_avg_sq", "master")
    assert found["dtypes"] == [f"{kind} torch.{states}" for kind in kinds]
    assert found["state"]["precision"] == precision.removesuffix("_states")
    if precision == "fp16":
        numbers = found["state"]["numbers"]
        assert numbers["scaler.cur_scale"] < 2**18
        assert 0 < numbers["state.step"] < 6 and numbers["skipped_steps"] > 0
