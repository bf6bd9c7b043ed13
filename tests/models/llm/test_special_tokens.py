"""Special tokens of a tokenizer or a config that have no row in the embedding of the
LLM."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction, Wording
from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.light_translator import build_light_translator
from flallm_ds.models.llm.load import load_llm
from flallm_ds.models.llm.source import is_decoder_only, llm_config
from flallm_ds.models.llm.trim import trim_llm
from flallm_ds.models.sign_translator import Beam, SignTranslator
from tests.helpers.llms import make_tiny_llm
from tests.models.llm.test_load import SPOKEN, TEXTS


def codec_of(folder: Path, trim: bool, language: str = "German") -> TextCodec:
    config = llm_config(str(folder))
    instruction = Instruction(
        is_decoder_only(config),
        getattr(config, "decoder_start_token_id", None),
        config.vocab_size,
        language,
    )
    return TextCodec.for_training_text(str(folder), instruction, TEXTS, trim)


def trains_and_generates(llm: object, codec: TextCodec, wording: Wording) -> None:
    """Train on and translate two clips; the shorter text is padded."""
    translator = SignTranslator(
        None, Adapter(8, llm.get_input_embeddings().embedding_dim), llm, codec
    )
    targets = [codec.encode("regen"), codec.encode("regen sonne morgen")]
    length = max(map(len, targets))
    target_ids_BL = torch.tensor([t + [-100] * (length - len(t)) for t in targets])
    arguments = torch.randn(7, 8), torch.tensor([3, 4]), [wording] * 2
    assert torch.isfinite(translator(*arguments, target_ids_BL))
    found = translator.eval().generate(*arguments, Beam(num_beams=2, max_new_tokens=6))
    rows = llm.get_input_embeddings().num_embeddings
    for best, *_ in found:
        assert min(best.ids) >= 0 and max(best.ids) < rows


def add(folder: Path, **tokens: str) -> dict[str, int]:
    """Add special tokens to the tokenizer, not to the LLM, and return their ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(list(tokens.values()))
    return dict(zip(tokens, ids, strict=True))


def configure_tokenizer(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama3", "mbart", "mbart50", "xglm"])
def test_a_padding_token_without_a_row_is_replaced_by_the_end_of_sentence(
    tmp_path, family, in_config, trim
):
    make_tiny_llm(family, tmp_path / "llm", SPOKEN)
    pad = add(tmp_path / "llm", pad_token="[PAD]")["pad_token"]
    assert pad >= llm_config(str(tmp_path / "llm")).vocab_size
    if in_config:
        configure(tmp_path / "llm", pad_token_id=pad)
    codec = codec_of(tmp_path / "llm", trim)
    assert codec.pad_id == codec.eos_id
    name = str(tmp_path / "llm")
    if trim:
        trim_llm(name, codec, tmp_path / "trimmed")
        name = str(tmp_path / "trimmed")
    trains_and_generates(load_llm(name), codec, codec.wording())
    light_t = build_light_translator("tiny", codec, 0.0)
    trains_and_generates(light_t, codec, codec.for_light_t().wording())


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(
    ("kind", "token", "sentence"),
    [
        (
            "eos_token",
            "[EOS]",
            r"The end-of-sentence token of the LLM \('\[EOS\]', id \d+\) must be in its",
        ),
        (
            "unk_token",
            "[UNK]",
            r"The unknown token of the LLM \('\[UNK\]', id \d+\) .*\(\d+ rows\)",
        ),
    ],
)
def test_a_special_token_that_cannot_be_replaced_raises_an_error(
    tmp_path, kind, token, sentence, trim
):
    make_tiny_llm("mbart", tmp_path, SPOKEN)
    add(tmp_path, **{kind: token})
    with pytest.raises(UserError, match=sentence):
        codec_of(tmp_path, trim)


def test_unknown_characters_are_encoded_in_bytes_without_an_unknown_token(tmp_path):
    make_tiny_llm("llama3", tmp_path, SPOKEN)
    add(tmp_path, unk_token="[UNK]")
    codec = codec_of(tmp_path, trim=True)
    assert codec.decode(codec.encode("völlig neu")) == "völlig neu"


@pytest.mark.parametrize("trim", [True, False])
def test_a_start_token_without_a_row_is_left_out(tmp_path, trim):
    make_tiny_llm("llama", tmp_path, SPOKEN)
    before = codec_of(tmp_path, trim=False).wording().before
    bos = add(tmp_path, bos_token="[BOS]")["bos_token"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    first = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", bos)])
    tokenizer.backend_tokenizer.post_processor = first
    tokenizer.save_pretrained(tmp_path)
    configure_tokenizer(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    assert AutoTokenizer.from_pretrained(tmp_path)("regen")["input_ids"][0] == bos
    codec = codec_of(tmp_path, trim)
    read = [int(codec.kept_ids[i]) for i in codec.wording().before]
    assert read == list(before)[1:]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("start", [-1, 10**6])
def test_a_decoder_start_without_a_row_raises_an_error(tmp_path, start, trim):
    make_tiny_llm("t5", tmp_path, SPOKEN)
    configure(tmp_path, decoder_start_token_id=start)
    with pytest.raises(
        UserError, match=rf"The decoder_start_token_id of the LLM \(id {start}\) must be in"
    ):
        codec_of(tmp_path, trim)


@pytest.mark.parametrize("trim", [True, False])
def test_a_language_token_without_a_row_raises_an_error(tmp_path, trim):
    make_tiny_llm("mbart50", tmp_path, SPOKEN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = tokenizer.convert_tokens_to_ids("de_DE")
    config = json.loads((tmp_path / "config.json").read_text())
    instruction = Instruction(False, config["decoder_start_token_id"], rows, "German")
    with pytest.raises(
        UserError,
        match=rf"The token of the language German .*'de_DE', id {rows}\).*{rows} r",
    ):
        TextCodec.for_training_text(str(tmp_path), instruction, TEXTS, trim)
