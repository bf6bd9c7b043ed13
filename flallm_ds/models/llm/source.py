"""Read the config of a stored LLM, check it, and open its tensors."""

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import no_init_weights
from transformers.modeling_utils import set_zero3_state
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from flallm_ds.errors import UserError
from flallm_ds.models.llm.quantized import (
    check_method,
    dequantized,
    method_of,
    quantization_of,
)
from flallm_ds.models.llm.stored import open_checkpoint, text_tensors
from flallm_ds.models.pretrained import check_llm_source, check_weights, first_line

# What transformers raises for a folder or hub id that it cannot load.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)

# Multimodal model types whose extracted text model gives the logits of the complete model
# for text. Others raise an error: Aya Vision, for example, ignores the logit_scale of its
# text model.
EXTRACTABLE = frozenset({
    "aria", "audioflamingo3", "deepseek_vl", "deepseek_vl_hybrid", "exaone4_5", "fast_vlm",
    "fuyu",
    "gemma3", "gemma4", "gemma4_unified", "glmasr", "got_ocr2", "hyperclovax_vision_v2",
    "idefics2",
    "idefics3", "internvl", "janus", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6",
    "minicpmv4_7", "mistral3", "moss_transcribe_diarize", "musicflamingo",
    "nemotron_h_omni",
    "ovis2", "paligemma", "perception_lm", "pp_chart2table", "qwen2_audio", "qwen3_5",
    "qwen3_5_moe", "qwen3_asr", "shieldgemma2", "smolvlm", "video_llama_3", "video_llava",
    "vipllava", "voxtral",
})  # fmt: skip
# Settings by which some text models change their logits; None and 1 change nothing. Most
# multimodal models ignore these settings, such as PaliGemma 2 those of its Gemma 2.
_LOGIT_SETTINGS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "final_logit_softcapping",
)
# Multimodal model types that follow these settings.
_WITH_LOGIT_SETTINGS = ("gemma4", "gemma4_unified", "hyperclovax_vision_v2")
# A text-only model for the error message, by multimodal model type.
_TEXT_SIBLINGS = {
    "aya_vision": "CohereLabs/aya-expanse-8b",
    "blip-2": "facebook/opt-2.7b",
    "cohere2_vision": "CohereLabs/c4ai-command-r7b-12-2024",
    "gemma3n": "google/gemma-3-1b-pt",
    "mllama": "meta-llama/Llama-3.1-8B",
    "qwen2_vl": "Qwen/Qwen2-7B",
    "qwen2_5_vl": "Qwen/Qwen2.5-7B",
    "qwen2_5_omni": "Qwen/Qwen2.5-7B",
    "qwen3_vl": "Qwen/Qwen3-8B",
    "qwen3_vl_moe": "Qwen/Qwen3-30B-A3B",
    "qwen3_omni_moe": "Qwen/Qwen3-30B-A3B",
}

# The size of a parameter: fp32, bf16, or integers of bitsandbytes.
Bits = Literal[32, 16, 8, 4]


def llm_config(name: str, hub_code: bool = False) -> Any:
    """Return the config of the LLM `name`; for a multimodal model that of its text model.

    Raises UserError if there is no config, if the model is not an LLM, or if it is
    quantised by a method that cannot be read.
    """
    return open_source(name, hub_code).config


def check_llm(
    name: str, pretrained: bool = True, hub_code: bool = False, bits: Bits = 16
) -> None:
    """Raise UserError for an LLM that cannot be used, without reading its weights.

    bits: of the parameters once the stored LLM is loaded; 16 if it is trimmed first.
    """
    check_stored_bits(bits, open_source(name, hub_code))
    if pretrained:
        check_weights(name)


