"""Trimming the vocabulary of LLMs of each family, and restoring it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
)
from transformers.utils import is_bitsandbytes_available

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.llm.load import LlmOptions, embedding_scale, llm_width, load_llm
from flallm_ds.models.llm.source import llm_config
from flallm_ds.models.llm.trim import trim_llm, untrim_llm
from flallm_ds.models.sign_translator import Beam, SignTranslator
from tests.helpers.llms import make_tiny_llm
from tests.helpers.tensors import num_parameters
from tests.models.llm.test_load import SPOKEN, codec_of, logits_LV


@pytest.fixture(scope="module")
def trimmed(tiny_corpus, codec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed")
    trim_llm(str(tiny_corpus / "llm"), codec, folder)
    return folder


def logits_of(model, memory_BSE, decoder_ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            inputs_embeds=memory_BSE, decoder_input_ids=torch.tensor([decoder_ids])
        ).logits[0]


def test_a_trimmed_model_gives_the_same_logits_for_kept_tokens(tiny_corpus, codec, trimmed):
    whole, small = load_llm(str(tiny_corpus / "llm")), load_llm(str(trimmed))
    assert small.config.vocab_size == codec.vocab_size < whole.config.vocab_size
    ids = [codec.wording().start[0], *codec.encode("regen sonne wind morgen")]
    memory_BSE = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    expected = logits_of(whole, memory_BSE, codec.kept_ids[ids].tolist())[:, codec.kept_ids]
    assert torch.allclose(logits_of(small, memory_BSE, ids), expected, atol=1e-4)
    assert expected.std() > 0.1


def test_a_trimmed_encoder_gives_the_same_states_for_kept_tokens(
    tiny_corpus, codec, trimmed
):
    whole, small = load_llm(str(tiny_corpus / "llm")).eval(), load_llm(str(trimmed)).eval()
    ids = codec.encode("wolken wind")
    with torch.no_grad():
        expected = whole.get_encoder()(
            torch.tensor([codec.kept_ids[ids].tolist()])
        ).last_hidden_state
        assert torch.allclose(
            small.get_encoder()(torch.tensor([ids])).last_hidden_state, expected, atol=1e-5
        )


def test_tied_embeddings_stay_tied(trimmed):
    model = AutoModelForSeq2SeqLM.from_pretrained(trimmed)
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert (
        head
        is model.model.decoder.embed_tokens.weight
        is model.model.encoder.embed_tokens.weight
    )


def test_a_head_that_is_not_tied_is_trimmed_as_well(codec, tmp_path):
    """The config of mT5 says that its head is tied, but it is not."""
    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=len(codec.tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    llm = MT5ForConditionalGeneration(config)
    llm.lm_head.weight = torch.nn.Parameter(torch.randn(len(codec.tokenizer), 16))
    llm.save_pretrained(tmp_path / "llm")
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    whole, small = load_llm(str(tmp_path / "llm")), load_llm(str(tmp_path / "trimmed"))
    assert small.lm_head.weight is not small.shared.weight
    ids = [codec.wording().start[0], *codec.encode("regen sonne")]
    memory_BSE = torch.randn(1, 6, 16)
    expected = logits_of(whole, memory_BSE, codec.kept_ids[ids].tolist())[:, codec.kept_ids]
    assert torch.allclose(logits_of(small, memory_BSE, ids), expected, atol=1e-5)


def test_the_special_tokens_of_a_trimmed_model_are_those_of_the_codec(trimmed, codec):
    model = load_llm(str(trimmed))
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == codec.pad_id and config.eos_token_id == codec.eos_id
        assert config.decoder_start_token_id == codec.wording().start[0]
        assert not getattr(config, "forced_eos_token_id", None)
        for name, value in config.to_dict().items():
            if name.endswith("_token_id") and isinstance(value, int):
                assert value < codec.vocab_size, name


def test_a_trimmed_folder_holds_its_codec(trimmed, codec):
    assert TextCodec.load(trimmed).kept_ids.tolist() == codec.kept_ids.tolist()


def test_a_forced_first_token_is_removed(tiny_corpus, codec, tmp_path):
    """mBART-50 and NLLB force the language after the start token, by its untrimmed id."""
    llm = AutoModelForSeq2SeqLM.from_pretrained(tiny_corpus / "llm")
    llm.generation_config.forced_bos_token_id = llm.config.vocab_size - 1
    llm.save_pretrained(tmp_path / "llm")
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    small = load_llm(str(tmp_path / "trimmed"))
    translator = SignTranslator(None, Adapter(8, 64), small, codec).eval()
    beam = Beam(num_beams=2, max_new_tokens=5)
    ((best, *_),) = translator.generate(
        torch.randn(4, 8), torch.tensor([4]), [codec.wording()], beam
    )
    assert best.ids and max(best.ids) < codec.vocab_size


# --- all families


FAMILIES = (
    "mbart", "mbart50", "m2m100", "nllb", "t5", "flan_t5", "mt5", "madlad",
    "qwen3", "llama3", "gemma2", "gemma3", "mistral", "bloom", "xglm", "cohere",
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[Path, Path, TextCodec]:
    """(folder of a tiny LLM, folder of the trimmed LLM, codec)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_llm(request.param, folder / "llm", SPOKEN)
    codec = codec_of(folder / "llm")
    trim_llm(str(folder / "llm"), codec, folder / "trimmed")
    return folder / "llm", folder / "trimmed", codec


