"""LLMs under ZeRO-3 on two ranks are loaded in parts. llm_loading_ranks.py does it, in
one launch."""

import json
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.launching import launch
from tests.helpers.llms import make_tiny_llm
from tests.helpers.paths import RANKS
from tests.models.llm.test_multimodal import make as make_multimodal
from tests.models.llm.test_quantized import fp8, mxfp4

# mt5's head is its own
FAMILIES = ("mbart", "m2m100", "t5", "mt5", "qwen3", "gemma3", "bloom", "xglm")
# Whole, as by --llm.trim_vocabulary=false: weights with scales, and a text model within a
# multimodal one.
OTHERS = ("fp8", "mxfp4", "mistral3")
LARGE = LlamaConfig(
    vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8,
    num_key_value_heads=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's report, and the bytes of the large LLM in fp32."""
    folder = tmp_path_factory.mktemp("loading")
    for family in FAMILIES:
        make_tiny_llm(
            family, folder / "llms" / family, ["regen am abend", "morgen sonne und wind"]
        )
    llama = make_tiny_llm(
        "llama3", folder / "llama", ["regen am abend", "morgen sonne und wind"]
    )
    fp8(llama, folder / "llms" / "fp8", (16, 16))
    mxfp4(llama, folder / "llms" / "mxfp4")
    make_multimodal("mistral3", llama, folder / "llms" / "mistral3")
    large = LlamaForCausalLM(LARGE)
    large.save_pretrained(folder / "large", max_shard_size="50MB")
    done = launch(RANKS / "llm_loading.py", f"--folder={folder}")
    assert done.returncode == 0, done.stdout[-6000:]
    megabytes = sum(p.numel() for p in large.parameters()) * 4 / 1e6
    return [
        {"megabytes": megabytes} | json.loads((folder / f"rank{r}.json").read_text())
        for r in (0, 1)
    ]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_an_llm_loaded_in_parts_is_the_one_loaded_whole(
    results: list[dict[str, Any]], family: str
) -> None:
    for report in results:
        assert report[family] == {
            "numel": 0,
            "equal": True,
            "generation": True,
            "config": True,
        }


def test_random_weights_are_the_same_on_both_ranks(results: list[dict[str, Any]]) -> None:
    first, second = results
    assert first["drawn"] == second["drawn"] and len(set(first["drawn"].values())) > 5
    assert first["next_draw"] == second["next_draw"]


def test_a_bf16_engine_gets_bf16_parameters(results: list[dict[str, Any]]) -> None:
    assert all(report["bf16"] == ["torch.bfloat16"] for report in results)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("bf16", 0.5)])
def test_no_rank_holds_more_than_its_part_and_a_few_tensors(
    results: list[dict[str, Any]], precision: str, share: float
) -> None:
    """Resident memory, pages of mapped files among it. The largest tensor takes 4 MB."""
    for report in results:
        part = share * report["megabytes"] / 2
        assert 0.9 * part < report["highest_mb"][precision] < part + 20 < 1.5 * part
