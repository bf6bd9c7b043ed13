"""An LLM as it is stored: what its config says, and how its tensors are reached."""

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
    dequantized,
    method_of,
    must_be_readable,
    quantization_of,
)
from flallm_ds.models.llm.stored import open_checkpoint, text_tensors
from flallm_ds.models.pretrained import check_llm_source, check_weights, first_line

# What transformers raises for a folder or hub id that does not hold a model it can load.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)

# Multimodal model types whose text model, taken out, gives the logits of the whole model
# for text. Others are refused: Aya Vision, for one, leaves out its text model's
# logit_scale.
TAKEN_OUT = frozenset({
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
# Settings by which some text models change what their head says, None or 1 where they do
# not; most multimodal models have a plain head whatever these are, as PaliGemma 2's of a
# Gemma 2.
_OF_LOGITS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "final_logit_softcapping",
)
# they do as their text models
_WITH_LOGITS = ("gemma4", "gemma4_unified", "hyperclovax_vision_v2")
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

Bits = Literal[32, 16, 8, 4]  # of a parameter: fp32, bf16, or integers of bitsandbytes


def llm_config(name: str, hub_code: bool = False) -> Any:
    """The config of the LLM `name`, of a multimodal model that of its text model.

    Raises UserError where there is none, or of another kind of model, or of one that is
    quantised in a way that cannot be undone.
    """
    return open_source(name, hub_code).config


def check_llm(
    name: str, pretrained: bool = True, hub_code: bool = False, bits: Bits = 16
) -> None:
    """Raise UserError for what can be said against an LLM without its weights being read.

    bits: that it is loaded in as it is; 16 where it is trimmed first.
    """
    must_take(bits, open_source(name, hub_code))
    if pretrained:
        check_weights(name)


@dataclass(frozen=True)
class LlmSource:
    """An LLM that is to be read.

    quantization: its config's settings, if its weights are quantised. wrapped: whether
    its tensors lie among those of a multimodal model. hub_code: run code that comes with
    the model.
    """

    name: str
    config: Any
    quantization: dict[str, Any]
    wrapped: bool
    hub_code: bool

    def skeleton(self) -> Any:
        """The model on the meta device: names and shapes, no weights; whole under ZeRO-3, too."""
        return skeleton_of(self.config, self.hub_code)

    def tensors(self, skeleton: Any) -> dict[str, torch.Tensor]:
        """Those of the LLM by their names in the checkpoint, none of them quantised.

        skeleton: of a multimodal checkpoint the names are those of its parts.
        """
        check_weights(self.name)
        dtype = getattr(self.config, "dtype", None) or torch.bfloat16
        state = dequantized(self.name, open_checkpoint(self.name), self.quantization, dtype)
        return text_tensors(skeleton, state) if self.wrapped else state


def skeleton_of(config: Any, hub_code: bool) -> Any:
    """A model with this config on the meta device; whole under ZeRO-3 as well."""
    with set_zero3_state(), torch.device("meta"), no_init_weights():
        auto = auto_class(config)
        return auto.from_config(copy.deepcopy(config), trust_remote_code=hub_code)


def must_take(bits: Bits, source: LlmSource) -> None:
    """Raise UserError for weights that cannot be loaded as integers of so many bits.

    They are computed as they are read, or are picked out of those of a larger model.
    """
    if bits > 8 or not (source.quantization or source.wrapped):
        return
    got = "a multimodal model"
    if source.quantization:
        got = f"quantised with {method_of(source.quantization)}"
    raise UserError(
        f"llm.bits must be 16 where the weights of the LLM {source.name} are not ordinary "
        f"ones, got {bits} and {got}. Give --llm.bits=16, or --llm.trim_vocabulary=true, "
        "which writes ordinary weights first."
    )


def open_source(name: str, hub_code: bool) -> LlmSource:
    """Read the config of the LLM `name`. Raises UserError as `llm_config`."""
    check_llm_source(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=hub_code)
    except LOAD_ERRORS as error:
        raise not_loaded(name, error) from error
    quantization = quantization_of(config)
    must_be_readable(name, method_of(quantization))
    text = _text_part(config)
    text.name_or_path = name
    if getattr(text, "hidden_size_per_layer_input", None):
        raise UserError(
            f"the LLM must read embeddings, but each layer of {name} (a {text.model_type}) "
            "also reads token ids, which a video does not have. Give as --llm.name another "
            "one, such as google/gemma-3-1b-pt."
        )
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    auto_class(text)  # refuses what is no LLM
    _mend_ids(text)
    return LlmSource(name, text, quantization, text is not config, hub_code)


def _mend_ids(config: Any) -> None:
    """Change ids that the model has no row for, and take out those that a search would force."""
    pad, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    # a token was added, but not its row
    if pad is not None and rows is not None and pad >= rows:
        ends = config.eos_token_id
        config.pad_token_id = None if isinstance(ends, list) else ends
    for field in ("forced_bos_token_id", "forced_eos_token_id"):
        if getattr(config, field, None) is not None:
            # our texts start with the language, and end by themselves
            setattr(config, field, None)


def _text_part(config: Any) -> Any:
    """The config of a multimodal model's text model; of another model its own.

    Raises UserError where the text model alone is no LLM, or is not known to give the
    logits of the whole.
    """
    text = config.get_text_config(decoder=True)
    own_code = not type(config).__module__.startswith("transformers.")
    if text is config or config.is_encoder_decoder or text.is_encoder_decoder or own_code:
        return config
    changed = any(getattr(text, name, None) not in (None, 1) for name in _OF_LOGITS)
    if (
        config.model_type not in TAKEN_OUT
        or type(text) not in AutoModelForCausalLM._model_mapping
        or (changed and config.model_type not in _WITH_LOGITS)
    ):
        sibling = _TEXT_SIBLINGS.get(config.model_type)
        raise UserError(
            "the LLM must be an encoder-decoder or a decoder-only language model, but "
            f"{config.name_or_path} is a multimodal {config.model_type}, which is neither, "
            "and its text model cannot be taken out. Give as --llm.name a text-only model"
            f"{f', such as {sibling}' if sibling else ' of its family'}."
        )
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = text.dtype or config.dtype
    return text


def is_decoder_only(config: Any) -> bool:
    """Whether the model only continues what it reads.

    Raises UserError for a model that generates no text.
    """
    return auto_class(config) is AutoModelForCausalLM


def auto_class(config: Any) -> Any:
    """AutoModelForSeq2SeqLM or AutoModelForCausalLM. Raises UserError as `is_decoder_only`."""
    wanted = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    own_code = getattr(config, "auto_map", None) or {}
    # Encoders such as BERT have a class for generation, but no weights that can do it.
    is_masked_lm = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    is_encoder = is_masked_lm and not getattr(config, "is_decoder", False)
    is_known = type(config) in wanted._model_mapping
    generates = is_known and (config.is_encoder_decoder or not is_encoder)
    if not generates and wanted.__name__ not in own_code:
        raise UserError(
            "the LLM must be an encoder-decoder or a decoder-only language model, but "
            f"{config.name_or_path or 'it'} is a {config.model_type}, which is neither. "
            "Check --llm.name."
        )
    return wanted


def not_loaded(name: str, error: Exception) -> UserError:
    """The error for a user whose LLM cannot be loaded; a UserError as it is."""
    if isinstance(error, UserError):
        return error
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in reason:
        return UserError(
            f"the LLM {name} must load, but did not: its pickled weights (.bin) are "
            "damaged, or hold more than tensors, which could run code. Fetch the "
            "safetensors files of the model."
        )
    if "custom code" in reason:
        return UserError(
            f"the LLM {name} must be of a kind that transformers knows, but comes with its "
            "own code. Read that code, then give --llm.hub_code=true to run it."
        )
    return UserError(f"the LLM {name} must load, but did not: {reason} Check --llm.name.")


# --- generation configs


def ids_alone(*sources: Any) -> GenerationConfig:
    """The ids of configs, the first that has one, without their search settings.

    Left out are penalties, sampling, lengths, beams, and forced and forbidden tokens: the
    run says how to search.
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
    """The ids of an LLM's generation_config.json, or of its config where it has none.

    Read as JSON: transformers refuses some settings that are of no matter here.
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
    """Rewrite generation_config.json of a folder with an LLM, so that it holds ids alone."""
    # Not llm_config: next to the adapter weights of LoRA there is no whole LLM.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=hub_code)
    generation = generation_config(str(folder), config)
    generation.to_json_file(folder / GENERATION_CONFIG_NAME)


def save_configs(llm: Any, config: Any, generation: Any, out: Path) -> None:
    """Write config.json, generation_config.json, and the code of a class that is the
    LLM's own."""
    config.architectures = [type(llm).__name__]
    if llm._auto_class is not None:
        custom_object_save(llm, out, config=config)
    config.save_pretrained(out)
    # whatever its checks think of it
    generation.to_json_file(out / GENERATION_CONFIG_NAME)