def test_each_trimmed_family_gives_the_same_logits_for_kept_tokens(family):
    whole, small, codec = family
    expected = logits_LV(whole, codec, codec.kept_ids)
    found = logits_LV(small, codec, range(codec.vocab_size))
    kept = codec.kept_ids[codec.kept_ids < expected.shape[1]]
    assert found.shape[1] == len(kept) < expected.shape[1]
    assert torch.allclose(found, expected[:, torch.from_numpy(kept)], atol=1e-4)
    assert expected.std() > 0.01


def test_all_ids_of_a_trimmed_family_are_below_its_vocabulary_size(family):
    _, small, codec = family
    llm = load_llm(str(small))
    words = llm.get_input_embeddings().num_embeddings
    for config in (llm.config, llm.generation_config):
        for name, value in config.to_dict().items():
            ids = value if isinstance(value, list) else [value]
            if name.endswith("_token_id"):
                assert set(ids) <= {None, *range(words)}, name
    ends = llm.generation_config.eos_token_id
    assert codec.eos_id in (ends if isinstance(ends, list) else [ends])


def test_an_untrimmed_family_has_the_trained_rows_and_those_of_the_base_model(
    family, tmp_path
):
    whole, small, codec = family
    trained = load_llm(str(small))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    trained.save_pretrained(tmp_path / "trained")
    untrim_llm(tmp_path / "trained", str(whole), codec, tmp_path / "whole")
    base, again = load_llm(str(whole)), load_llm(str(tmp_path / "whole"))
    assert again.config.vocab_size == base.config.vocab_size
    assert again.generation_config.eos_token_id == base.generation_config.eos_token_id
    rows = again.get_input_embeddings().weight
    kept = codec.kept_ids[codec.kept_ids < len(rows)]
    assert torch.allclose(rows[kept], 1.5 * base.get_input_embeddings().weight[kept])
    other = sorted(set(range(len(rows))) - set(kept.tolist()))
    assert torch.equal(rows[other], base.get_input_embeddings().weight[other]) and other
    found = logits_LV(tmp_path / "whole", codec, codec.kept_ids)[:, torch.from_numpy(kept)]
    assert torch.allclose(
        found, logits_LV(tmp_path / "trained", codec, range(codec.vocab_size)), atol=1e-4
    )
    assert (
        TextCodec.load(tmp_path / "whole").vocab_size
        == codec.untrimmed().vocab_size
        > codec.vocab_size
    )


