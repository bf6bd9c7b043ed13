"""Test the attention from words to visual tokens, where its value is known: uniform."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import DECODER_ONLY_PROMPT, Instruction, Wording
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.attention import visual_attention
from flallm_ds.models.light_translator import build_light_translator
from flallm_ds.models.llm.load import embedding_scale, llm_width, load_llm
from flallm_ds.models.sign_translator import SignTranslator
from tests.helpers.llms import make_tiny_llm

WIDTH, NUM_FRAMES = 12, 6


def translator_of(llm: torch.nn.Module, codec: TextCodec) -> SignTranslator:
    adapter = Adapter(WIDTH, llm.get_input_embeddings().embedding_dim)
    return SignTranslator(None, adapter, llm, codec).eval()


def make_uniform(llm: torch.nn.Module) -> None:
    """Queries of zero: each position attends equally to all positions that it sees."""
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if ".q_proj." in name:
                parameter.zero_()


def test_cross_attention_covers_the_frames_without_the_prompt(codec: TextCodec) -> None:
    llm = build_light_translator("small", codec, dropout=0.0)
    make_uniform(llm)
    model = translator_of(llm, codec)
    start = codec.for_light_t().wording("de").start
    wording = Wording(before=(4,), after=(5, 6), start=start)
    ids = codec.encode("regen sonne")
    attention_LS = visual_attention(model, torch.randn(NUM_FRAMES, WIDTH), wording, ids)
    expected = torch.full((len(ids), NUM_FRAMES), 1 / (NUM_FRAMES + 3))
    torch.testing.assert_close(attention_LS, expected)
    assert llm.config._attn_implementation == "sdpa"  # as before


def test_self_attention_is_that_of_the_position_that_predicts_a_token(
    codec: TextCodec,
) -> None:
    config = LlamaConfig(
        vocab_size=codec.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    llm = LlamaForCausalLM(config)
    make_uniform(llm)
    wording = Wording(before=(4, 5), after=(6,))
    ids = codec.encode("regen sonne")
    attention_LS = visual_attention(
        translator_of(llm, codec), torch.randn(NUM_FRAMES, WIDTH), wording, ids
    )
    # The first token is predicted by the last position of the prompt.
    seen_L = 2 + NUM_FRAMES + 1 + torch.arange(len(ids))
    expected = (1 / seen_L)[:, None].expand(-1, NUM_FRAMES)
    torch.testing.assert_close(attention_LS, expected)


def test_a_state_space_model_has_no_attention(codec: TextCodec) -> None:
    config = MambaConfig(
        vocab_size=codec.vocab_size, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    model = translator_of(MambaForCausalLM(config), codec)
    features_SD = torch.randn(NUM_FRAMES, WIDTH)
    assert visual_attention(model, features_SD, Wording(), codec.encode("regen")) is None


@pytest.mark.parametrize("family", ["m2m100", "flan_t5", "bloom", "gemma3", "cohere2"])
def test_attention_of_each_kind_of_llm(family: str, tmp_path: Path) -> None:
    prompt = DECODER_ONLY_PROMPT.format(
        sign_language="German Sign Language", language="German", video=""
    )
    texts = ["regen sonne wind morgen", prompt]
    folder = make_tiny_llm(family, tmp_path / family, texts)
    llm = load_llm(str(folder))
    instruction = Instruction(
        decoder_only=not llm.config.is_encoder_decoder,
        start_token=getattr(llm.config, "decoder_start_token_id", None),
        languages=("de",),
    )
    codec = TextCodec.for_training_text(str(folder), instruction, texts, trim=False)
    adapter = Adapter(WIDTH, llm_width(llm), embedding_scale(llm))
    model = SignTranslator(None, adapter, llm, codec).eval()
    ids = codec.encode(texts[0])
    attention_LS = visual_attention(
        model, torch.randn(NUM_FRAMES, WIDTH), codec.wording("de"), ids
    )
    assert attention_LS is not None and attention_LS.shape == (len(ids), NUM_FRAMES)
    assert attention_LS.min() >= 0 and attention_LS.sum(1).max() < 1 + 1e-5
