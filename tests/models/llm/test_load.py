"""Loading of LLMs: options, code of a model's own, and errors."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
)
from transformers.utils import is_flash_attn_2_available

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import (
    LlmOptions,
    embedding_scale,
    llm_width,
    load_llm,
    longest_input,
)
from flallm_ds.models.llm.source import is_decoder_only, llm_config, save_configs
from flallm_ds.models.llm.trim import trim_llm
from tests.helpers.llms import make_tiny_llm
from tests.helpers.tensors import num_parameters

TEXTS = [
    "regen schnee morgen",
    "regen nebel morgen",
    "regen wolken morgen",
    "sonne schnee morgen",
    "sonne nebel morgen",
    "sonne wolken morgen",
    "wind schnee morgen",
    "wind nebel morgen",
    "wind wolken morgen",
]
SPOKEN = [*TEXTS, "am abend viel regen im norden", "heute nacht bleibt es klar und kalt"]


def codec_of(folder: Path, trim: bool = True, hub_code: bool = False) -> TextCodec:
    config = llm_config(str(folder), hub_code)
    only = is_decoder_only(config)
    instruction = Instruction(
        decoder_only=only,
        start_token=getattr(config, "decoder_start_token_id", None),
        rows=config.get_text_config().vocab_size,
        language="German",
    )
    return TextCodec.for_training_text(str(folder), instruction, TEXTS, trim, hub_code)


def inputs_of(llm, codec: TextCodec, rows) -> dict[str, torch.Tensor]:
    """Return the inputs for visual tokens and a sentence. rows: the model's id of each
    codec id."""
    wording = codec.wording()
    read = (*wording.before, *wording.start, *codec.encode("regen morgen")[:-1])
    ids = torch.tensor([[rows[i] for i in read]])
    visual_BSE = torch.randn(
        1, 5, llm_width(llm), generator=torch.Generator().manual_seed(0)
    )
    if llm.config.is_encoder_decoder:
        return {"inputs_embeds": visual_BSE, "decoder_input_ids": ids}
    with torch.no_grad():
        words_BSE = llm.get_input_embeddings()(ids)
    return {"inputs_embeds": torch.cat([visual_BSE, words_BSE], 1)}


@torch.no_grad()
def logits_LV(folder: Path, codec: TextCodec, rows) -> torch.Tensor:
    llm = load_llm(str(folder))
    return llm(**inputs_of(llm, codec, rows)).logits[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llm("llama3", tmp_path_factory.mktemp("llama"), SPOKEN)


def test_dropouts_come_from_the_options_or_the_config(tiny_corpus):
    given = load_llm(
        str(tiny_corpus / "llm"), LlmOptions(dropout=0.3, attention_dropout=0.05)
    ).config
    stored = load_llm(str(tiny_corpus / "llm")).config
    assert (given.dropout, given.attention_dropout) == (0.3, 0.05)
    assert (stored.dropout, stored.attention_dropout) == (0.1, 0.0)


def test_the_model_is_loaded_in_fp32(tiny_corpus, tmp_path):
    AutoModelForSeq2SeqLM.from_pretrained(tiny_corpus / "llm").bfloat16().save_pretrained(
        tmp_path
    )
    llm = load_llm(str(tmp_path))
    assert {p.dtype for p in llm.parameters()} == {torch.float32}


def test_a_pickle_that_would_run_code_is_not_loaded(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "llm", ignore=lambda *_: ["model.safetensors"])
    (tmp_path / "llm" / "pytorch_model.bin").write_bytes(
        pickle.dumps(Touch(tmp_path / "touched"))
    )
    with pytest.raises(UserError, match="more than tensors, which could run code"):
        load_llm(str(tmp_path / "llm"))
    with pytest.raises(UserError, match="more than tensors, which could run code"):
        trim_llm(str(tmp_path / "llm"), codec_of(llama), tmp_path / "out")
    assert not (tmp_path / "touched").exists()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# --- options


def test_random_weights_differ_from_the_stored_ones(llama):
    options = LlmOptions(pretrained=False)
    stored, drawn = load_llm(str(llama)), load_llm(str(llama), options)
    torch.manual_seed(1)
    again = load_llm(str(llama), options)
    for one, other in ((stored, drawn), (drawn, again)):
        assert not torch.equal(
            one.get_input_embeddings().weight, other.get_input_embeddings().weight
        )
    assert drawn.config.vocab_size == stored.config.vocab_size and not drawn.training


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("t5", "dropout_rate"), ("bloom", "hidden_dropout"), ("xglm", "dropout")],
)
def test_the_dropout_is_set_by_the_name_in_the_config_of_the_model(tmp_path, kind, dropout):
    make_tiny_llm(kind, tmp_path, SPOKEN)
    llm = load_llm(str(tmp_path), LlmOptions(dropout=0.25, attention_dropout=0.125))
    assert getattr(llm.config, dropout) == 0.25
    held = set()
    for module in llm.modules():
        if isinstance(module, torch.nn.Dropout):
            held.add(module.p)
        else:
            held |= {
                getattr(module, "dropout", None),
                getattr(module, "hidden_dropout", None),
            }
    assert 0.25 in held
    assert getattr(llm.config, "attention_dropout", 0.125) == 0.125


def test_no_layer_is_skipped_at_random(tmp_path):
    """The config of M2M100 sets a layer drop; under ZeRO-3 ranks would wait for each
    other."""
    make_tiny_llm("m2m100", tmp_path, SPOKEN)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_layerdrop": 0.05}))
    llm = load_llm(str(tmp_path))
    assert (llm.config.encoder_layerdrop, llm.config.decoder_layerdrop) == (0.0, 0.0)
    assert llm.get_encoder().layerdrop == 0.0


@pytest.mark.parametrize(("kind", "expected"), [("llama3", "sdpa"), ("bloom", "eager")])
def test_attention_is_sdpa_if_the_model_has_it(tmp_path, kind, expected):
    make_tiny_llm(kind, tmp_path, SPOKEN)
    assert load_llm(str(tmp_path)).config._attn_implementation == expected
    assert (
        load_llm(str(tmp_path), LlmOptions(attention="eager")).config._attn_implementation
        == "eager"
    )


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_without_its_package_raises_an_error(llama):
    with pytest.raises(
        UserError, match=r"llm\.attention must be .* flash-attn, got flash_attention_2"
    ):
        load_llm(str(llama), LlmOptions(attention="flash_attention_2"))


def test_sixteen_bits_are_bfloat16(llama):
    llm = load_llm(str(llama), LlmOptions(bits=16))
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}


def test_the_embedding_scale_is_that_of_the_model(tmp_path):
    for kind, expected in (
        ("mbart", 32**0.5),
        ("gemma3", 32**0.5),
        ("t5", 1.0),
        ("qwen3", 1.0),
    ):
        llm = load_llm(str(make_tiny_llm(kind, tmp_path / kind, SPOKEN)))
        embed = llm.get_input_embeddings()
        seen = embed(torch.tensor([5]))[0].norm() / embed.weight[5].norm()
        assert (
            embedding_scale(llm)
            == pytest.approx(seen.item(), rel=1e-3)
            == pytest.approx(expected, rel=1e-2)
        )


# --- code that comes with a model


OWN_CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


OWN_CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

Path(__file__).with_suffix(".ran").touch()

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(llama, tmp_path) -> Path:
    """A folder with an LLM and its own code, which writes a file when it runs."""
    folder = Path(shutil.copytree(llama, tmp_path / "own"))
    (folder / "configuration_own.py").write_text(OWN_CONFIG)
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer"}
    tokenizer |= {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "modeling_own.py").write_text(
        OWN_CODE.replace("__file__", repr(str(folder / "code")))
    )
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    auto_map |= {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {
        "model_type": "own",
        "auto_map": auto_map,
        "architectures": ["OwnForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_code_of_a_model_runs_only_with_hub_code(
    own_code, llama, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    with pytest.raises(UserError, match=r"comes with its own code.*--llm\.hub_code=true"):
        load_llm(str(own_code))
    assert not (own_code / "code.ran").exists()
    llm = load_llm(str(own_code), LlmOptions(hub_code=True))
    assert (own_code / "code.ran").exists() and type(llm).__name__ == "OwnForCausalLM"
    with pytest.raises(UserError, match="code"):
        codec_of(own_code)
    codec = codec_of(own_code, hub_code=True)
    trim_llm(str(own_code), codec, tmp_path / "trimmed", hub_code=True)
    loaded = TextCodec.load(tmp_path / "trimmed", hub_code=True)
    assert (
        type(loaded.tokenizer).__name__ == "OwnTokenizer"
        and loaded.vocab_size == codec.vocab_size
    )
    with pytest.raises(UserError, match="code"):
        TextCodec.load(tmp_path / "trimmed")
    small = load_llm(str(tmp_path / "trimmed"), LlmOptions(hub_code=True))
    assert (
        type(small).__name__ == "OwnForCausalLM"
        and small.config.vocab_size == codec.vocab_size
    )
    # Save the LLM as an export does.
    (tmp_path / "saved").mkdir()
    save_configs(small, small.config, small.generation_config, tmp_path / "saved")
    shutil.copy(tmp_path / "trimmed" / "model.safetensors", tmp_path / "saved")
    shutil.rmtree(tmp_path / "trimmed")
    again = load_llm(str(tmp_path / "saved"), LlmOptions(hub_code=True))
    assert torch.equal(
        again.get_input_embeddings().weight, small.get_input_embeddings().weight
    )


# --- errors


def test_a_missing_tensor_raises_an_error(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "llm")
    path = tmp_path / "llm" / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.self_attn.q_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"lacks 1 of its tensors \(model\.layers\.1\.self_attn\.q_proj",
    ):
        load_llm(str(tmp_path / "llm"))


@pytest.mark.parametrize("content", ["nothing", "an encoder", "a broken config"])
def test_a_folder_without_an_llm_raises_an_error(tmp_path, content):
    if content == "an encoder":
        BertModel(
            BertConfig(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=8,
                vocab_size=9,
            )
        ).save_pretrained(tmp_path)
    elif content == "a broken config":
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"(Cannot load|decoder-only).*--llm\.name"):
        load_llm(str(tmp_path))


def test_truncated_weights_raise_an_error(tiny_corpus, tmp_path):
    AutoModelForSeq2SeqLM.from_pretrained(tiny_corpus / "llm").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="the file is truncated or damaged"):
        load_llm(str(tmp_path))


@pytest.mark.parametrize("trim", [False, True])
def test_the_model_of_the_paper_is_built_from_its_config_and_tokenizer(
    shared_data, tmp_path, trim
):
    """facebook/mbart-large-cc25 with a trimmed vocabulary, built as by
    --llm.pretrained=false."""
    real = shared_data / "tokenizers" / "mbart_phoenix14t"
    texts = (
        (shared_data / "text_cc0" / "de_weather.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    config = llm_config(str(real))
    instruction = Instruction(
        start_token=config.decoder_start_token_id, rows=config.vocab_size, languages=("de",)
    )
    codec = TextCodec.for_training_text(str(real), instruction, texts, trim)
    with torch.device("meta"):
        llm = load_llm(str(real), LlmOptions(pretrained=False))
    assert (
        llm.get_input_embeddings().weight.shape
        == (2454, 1024)
        == (config.vocab_size, llm_width(llm))
    )
    assert num_parameters(llm) / 1e6 == pytest.approx(357.3, rel=1e-3)
    assert embedding_scale(llm) == 32 and longest_input(llm) == 1024
    assert (len(llm.get_encoder().layers), len(llm.model.decoder.layers)) == (12, 12)
    assert (codec.vocab_size == 2454) is not trim and codec.vocab_size > 1000
    (start,) = codec.wording("de").start
    assert codec.tokenizer.convert_ids_to_tokens(int(codec.kept_ids[start])) == "de_DE"