@dataclass(frozen=True)
class LlmSource:
    """An LLM in a folder or on a hub, described by its config.

    quantization: the quantisation settings of the config; empty without quantisation.
    wrapped: whether the LLM is the text model of a stored multimodal model. hub_code: run
    code that comes with the model.
    """

    name: str
    config: Any
    quantization: dict[str, Any]
    wrapped: bool
    hub_code: bool

    def skeleton(self) -> Any:
        """Return the model on the meta device: names and shapes without weights.

        It is not partitioned under ZeRO-3.
        """
        return skeleton_of(self.config, self.hub_code)

    def tensors(self, skeleton: Any) -> dict[str, torch.Tensor]:
        """Return the tensors by their names in the checkpoint, none of them quantised.

        skeleton: the model on the meta device. The names of a text model's tensors are
        those in the skeleton.
        """
        check_weights(self.name)
        # Quantised weights are read in the type that the config names.
        dtype = getattr(self.config, "dtype", None) or torch.bfloat16
        state = dequantized(self.name, open_checkpoint(self.name), self.quantization, dtype)
        return text_tensors(skeleton, state) if self.wrapped else state


def skeleton_of(config: Any, hub_code: bool) -> Any:
    """Return a model with this config on the meta device, not partitioned under ZeRO-3."""
    # In this state transformers does not partition the parameters.
    with set_zero3_state(), torch.device("meta"), no_init_weights():
        auto = auto_class(config)
        return auto.from_config(copy.deepcopy(config), trust_remote_code=hub_code)


def check_stored_bits(bits: Bits, source: LlmSource) -> None:
    """Raise UserError for weights that cannot be loaded as integers of 8 or 4 bits.

    These are weights that are computed while they are read, or that are a part of a
    multimodal model: bitsandbytes reads neither.
    """
    if bits > 8 or not (source.quantization or source.wrapped):
        return
    kind = "a multimodal model"
    if source.quantization:
        kind = f"quantised with {method_of(source.quantization)}"
    raise UserError(
        f"llm.bits must be 16 for the LLM {source.name}, which is {kind}, got {bits}. "
        "Give --llm.bits=16, or --llm.trim_vocabulary=true, which writes ordinary weights "
        "first."
    )


def open_source(name: str, hub_code: bool) -> LlmSource:
    """Read the config of the LLM `name`. Raises UserError as `llm_config` does."""
    check_llm_source(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=hub_code)
    except LOAD_ERRORS as error:
        raise not_loaded(name, error) from error
    quantization = quantization_of(config)
    check_method(name, method_of(quantization))
    text = _text_part(config)
    text.name_or_path = name
    if getattr(text, "hidden_size_per_layer_input", None):
        raise UserError(
            f"llm.name must be an LLM that reads embeddings alone, got {name} (a "
            f"{text.model_type}), whose layers also read token ids. A video has none. Give "
            "another --llm.name, such as google/gemma-3-1b-pt."
        )
    # The tensors are read as ordinary ones, so transformers must not quantise them.
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    auto_class(text)  # an error for a model that is not an LLM
    _correct_ids(text)
    return LlmSource(name, text, quantization, text is not config, hub_code)


def _correct_ids(config: Any) -> None:
    """Replace a padding id without a row in the embedding, and remove forced tokens."""
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    # A padding token was added to the tokenizer, but no row to the embedding.
    if pad is not None and rows is not None and pad >= rows:
        ends = config.eos_token_id
        config.pad_token_id = None if isinstance(ends, list) else ends
    for field in ("forced_bos_token_id", "forced_eos_token_id"):
        if getattr(config, field, None) is not None:
            # The targets contain the language token and the end of sentence.
            setattr(config, field, None)


def _text_part(config: Any) -> Any:
    """Return the config of the text model of a multimodal model; else `config` itself.

    Raises UserError if the text model is not an LLM, or not known to give the logits of the
    complete model.
    """
    # Models with their own code are loaded as they are.
    text = config.get_text_config(decoder=True)
    own_code = not type(config).__module__.startswith("transformers.")
    if text is config or config.is_encoder_decoder or text.is_encoder_decoder or own_code:
        return config
    # Logits that the text model would change, and the multimodal model does not.
    changed = any(getattr(text, name, None) not in (None, 1) for name in _LOGIT_SETTINGS)
    if (
        config.model_type not in EXTRACTABLE
        or type(text) not in AutoModelForCausalLM._model_mapping
        or (changed and config.model_type not in _WITH_LOGIT_SETTINGS)
    ):
        sibling = _TEXT_SIBLINGS.get(config.model_type)
        raise UserError(
            "llm.name must be an encoder-decoder or a decoder-only language model, got "
            f"{config.name_or_path}, a multimodal {config.model_type} model whose text model "
            "cannot be extracted. Give a text-only model"
            f"{f', such as {sibling}' if sibling else ' of the same family'}."
        )
    # The config of the complete model decides what its parts may contradict.
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = text.dtype or config.dtype
    return text


