"""Light-T: its sizes, its embeddings and its config."""

from types import SimpleNamespace

import pytest
import torch

from flallm_ds.models.light_translator import (
    SIZES,
    build_light_translator,
    light_translator_from_config,
)
from tests.helpers.tensors import num_parameters


def vocabulary(size: int) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=size, pad_id=1, eos_id=2)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("tiny", 3.61), ("small", 18.25), ("base", 25.61), ("large", 124.66)],
)
def test_sizes_have_the_papers_parameters(size, millions):
    """FLa-LLM, Table 7, at a vocabulary of about 2,430."""
    with torch.device("meta"):
        model = build_light_translator(size, vocabulary(2430), dropout=0.1)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, rel=0.01)


def test_there_is_one_word_embedding_and_an_untied_head():
    model = build_light_translator("tiny", vocabulary(100), dropout=0.1)
    assert (
        model.model.encoder.embed_tokens
        is model.model.decoder.embed_tokens
        is model.model.shared
    )
    assert model.lm_head.weight is not model.model.shared.weight
    assert model.lm_head.weight.shape == model.model.shared.weight.shape == (100, 256)


def test_the_config_has_the_ids_of_the_codec(codec):
    config = build_light_translator("tiny", codec, dropout=0.25).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (
        codec.vocab_size, codec.pad_id, codec.eos_id, codec.eos_id,
    )  # fmt: skip
    assert config.dropout == config.attention_dropout == 0.25


def test_the_config_builds_the_same_architecture_again():
    with torch.device("meta"):
        for size in SIZES:
            model = build_light_translator(size, vocabulary(50), dropout=0.0)
            again = light_translator_from_config(model.config)
            pairs = zip(model.named_parameters(), again.named_parameters(), strict=True)
            for (name, parameter), (other_name, other) in pairs:
                assert name == other_name and parameter.shape == other.shape