# Settings of generation configs; each one would change a search.
SEARCH = {
    "repetition_penalty": 3.0, "encoder_repetition_penalty": 2.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 2, "early_stopping": True, "min_length": 12, "min_new_tokens": 12,
    "max_length": 3, "num_beams": 7, "num_return_sequences": 3, "length_penalty": -3.0, "do_sample": True,
    "temperature": 9.0, "top_k": 2, "top_p": 0.3, "typical_p": 0.4, "min_p": 0.3,
    "suppress_tokens": [3, 4, 5, 6], "begin_suppress_tokens": [7, 8, 9], "bad_words_ids": [[10], [11, 12]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6, "exponential_decay_length_penalty": [1, 9.0], "sequence_bias": [[[13], 50.0]],
    "guidance_scale": 4.0, "renormalize_logits": True, "max_time": 0.0, "stop_strings": ["regen"],
    "use_cache": False, "prompt_lookup_num_tokens": 3, "num_beam_groups": 7, "diversity_penalty": 2.0,
    "penalty_alpha": 0.6, "epsilon_cutoff": 0.1,
}  # fmt: skip


def hypotheses(llm, codec: TextCodec, num_beams: int) -> list:
    torch.manual_seed(0)
    translator = SignTranslator(
        None, Adapter(8, llm_width(llm), embedding_scale(llm)), llm, codec
    ).eval()
    beam = Beam(num_beams=num_beams, max_new_tokens=8, num_return=num_beams)
    features = torch.randn(9, 8)
    return translator.generate(features, torch.tensor([4, 5]), [codec.wording()] * 2, beam)


# Old checkpoints have these settings in config.json.
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_the_search_of_each_family_ignores_stored_settings(family, place, tmp_path):
    whole, small, codec = family
    folder = Path(shutil.copytree(whole, tmp_path / "llm"))
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    path = folder / place
    path.write_text(json.dumps(json.loads(path.read_text()) | SEARCH))
    trim_llm(str(folder), codec, tmp_path / "trimmed")
    stored = json.loads((tmp_path / "trimmed" / "generation_config.json").read_text())
    assert SEARCH.keys().isdisjoint(stored)
    config = json.loads((tmp_path / "trimmed" / "config.json").read_text())
    assert not config.get("forced_bos_token_id") and not config.get("forced_eos_token_id")
    pairs = [(whole, folder, codec.untrimmed()), (small, tmp_path / "trimmed", codec)]
    for clean, as_published, known in pairs:
        expected, found = load_llm(str(clean)), load_llm(str(as_published))
        for setting in SEARCH:
            assert getattr(found.generation_config, setting, None) is None, setting
        for num_beams in (1, 3):
            assert hypotheses(found, known, num_beams) == hypotheses(
                expected, known, num_beams
            )


# --- other formats of checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llm("llama3", tmp_path_factory.mktemp("llama"), SPOKEN)


def test_pickled_and_sharded_checkpoints_are_trimmed(llama, tmp_path):
    codec = codec_of(llama)
    llm = AutoModelForCausalLM.from_pretrained(llama)
    for folder in (tmp_path / "pickled", tmp_path / "sharded"):
        codec.untrimmed().save(
            Path(shutil.copytree(llama, folder, ignore=lambda *_: ["model.safetensors"]))
        )
    llm.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    torch.save(llm.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected = logits_LV(llama, codec, codec.kept_ids)[:, codec.kept_ids]
    for kind in ("pickled", "sharded"):
        trim_llm(str(tmp_path / kind), codec, tmp_path / f"{kind}_trimmed")
        found = logits_LV(tmp_path / f"{kind}_trimmed", codec, range(codec.vocab_size))
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_checkpoint_without_head_and_prefix_is_trimmed(tmp_path):
    """The checkpoints of BLOOM on the hub are such."""
    make_tiny_llm("bloom", tmp_path / "llm", SPOKEN)
    codec = codec_of(tmp_path / "llm")
    path = tmp_path / "llm" / "model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        state[name.removeprefix("transformer.")] = tensor
    expected = logits_LV(tmp_path / "llm", codec, codec.kept_ids)[:, codec.kept_ids]
    save_file(state, path, metadata={"format": "pt"})
    assert torch.equal(
        logits_LV(tmp_path / "llm", codec, codec.kept_ids)[:, codec.kept_ids], expected
    )
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    assert torch.allclose(
        logits_LV(tmp_path / "trimmed", codec, range(codec.vocab_size)), expected, atol=1e-5
    )


def test_the_text_part_of_a_multimodal_llm_is_trimmed(tmp_path):
    text = make_tiny_llm("gemma3", tmp_path / "text", SPOKEN)
    codec = codec_of(text)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = Gemma3Config(
        text_config=llm_config(str(text)).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "llm")
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    found = logits_LV(tmp_path / "trimmed", codec, range(codec.vocab_size))
    kept = codec.kept_ids[codec.kept_ids < config.text_config.vocab_size]
    expected = logits_LV(tmp_path / "llm", codec, codec.kept_ids)[:, kept]
    assert torch.allclose(found, expected, atol=1e-5)
    assert llm_config(str(tmp_path / "trimmed")).vocab_size == len(kept)
    llm = load_llm(str(tmp_path / "trimmed"))
    assert llm_width(llm) == 32 and embedding_scale(llm) == pytest.approx(32**0.5, rel=1e-2)
    assert llm.generate(torch.tensor([[1, 2]]), max_new_tokens=2).max() < len(kept)


def test_another_base_llm_raises_an_error(llama, tmp_path):
    codec = codec_of(llama)
    trim_llm(str(llama), codec, tmp_path / "trimmed")
    make_tiny_llm("mistral", tmp_path / "mistral", SPOKEN)
    with pytest.raises(UserError, match=r"base LLM.*mistral"):
        untrim_llm(tmp_path / "trimmed", str(tmp_path / "mistral"), codec, tmp_path / "out")


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_8_and_4_bits_without_bitsandbytes_raise_an_error(llama, bits):
    with pytest.raises(UserError, match=rf"llm\.bits must be .* bitsandbytes, got {bits}"):
        load_llm(str(llama), LlmOptions(bits=bits))


def test_mbart_large_with_2454_tokens_has_as_many_parameters_as_in_the_paper():
    """FLa-LLM: 357.3 M parameters, and 611 M before trimming."""
    config = MBartConfig(
        vocab_size=250_027,
        d_model=1024,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        max_position_embeddings=1024,
    )
    with torch.device("meta"):
        model = MBartForConditionalGeneration(config)
    assert num_parameters(model) / 1e6 == pytest.approx(610.9, rel=1e-3)
    with torch.device("meta"):
        model.resize_token_embeddings(2454, mean_resizing=False)
    assert num_parameters(model) / 1e6 == pytest.approx(357.3, rel=1e-3)
