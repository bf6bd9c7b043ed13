"""Text models of multimodal models: they are extracted, or an error names another LLM."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import LlmOptions, load_llm
from flallm_ds.models.llm.source import EXTRACTABLE, check_llm
from flallm_ds.models.llm.trim import trim_llm
from tests.helpers.llms import make_tiny_llm
from tests.helpers.tensors import num_parameters
from tests.models.llm.test_load import SPOKEN, codec_of

# The names of sizes in configs, and their largest values in a tiny config.
SIZES = {
    32: (
        "hidden_size d_model embed_dim dim width encoder_hidden_size projection_dim "
        "output_dim out_hidden_size vision_hidden_size projector_hidden_size "
        "text_hidden_size base_channels num_embeddings"
    ),
    48: (
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim "
        "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp "
        "projector_intermediate_size"
    ),
    2: (
        "num_hidden_layers n_layers depth encoder_layers decoder_layers num_layers "
        "num_key_value_heads num_experts num_local_experts n_routed_experts"
    ),
    4: "num_attention_heads n_heads num_heads encoder_attention_heads decoder_attention_heads",
    1: "num_experts_per_tok",
    8: "head_dim global_head_dim",
    28: "image_size",
    14: "patch_size",
}
SMALL: dict[str, int] = {}
for _size, _names in SIZES.items():
    SMALL |= dict.fromkeys(_names.split(), _size)
VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": [28, 28]}
CONVOLUTIONS = {"layers": [1] * 5, "embed_dims": [32] * 5, "mlp_ratios": [1] * 5}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
VISION |= {"num_key_value_heads": 4, "head_dim": 8}
# Other settings that the parts of a config need, by model type.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4": {
        "text_config": {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 0.5},
        "vision_config": VISION,
    },
    "gemma4_unified": {
        "text_config": {"final_logit_softcapping": 0.5},
        "vision_config": VISION,
    },
    "hyperclovax_vision_v2": {"text_config": {"logits_scaling": 0.5}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": VIT,
        },
    },
    "fast_vlm": {"vision_config": {"model_args": CONVOLUTIONS}},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM whose tokenizer all multimodal models of this file use."""
    return make_tiny_llm("llama3", tmp_path_factory.mktemp("llama"), SPOKEN)


@pytest.fixture(scope="module")
def codec(llama: Path) -> TextCodec:
    return codec_of(llama)


def tiny(values: dict[Any, Any], rows: int) -> dict[Any, Any]:
    """Return the values of a config with small sizes, and with special tokens below
    `rows`."""
    found: dict[Any, Any] = {}
    for name, value in values.items():
        if name in ("id2label", "label2id", "per_layer_config", "num_kv_shared_layers"):
            continue
        if isinstance(value, dict):
            found[name] = tiny(value, rows)
        elif name == "vocab_size":
            found[name] = rows
        elif name in SMALL and isinstance(value, int):
            found[name] = min(value, SMALL[name])
        elif str(name).endswith(("layer_types", "layers_block_type")) and value:
            found[name] = value[-2:]
        elif str(name).endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[name] = min(value, rows - 1)
        else:
            found[name] = value
    return found


def make(model_type: str, llama: Path, folder: Path, **more: Any) -> Any:
    """Write a tiny multimodal model with random weights, and return it."""
    rows = json.loads((llama / "config.json").read_text())["vocab_size"]
    kind = CONFIG_MAPPING[model_type]
    values = tiny(kind().to_dict(), rows)
    for part, own in OWN.get(model_type, {}).items():
        values[part] = (values[part] or {}) | own
    config = kind.from_dict(values | more)
    listed = type(config) in AutoModelForMultimodalLM._model_mapping
    auto = AutoModelForMultimodalLM if listed else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1)
    shutil.copytree(llama, folder, ignore=lambda *_: ["model.safetensors", "config.json"])
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits_LV(llm: Any, ids: list[int]) -> torch.Tensor:
    ids_BL = torch.tensor([ids])
    found: torch.Tensor = llm(
        input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False
    ).logits
    return found[0]


@pytest.mark.parametrize("model_type", sorted(EXTRACTABLE))
def test_an_extracted_text_model_gives_the_logits_of_the_multimodal_model(
    llama: Path, codec: TextCodec, tmp_path: Path, model_type: str
) -> None:
    folder = tmp_path / "llm"
    whole = make(model_type, llama, folder)
    ids = codec.encode("regen sonne morgen nebel")
    expected = logits_LV(whole, codec.kept_ids[ids].tolist())
    extracted = load_llm(str(folder))
    assert num_parameters(extracted) < num_parameters(whole)
    for name, _ in extracted.named_parameters():
        assert "vision" not in name and "audio" not in name
    found = logits_LV(extracted, codec.kept_ids[ids].tolist())
    assert expected.std() > 0.01
    assert torch.allclose(found, expected, atol=1e-5)
    trim_llm(str(folder), codec, tmp_path / "trimmed")
    found = logits_LV(load_llm(str(tmp_path / "trimmed")), ids)
    assert torch.allclose(found, expected[:, codec.kept_ids], atol=1e-5)


