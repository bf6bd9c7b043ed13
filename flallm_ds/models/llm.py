"""The LLM, encoder-decoder or decoder-only: loaded from a hub id or folder; its vocabulary trimmed."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from flallm_ds.data.text import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.stored import open_checkpoint, tied_as_stored

# What transformers raises for a folder or hub id that does not hold a model it can load.
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# What models call the two dropouts.
_DROPOUTS = (
    "dropout",
    "dropout_rate",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_dropout",
    "resid_pdrop",
    "embd_pdrop",
)
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# A layer that one rank skips and another does not would let ZeRO-3's gathers wait for ever.
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class LlmOptions:
    """How an LLM is loaded. The dropouts replace its config's where given and where the model has them."""

    dropout: float | None = None
    attention_dropout: float | None = None
    attention: str = "sdpa"  # where the model has it, else eager; or eager, flash_attention_2
    pretrained: bool = True  # false: random weights, drawn from PyTorch's generator
    hub_code: bool = False  # run code that comes with the model
    bits: Literal[32, 16, 8, 4] = 32  # of a parameter: fp32, bf16, or integers of bitsandbytes


def llm_config(name: str, hub_code: bool = False) -> Any:
    """The config of the LLM `name`. Raises UserError where there is none, or of another kind of model."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=hub_code)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, error) from error
    _auto_class(config)
    return config


def is_decoder_only(config: Any) -> bool:
    """Whether the model only continues what it reads. Raises UserError for one that generates no text."""
    return _auto_class(config) is AutoModelForCausalLM


def _auto_class(config: Any) -> Any:
    """AutoModelForSeq2SeqLM or AutoModelForCausalLM."""
    wanted = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    own_code = getattr(config, "auto_map", None) or {}
    # Encoders such as BERT have a class for generation, but no weights that can do it.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = type(config) in wanted._model_mapping and (config.is_encoder_decoder or not encoder)
    if not known and wanted.__name__ not in own_code:
        raise UserError(
            "the LLM must be an encoder-decoder or a decoder-only language model, but "
            f"{config.name_or_path or 'it'} is a {config.model_type}, which is neither. Check --llm.name."
        )
    return wanted


def _not_loaded(name: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if "custom code" in reason:
        return UserError(
            f"the LLM {name} must be of a kind that transformers knows, but comes with its own code. "
            "Read that code, then give --llm.hub_code=true to run it."
        )
    return UserError(f"the LLM {name} must load, but did not: {reason} Check --llm.name.")


def load_llm(name: str, options: LlmOptions = LlmOptions()) -> Any:
    """The LLM `name`, in eval mode.

    Under ZeRO-3 (an `HfDeepSpeedConfig` is alive) its JSON decides the type of the parameters, and no rank
    holds a whole copy. Raises UserError where it cannot be loaded as asked.
    """
    config = llm_config(name, options.hub_code)
    _set(config, _DROPOUTS, options.dropout)
    _set(config, _ATTENTION_DROPOUTS, options.attention_dropout)
    _set(config, _LAYER_DROPS, 0.0)
    arguments = {
        "dtype": torch.float32 if options.bits == 32 else torch.bfloat16,
        **_attention(options.attention),
        **_quantization(options.bits),
    }
    try:
        model = _model(name, config, options, arguments)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, error) from error
    for stored in (model.config, model.generation_config):
        for field in ("forced_bos_token_id", "forced_eos_token_id"):
            if getattr(stored, field, None) is not None:
                setattr(stored, field, None)  # our texts start with the language, and end by themselves
    return model


def _model(name: str, config: Any, options: LlmOptions, arguments: dict[str, Any]) -> Any:
    auto = _auto_class(config)
    if not options.pretrained:
        return auto.from_config(config, trust_remote_code=options.hub_code, **arguments).eval()
    if is_deepspeed_zero3_enabled() and options.bits > 8:
        return _partitioned(name, config, options.hub_code, arguments)
    model, found = auto.from_pretrained(
        name, config=config, trust_remote_code=options.hub_code, output_loading_info=True, **arguments
    )
    _must_be_whole(name, model, found["missing_keys"])
    return model


def _partitioned(name: str, config: Any, hub_code: bool, arguments: dict[str, Any]) -> Any:
    """The pretrained model under ZeRO-3: rank 0 reads one tensor at a time, every rank keeps its part of it.

    transformers' own way maps all files at once, so that rank 0 comes to hold the whole checkpoint.
    """
    skeleton = _skeleton(config, hub_code)
    state = open_checkpoint(name)
    with tied_as_stored(skeleton, state) as untied:
        if torch.distributed.get_rank() != 0:
            state = {key: torch.empty_like(tensor, device="meta") for key, tensor in state.items()}
        model, found = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            generation_config=_generation_config(name),
            output_loading_info=True,
            **arguments,
        )
    if untied:
        model._tied_weights_keys = {t: s for t, s in model._tied_weights_keys.items() if t not in untied}
    model.config.name_or_path = model.name_or_path = name
    _must_be_whole(name, model, found["missing_keys"])
    return model


def _skeleton(config: Any, hub_code: bool) -> Any:
    """The model on the meta device: names and shapes, no weights; whole under ZeRO-3 as well."""
    with set_zero3_state(), torch.device("meta"), no_init_weights():
        return _auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=hub_code)


def _generation_config(name: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # an old checkpoint, whose config.json holds it
        return GenerationConfig.from_pretrained(name, config_file_name="config.json", _from_model_config=True)


def _set(config: Any, names: tuple[str, ...], value: float | None) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in names:
            if value is not None and hasattr(part, name):
                setattr(part, name, value)


def _attention(how: str) -> dict[str, str]:
    if how == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "llm.attention=flash_attention_2 needs a GPU and the package flash-attn, but one of them is not "
            "here. Install it, or give --llm.attention=sdpa."
        )
    return {} if how == "sdpa" else {"attn_implementation": how}  # sdpa is transformers' choice where it can


def _quantization(bits: int) -> dict[str, Any]:
    if bits > 8:
        return {}
    if not (torch.cuda.is_available() and is_bitsandbytes_available()):
        raise UserError(
            f"llm.bits={bits} needs a GPU and the package bitsandbytes, but one of them is not here. "
            "Install it, or give --llm.bits=16."
        )
    quantization = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


def _must_be_whole(name: str, model: Any, missing: list[str]) -> None:
    """transformers would go on with random numbers for what is missing."""
    parameters = {n for n, _ in model.named_parameters()}
    lost = sorted(set(missing) & parameters)
    if lost:
        raise UserError(
            f"the LLM {name} must hold all weights of its model, but lacks {len(lost)}, {lost[0]} being one. "
            "Check --llm.name, or give --llm.pretrained=false for random weights."
        )


def llm_width(llm: Any) -> int:
    """E, the width of what the LLM reads in place of words."""
    return int(llm.get_input_embeddings().embedding_dim)


def embedding_scale(llm: Any) -> float:
    """What the LLM multiplies its word embeddings by (sqrt(E) or 1): visual tokens must be as large."""
    return float(getattr(llm.get_input_embeddings(), "embed_scale", None) or 1.0)


def trim_llm(name: str, codec: TextCodec, out: Path, hub_code: bool = False) -> None:
    """Write the model to `out` with the embedding rows of the codec's kept pieces alone, codec beside it.

    Run once on one rank, never under zero.Init. Source: FLa-LLM, section 4.1 (2,215 pieces on PHOENIX14T).
    """
    model = load_llm(name, LlmOptions(hub_code=hub_code))
    kept = torch.from_numpy(codec.kept_ids)
    embedding = model.get_input_embeddings().weight.data[kept].clone()
    head = model.get_output_embeddings().weight.data[kept].clone()
    untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    bias = getattr(model, "final_logits_bias", None)
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    if untied:  # resizing ties what the config says is tied, although mT5's weights are not
        model.get_output_embeddings().weight = torch.nn.Parameter(head.clone())
    model.get_input_embeddings().weight.data.copy_(embedding)
    model.get_output_embeddings().weight.data.copy_(head)
    if bias is not None:
        model.final_logits_bias.copy_(bias[:, kept])
    for config in _with_parts(model.config):
        _renumber(config, codec)
    _renumber(model.generation_config, codec)
    model.save_pretrained(out)
    codec.save(out)


# Text specials are absent where they were not kept; other ids (of pictures, of sounds) must be some number.
_TEXT_SPECIALS = ("pad", "bos", "eos", "sep", "cls", "unk", "decoder_start", "forced_bos", "forced_eos")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)


def _renumber(config: Any, codec: TextCodec) -> None:
    """Write trimmed ids into a config: nothing may point past the vocabulary."""
    for field, value in config.to_dict().items():
        if value is None or not (field.endswith(("_token_id", "_token_index")) or field in _ID_LISTS):
            continue
        trimmed = _renumbered(value, codec)
        if trimmed is None and field.rpartition("_token")[0] not in (*_TEXT_SPECIALS, ""):
            trimmed = codec.pad_id
        setattr(config, field, trimmed)
    if getattr(config, "eos_token_id", None) is None or isinstance(config.eos_token_id, int):
        config.eos_token_id = codec.eos_id
    elif codec.eos_id not in config.eos_token_id:
        config.eos_token_id = [codec.eos_id, *config.eos_token_id]
    if codec.language and not codec.instruction.decoder_only:
        config.decoder_start_token_id = codec.wording().start[0]


def _renumbered(value: Any, codec: TextCodec) -> Any:
    """An id, or lists of ids; None for what was not kept."""
    if isinstance(value, int):
        known = value < len(codec.tokenizer) and codec.trimmed_id(value) >= 0
        return codec.trimmed_id(value) if known else None
    trimmed = [_renumbered(one, codec) for one in value]
    if any(isinstance(one, list) for one in value):
        return [one for one in trimmed if one] or None
    return [one for one in trimmed if one is not None] or None
