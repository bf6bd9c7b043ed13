"""The LLM, encoder-decoder or decoder-only, loaded from a hub id or folder as asked."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from flallm_ds.errors import UserError
from flallm_ds.models.llm.quantized import must_be_plain
from flallm_ds.models.llm.source import (
    LOAD_ERRORS,
    Bits,
    LlmSource,
    auto_class,
    generation_config,
    must_take,
    not_loaded,
    open_source,
)
from flallm_ds.models.llm.stored import (
    freed_at_once,
    must_fit,
    open_checkpoint,
    remaining_ties,
    tied_before_loading,
    untied_names,
)
from flallm_ds.models.llm.word_scale import probe_of, word_scale
from flallm_ds.models.pretrained import check_weights

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
# A layer that one rank skips and another does not would let ZeRO-3's gathers wait for
# ever.
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class LlmOptions:
    """How an LLM is loaded.

    The dropouts replace those of its config where they are given and where the model has
    them.
    """

    dropout: float | None = None
    attention_dropout: float | None = None
    # where the model has it, else eager; or eager, flash_attention_2
    attention: str = "sdpa"
    # False: random weights, drawn from PyTorch's generator, which does not move.
    pretrained: bool = True
    hub_code: bool = False  # run code that comes with the model
    bits: Bits = 32


def load_llm(name: str, options: LlmOptions = LlmOptions()) -> Any:
    """The LLM `name`, in eval mode.

    Under ZeRO-3 (an `HfDeepSpeedConfig` is alive) its JSON decides the type of the
    parameters, and no rank holds a whole copy. Raises UserError where it cannot be loaded
    as asked.
    """
    source = open_source(name, options.hub_code)
    must_take(options.bits, source)
    config = source.config
    _set(config, _DROPOUTS, options.dropout)
    _set(config, _ATTENTION_DROPOUTS, options.attention_dropout)
    _set(config, _LAYER_DROPS, 0.0)
    arguments = {
        "dtype": torch.float32 if options.bits == 32 else torch.bfloat16,
        **_attention(options.attention),
        **_quantization(options.bits),
    }
    try:
        word_scale(source.skeleton())  # refuses what cannot read visual tokens
        with freed_at_once():
            return _model(source, options, arguments)
    except LOAD_ERRORS as error:
        raise not_loaded(name, error) from error


def _model(source: LlmSource, options: LlmOptions, arguments: dict[str, Any]) -> Any:
    name, config = source.name, source.config
    auto = auto_class(config)
    if not options.pretrained:
        with torch.random.fork_rng():  # under ZeRO-3 rank 0 alone draws
            made = auto.from_config(config, trust_remote_code=options.hub_code, **arguments)
        return made.eval()
    partitioned = is_deepspeed_zero3_enabled() and options.bits > 8
    if source.quantization or source.wrapped or partitioned:
        return _from_tensors(source, arguments)
    check_weights(name)
    must_be_plain(name, open_checkpoint(name))
    model, found = auto.from_pretrained(
        name,
        config=config,
        generation_config=generation_config(name, config),
        trust_remote_code=options.hub_code,
        output_loading_info=True,
        **arguments,
    )
    must_fit(name, model, found["missing_keys"], found["unexpected_keys"])
    return model


def _from_tensors(source: LlmSource, arguments: dict[str, Any]) -> Any:
    """The pretrained model from tensors that are read one at a time.

    Under ZeRO-3 rank 0 reads them and every rank keeps its part: transformers' own way
    maps all files at once, so that rank 0 comes to hold the whole checkpoint. Quantised
    weights and the text model of a multimodal one are read this way, too.
    """
    name = source.name
    skeleton = source.skeleton()
    state = source.tensors(skeleton)
    untied = untied_names(skeleton, state)
    with tied_before_loading(type(skeleton), untied):
        if is_deepspeed_zero3_enabled() and torch.distributed.get_rank() != 0:
            state = {key: _without_values(tensor) for key, tensor in state.items()}
        model, found = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            generation_config=generation_config(name, source.config),
            output_loading_info=True,
            **arguments,
        )
    if untied:
        model._tied_weights_keys = remaining_ties(model._tied_weights_keys, untied)
    model.config.name_or_path = model.name_or_path = name
    must_fit(name, model, found["missing_keys"], found["unexpected_keys"])
    return model


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and type on the meta device; nothing is read."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _set(config: Any, names: tuple[str, ...], value: float | None) -> None:
    """Set those of the settings that a config, or its text model's, has; None: leave them."""
    if value is None:
        return
    for part in (config, config.get_text_config()):
        for name in names:
            if hasattr(part, name):
                setattr(part, name, value)


def _attention(how: str) -> dict[str, str]:
    if how == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "llm.attention=flash_attention_2 needs a GPU and the package flash-attn, but "
            "one of them is not here. Install it, or give --llm.attention=sdpa."
        )
    # sdpa is transformers' own choice for a model that has it.
    return {} if how == "sdpa" else {"attn_implementation": how}


def can_quantize() -> bool:
    """Whether weights of 8 and 4 bits can be loaded here."""
    return torch.cuda.is_available() and bool(is_bitsandbytes_available())


def _quantization(bits: int) -> dict[str, Any]:
    if bits > 8:
        return {}
    if not can_quantize():
        raise UserError(
            f"llm.bits={bits} needs a GPU and the package bitsandbytes, but one of them is "
            "not here. Install it, or give --llm.bits=16."
        )
    if bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    device_map = {"": torch.cuda.current_device()}
    return {"quantization_config": quantization, "device_map": device_map}


# --- what a loaded LLM is


def longest_input(llm: Any) -> int | None:
    """Most embeddings that the LLM can read; None where its positions are not a table
    that ends."""
    reader = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    tables = []
    for name, module in reader.named_modules():
        is_positions = name.rpartition(".")[2] in ("embed_positions", "wpe")
        if isinstance(module, torch.nn.Embedding) and is_positions:
            tables.append(module.num_embeddings)
    if not tables:
        return None
    most = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return min(*tables, most or tables[0])


def llm_width(llm: Any) -> int:
    """E, the width of what the LLM reads instead of words."""
    return int(llm.get_input_embeddings().embedding_dim)


def embedding_scale(llm: Any) -> float:
    """What the LLM multiplies its word embeddings by (sqrt(E) or 1).

    Visual tokens must be as large as embedded words. Raises UserError for an LLM that
    does not read embeddings as it reads words.
    """
    return word_scale(probe_of(llm))