# Well-known models of the hub, and the text-only model that the error names.
REFUSED = {
    # The text model alone gives other logits.
    "aya_vision": "such as CohereLabs/aya-expanse-8b",
    "blip-2": "such as facebook/opt-2.7b",
    "cohere2_vision": "such as CohereLabs/c4ai-command-r7b-12-2024",
    "gemma3n": "such as google/gemma-3-1b-pt",
    "glm4v": "of the same family",
    "mllama": "such as meta-llama/Llama-3.1-8B",
    "qwen2_vl": "such as Qwen/Qwen2-7B",
    "qwen2_5_vl": "such as Qwen/Qwen2.5-7B",
    "qwen2_5_omni": "such as Qwen/Qwen2.5-7B",
    "qwen3_vl": "such as Qwen/Qwen3-8B",
    "qwen3_vl_moe": "such as Qwen/Qwen3-30B-A3B",
    "qwen3_omni_moe": "such as Qwen/Qwen3-30B-A3B",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_error_for_a_text_model_that_cannot_be_extracted_names_another_llm(
    llama: Path, codec: TextCodec, tmp_path: Path, model_type: str
) -> None:
    """All functions that read a config raise it before they read weights."""
    folder = tmp_path / "llm"
    shutil.copytree(llama, folder)
    (folder / "config.json").unlink()
    CONFIG_MAPPING[model_type]().save_pretrained(folder)
    sentence = (
        rf"got {re.escape(str(folder))}, a multimodal {model_type} model whose text model "
        rf"cannot be extracted\. Give a text-only model,? {re.escape(REFUSED[model_type])}\."
    )
    for read in (
        lambda: check_llm(str(folder)),
        lambda: load_llm(str(folder)),
        lambda: load_llm(str(folder), LlmOptions(pretrained=False)),
        lambda: trim_llm(str(folder), codec, tmp_path / "out"),
        lambda: codec_of(folder),
    ):
        with pytest.raises(UserError, match=sentence):
            read()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "text", "setting"),
    [
        ("paligemma", "gemma2", {"final_logit_softcapping": 30.0}),
        ("llava_next", "granite", {"logits_scaling": 8.0}),  # granite-vision-3.2
        ("llava", "cohere", {"logit_scale": 0.0625}),
        ("gemma3", "gemma3_text", {"final_logit_softcapping": 30.0}),
    ],
)
def test_a_text_model_with_another_head_raises_an_error(
    tmp_path: Path, model_type: str, text: str, setting: dict[str, Any]
) -> None:
    """The multimodal model ignores a setting of its text model, so the logits differ."""
    config = CONFIG_MAPPING[model_type](text_config={"model_type": text, **setting})
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"a multimodal {model_type} model whose .* cannot be extracted\."
    ):
        check_llm(str(tmp_path))


def test_every_other_multimodal_model_of_transformers_raises_an_error(
    tmp_path: Path,
) -> None:
    """A model type of a later version of transformers is not extracted without a test."""
    seen = 0
    for model_type in set(CONFIG_MAPPING) - EXTRACTABLE:
        try:
            config = CONFIG_MAPPING[model_type]()
            text = config.get_text_config(decoder=True)
        except Exception:  # noqa: BLE001  # some configs have no values of their own
            continue
        if text is config or config.is_encoder_decoder:
            continue
        config.save_pretrained(tmp_path / model_type)
        name = re.escape(config.model_type)
        with pytest.raises(UserError, match=rf"(multimodal|of the type) {name}[ .]"):
            check_llm(str(tmp_path / model_type), pretrained=False)
        seen += 1
    assert seen > 50


def test_checkpoints_in_the_old_layout_are_read(
    llama: Path, codec: TextCodec, tmp_path: Path
) -> None:
    """llava-hf has `language_model.model.layers.0...` and
    `language_model.lm_head.weight`."""
    whole = make("llava", llama, tmp_path / "llm")
    old = {}
    for name, tensor in whole.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head.", "language_model.lm_head.").replace(
            "model.vision_tower", "vision_tower"
        )
        old[name] = tensor.clone()
    save_file(old, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    ids = codec.kept_ids[codec.encode("regen sonne morgen")].tolist()
    assert torch.equal(
        logits_LV(load_llm(str(tmp_path / "llm")), ids), logits_LV(whole, ids)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_if_that_of_the_multimodal_model_is(
    llama: Path, codec: TextCodec, tmp_path: Path, tied: bool
) -> None:
    """The config of the text part of Mistral 3 contradicts it and must be ignored."""
    whole = make("mistral3", llama, tmp_path / "llm", tie_word_embeddings=tied)
    extracted = load_llm(str(tmp_path / "llm"))
    assert (extracted.lm_head.weight is extracted.get_input_embeddings().weight) is tied
    ids = codec.kept_ids[codec.encode("regen sonne morgen")].tolist()
    assert torch.equal(logits_LV(extracted, ids), logits_LV(whole, ids))


@pytest.mark.parametrize("bits", [8, 4])
def test_8_and_4_bits_for_a_text_model_raise_an_error_unless_it_was_trimmed(
    llama: Path, codec: TextCodec, tmp_path: Path, bits: Any
) -> None:
    make("llava", llama, tmp_path / "llm")
    for read in (
        lambda: load_llm(str(tmp_path / "llm"), LlmOptions(bits=bits)),
        lambda: check_llm(str(tmp_path / "llm"), bits=bits),
    ):
        with pytest.raises(
            UserError,
            match=rf"llm\.bits must be 16 .* which is a multimodal model, got {bits}",
        ):
            read()
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    check_llm(str(tmp_path / "trimmed"), bits=bits)
