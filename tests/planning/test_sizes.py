"""Parameters and activations, counted on the meta device."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import LlmOptions
from flallm_ds.models.llm.tuning import Tuning
from flallm_ds.planning.sizes import (
    FEATURE_WIDTH,
    build_on_meta,
    config_of,
    gathered_modules,
    saved_bytes,
    size_of,
    trimmed,
)

FP32 = LlmOptions(dropout=0.1, attention_dropout=0.0, bits=32)


def tiny(kind: str) -> Any:
    if kind == "mbart":
        return AutoConfig.for_model(
            "mbart",
            vocab_size=100,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        )
    if kind == "mt5":
        return AutoConfig.for_model(
            "mt5", vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        )
    return AutoConfig.for_model(
        kind,
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.611), ("7B", 6.74), ("8b", 8.03), ("70B", 70.6), ("0.5B", 0.494)],
)
def test_a_size_has_the_parameters_of_its_models(name: str, billions: float) -> None:
    llm, adapter = build_on_meta(config_of(name), FP32, Tuning())
    adapters = sum(p.numel() for p in adapter.parameters())
    size = size_of(llm, adapter)
    assert (size.trained - adapters) / 1e9 == pytest.approx(billions, rel=0.005)
    assert size.frozen == 0 and size.decoder_only == (name != "0.6B")


def test_an_unknown_size_is_an_error_that_lists_the_sizes() -> None:
    with pytest.raises(UserError, match=r"--llm must be .*0\.6B, 0\.5B, .*, got '9B'\."):
        config_of("9B")


def test_lora_trains_the_adapters_alone() -> None:
    llm, adapter = build_on_meta(tiny("llama"), FP32, Tuning("lora", rank=2))
    size = size_of(llm, adapter)
    # The adapter of 2 layers: q, k, v, o, and the gate, up and down projections.
    attention = 2 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    feed_forward = 2 * ((32 + 48) + (32 + 48) + (48 + 32))
    llm_adapter = FEATURE_WIDTH * 32 + 32 + 32 * 32 + 32
    assert size.trained == 2 * (attention + feed_forward) + llm_adapter
    assert size.head == 0 and size.largest_trained == FEATURE_WIDTH * 32
    # Without the embedding and the head of 100 rows, and five norms.
    assert size.linear == size.frozen - 2 * 100 * 32 - 5 * 32
    full = size_of(*build_on_meta(tiny("llama"), FP32, Tuning()))
    assert size.frozen == full.trained - llm_adapter


@pytest.mark.parametrize(
    # mBART uses one matrix for its input and its output.
    ("kind", "num_matrices"),
    [("llama", 2), ("mbart", 1)],
)
def test_a_trimmed_vocabulary_has_fewer_rows(kind: str, num_matrices: int) -> None:
    full = size_of(*build_on_meta(tiny(kind), FP32, Tuning()))
    small = size_of(*build_on_meta(tiny(kind), FP32, Tuning(), vocab_size=40))
    assert full.trained - small.trained == num_matrices * 60 * 32
    assert small.vocab_size == 40


def test_a_padding_id_stays_within_a_trimmed_vocabulary() -> None:
    config = tiny("llama")
    config.pad_token_id = 99
    assert trimmed(config, 40).pad_token_id == 39
    assert config.pad_token_id == 99 and trimmed(config, None).pad_token_id == 99


def test_the_outermost_layers_are_gathered_as_one() -> None:
    llm, adapter = build_on_meta(tiny("mbart"), FP32, Tuning())
    kinds = [type(module).__name__ for module in gathered_modules(llm)]
    # Not MBartAttention, which is within a layer.
    assert kinds == ["MBartEncoderLayer"] * 2 + ["MBartDecoderLayer"] * 2
    assert size_of(llm, adapter).layers == 4


@pytest.mark.parametrize("how", ["full", "lora"])
@pytest.mark.parametrize("kind", ["mbart", "mt5", "llama", "qwen3", "gemma2"])
def test_activations_are_those_that_autograd_saves(kind: str, how: Any) -> None:
    """The same forward pass on real tensors saves as many bytes as on the meta device."""
    llm, adapter = build_on_meta(tiny(kind), FP32, Tuning(how, rank=2))
    planned = saved_bytes(llm, adapter, 2, 7, 5)

    llm.to_empty(device="cpu")
    adapter.to_empty(device="cpu")
    for parameter in [*llm.parameters(), *adapter.parameters()]:
        parameter.data.zero_()
    real = saved_bytes(llm, adapter, 2, 7, 5, device="cpu")
    assert planned == pytest.approx(real, rel=0.15)
    assert saved_bytes(llm, adapter, 4, 7, 5, device="cpu") == pytest.approx(2 * real, 0.1)
    assert torch.get_default_device().type == "cpu"
