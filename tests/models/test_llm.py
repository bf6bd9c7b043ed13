from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
)

from flallm_ds.data.text import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.llm import LlmOptions, load_llm, trim_llm
from flallm_ds.models.sign_translator import Beam, SignTranslator


@pytest.fixture(scope="module")
def trimmed(tiny_corpus, codec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed")
    trim_llm(str(tiny_corpus / "llm"), codec, folder)
    return folder


def logits_of(model, memory_BSE, decoder_ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs_embeds=memory_BSE, decoder_input_ids=torch.tensor([decoder_ids])).logits[0]


def test_a_trimmed_model_says_of_kept_pieces_what_the_whole_one_says(tiny_corpus, codec, trimmed):
    whole, small = load_llm(str(tiny_corpus / "llm")), load_llm(str(trimmed))
    assert small.config.vocab_size == codec.vocab_size < whole.config.vocab_size
    ids = [codec.wording().start[0], *codec.encode("regen sonne wind morgen")]
    memory_BSE = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    expected = logits_of(whole, memory_BSE, codec.kept_ids[ids].tolist())[:, codec.kept_ids]
    assert torch.allclose(logits_of(small, memory_BSE, ids), expected, atol=1e-4)
    assert expected.std() > 0.1


def test_a_trimmed_encoder_reads_kept_pieces_as_the_whole_one_does(tiny_corpus, codec, trimmed):
    whole, small = load_llm(str(tiny_corpus / "llm")).eval(), load_llm(str(trimmed)).eval()
    ids = codec.encode("wolken wind")
    with torch.no_grad():
        expected = whole.get_encoder()(torch.tensor([codec.kept_ids[ids].tolist()])).last_hidden_state
        assert torch.allclose(small.get_encoder()(torch.tensor([ids])).last_hidden_state, expected, atol=1e-5)


def test_tied_embeddings_stay_tied(trimmed):
    model = AutoModelForSeq2SeqLM.from_pretrained(trimmed)
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert head is model.model.decoder.embed_tokens.weight is model.model.encoder.embed_tokens.weight


def test_an_llm_whose_head_is_not_its_embedding_is_trimmed_in_both(codec, tmp_path):
    """As mT5, whose config says that they are one."""
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


def test_the_specials_of_a_trimmed_model_are_the_codecs(trimmed, codec):
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


def test_a_forced_first_token_of_the_full_vocabulary_is_not_carried_over(tiny_corpus, codec, tmp_path):
    """As in mBART-50 and NLLB, whose language is forced after the start token."""
    llm = AutoModelForSeq2SeqLM.from_pretrained(tiny_corpus / "llm")
    llm.generation_config.forced_bos_token_id = llm.config.vocab_size - 1
    llm.save_pretrained(tmp_path / "llm")
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    small = load_llm(str(tmp_path / "trimmed"))
    translator = SignTranslator(None, Adapter(8, 64), small, codec).eval()
    beam = Beam(num_beams=2, max_new_tokens=5)
    ((best, *_),) = translator.generate(torch.randn(4, 8), torch.tensor([4]), [codec.wording()], beam)
    assert best.ids and max(best.ids) < codec.vocab_size


def test_dropouts_are_as_given_or_as_stored(tiny_corpus):
    given = load_llm(str(tiny_corpus / "llm"), LlmOptions(dropout=0.3, attention_dropout=0.05)).config
    stored = load_llm(str(tiny_corpus / "llm")).config
    assert (given.dropout, given.attention_dropout) == (0.3, 0.05)
    assert (stored.dropout, stored.attention_dropout) == (0.1, 0.0)


def test_the_model_is_loaded_in_fp32(tiny_corpus, tmp_path):
    AutoModelForSeq2SeqLM.from_pretrained(tiny_corpus / "llm").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_llm(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("content", ["nothing", "an encoder", "a broken config"])
def test_a_folder_that_is_no_llm_is_refused(tmp_path, content):
    if content == "an encoder":
        BertModel(
            BertConfig(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
            )
        ).save_pretrained(tmp_path)
    elif content == "a broken config":
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"(must load, but did not|neither).*--llm\.name"):
        load_llm(str(tmp_path))


def test_weights_that_were_cut_off_are_refused(tiny_corpus, tmp_path):
    AutoModelForSeq2SeqLM.from_pretrained(tiny_corpus / "llm").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="must load, but did not"):
        load_llm(str(tmp_path))


def test_mbart_large_trimmed_to_2454_pieces_has_the_papers_parameters():
    """357.3 M; 611 M untrimmed (FLa-LLM). Skeleton alone: nothing is downloaded, no memory is used."""
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
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(610.9, rel=1e-3)
    with torch.device("meta"):
        model.resize_token_embeddings(2454, mean_resizing=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(357.3, rel=1e-3)