def is_decoder_only(config: Any) -> bool:
    """Return whether the model is decoder-only: it continues its input.

    Raises UserError for a model that does not generate text.
    """
    return auto_class(config) is AutoModelForCausalLM


def auto_class(config: Any) -> Any:
    """Return AutoModelForSeq2SeqLM or AutoModelForCausalLM.

    Raises UserError for a model that does not generate text.
    """
    wanted = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # A model with its own code names its classes in the config.
    own_code = getattr(config, "auto_map", None) or {}
    # Encoders such as BERT have a class for generation, but were not trained for it.
    is_masked_lm = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    is_encoder = is_masked_lm and not getattr(config, "is_decoder", False)
    is_known = type(config) in wanted._model_mapping
    generates = is_known and (config.is_encoder_decoder or not is_encoder)
    if not generates and wanted.__name__ not in own_code:
        raise UserError(
            "llm.name must be an encoder-decoder or a decoder-only language model, got "
            f"{config.name_or_path or 'a model'} of the type {config.model_type}. Check "
            "--llm.name."
        )
    return wanted


def not_loaded(name: str, error: Exception) -> UserError:
    """Return the UserError for an LLM that cannot be loaded; a UserError is not changed."""
    if isinstance(error, UserError):
        return error
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in reason:
        return UserError(
            f"Cannot load the LLM {name}: its pickled weights (.bin) are damaged, or hold "
            "more than tensors, which could run code. Fetch the safetensors files of the "
            "model."
        )
    # A part of transformers' message for a model with its own code.
    if "custom code" in reason:
        return UserError(
            f"Cannot load the LLM {name}: it comes with its own code. Read that code, then "
            "give --llm.hub_code=true to run it."
        )
    reason = reason.rstrip(".")
    return UserError(f"Cannot load the LLM {name}: {reason}. Check --llm.name.")


# --- generation configs


def ids_alone(*sources: Any) -> GenerationConfig:
    """Return a generation config with ids alone, each from the first source that has it.

    Penalties, sampling, lengths, beams, and forced and forbidden tokens are left out: the
    options of the run set how to search.
    """
    ids = {}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        for source in sources:
            value = getattr(source, name, None)
            if value is not None:
                ids[name] = value
                break
    return GenerationConfig(**ids)


def generation_config(name: str, config: Any) -> GenerationConfig:
    """Return the ids of generation_config.json; without that file, those of the config.

    The file is read as JSON, because transformers raises errors for some settings that are
    not used here.
    """
    path = cached_file(
        name,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return ids_alone(config.get_text_config(decoder=True), config)
    return ids_alone(SimpleNamespace(**json.loads(Path(path).read_text(encoding="utf-8"))))


def clean_generation(folder: Path, hub_code: bool = False) -> None:
    """Rewrite the generation_config.json of a folder with an LLM with the ids alone."""
    # Not llm_config: a folder with adapter weights holds no complete LLM.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=hub_code)
    generation = generation_config(str(folder), config)
    generation.to_json_file(folder / GENERATION_CONFIG_NAME)


def save_configs(llm: Any, config: Any, generation: Any, out: Path) -> None:
    """Write config.json, generation_config.json and the model's own code, if it has any."""
    config.architectures = [type(llm).__name__]
    if llm._auto_class is not None:
        custom_object_save(llm, out, config=config)
    config.save_pretrained(out)
    # Not save_pretrained, which raises an error for some stored settings.
    generation.to_json_file(out / GENERATION_CONFIG_NAME)
