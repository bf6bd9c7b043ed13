"""Load an LLM, encoder-decoder or decoder-only, from a hub id or a folder."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from flallm_ds.errors import UserError
from flallm_ds.models.llm.quantized import check_not_quantized
from flallm_ds.models.llm.source import (
    LOAD_ERRORS,
    Bits,
    LlmSource,
    auto_class,
    check_stored_bits,
    generation_config,
    not_loaded,
    open_source,
)
from flallm_ds.models.llm.stored import (
    check_fit,
    freed_at_once,
    open_checkpoint,
    remaining_ties,
    tied_before_loading,
    untied_names,
)
from flallm_ds.models.llm.word_scale import probe_of, word_scale
from flallm_ds.models.pretrained import check_weights

# The names of the two dropouts in the configs of transformers.
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
# Layers must not be skipped at random: under ZeRO-3 a rank that skips a layer leaves the
# others waiting in its gather.
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class LlmOptions:
    """Options for loading an LLM.

    The dropouts replace those of the config if they are given and the model has them.
    """

    dropout: float | None = None
    attention_dropout: float | None = None
    # sdpa (eager for a model without it), eager or flash_attention_2
    attention: str = "sdpa"
    # False: random weights, drawn without a change of PyTorch's generator
    pretrained: bool = True
    # run code that comes with the model
    hub_code: bool = False
    bits: Bits = 32


def load_llm(name: str, options: LlmOptions = LlmOptions()) -> Any:
    """Return the LLM `name` in eval mode.

    Under ZeRO-3 (while an `HfDeepSpeedConfig` is alive) the DeepSpeed JSON sets the type of
    the parameters, and no rank holds a complete copy. Raises UserError if the LLM cannot be
    loaded with these options.
    """
    source = open_source(name, options.hub_code)
    check_stored_bits(options.bits, source)
    config = source.config
    set_dropouts(config, options)
    arguments = {
        "dtype": torch.float32 if options.bits == 32 else torch.bfloat16,
        **_attention(options.attention),
        **_quantization(options.bits),
    }
    try:
        word_scale(source.skeleton())  # an error for an LLM that cannot read visual tokens
        with freed_at_once():
            return _model(source, options, arguments)
    except LOAD_ERRORS as error:
        raise not_loaded(name, error) from error


def _model(source: LlmSource, options: LlmOptions, arguments: dict[str, Any]) -> Any:
    """Build the model, with random or stored weights. arguments: of `from_pretrained`."""
    name, config = source.name, source.config
    auto = auto_class(config)
    if not options.pretrained:
        # Under ZeRO-3 rank 0 alone draws, so the ranks' generators would differ afterwards.
        with torch.random.fork_rng():
            made = auto.from_config(config, trust_remote_code=options.hub_code, **arguments)
        return made.eval()
    # transformers cannot load these checkpoints, or not within the memory of a rank.
    partitioned = is_deepspeed_zero3_enabled() and options.bits > 8
    if source.quantization or source.wrapped or partitioned:
        return _from_tensors(source, arguments)
    check_weights(name)
    # transformers would ignore scales without a quantisation config, and load wrong values.
    check_not_quantized(name, open_checkpoint(name))
    model, found = auto.from_pretrained(
        name,
        config=config,
        generation_config=generation_config(name, config),
        trust_remote_code=options.hub_code,
        output_loading_info=True,
        **arguments,
    )
    check_fit(name, model, found["missing_keys"], found["unexpected_keys"])
    return model


def _from_tensors(source: LlmSource, arguments: dict[str, Any]) -> Any:
    """Return the pretrained model, reading one tensor at a time.

    Under ZeRO-3 rank 0 reads the tensors and every rank keeps its part. transformers itself
    maps all files at once, so that rank 0 holds the complete checkpoint in the end.
    Quantised weights and the text model of a multimodal model are also read in this way.
    """
    name = source.name
    skeleton = source.skeleton()
    state = source.tensors(skeleton)
    untied = untied_names(skeleton, state)
    # Weights that are tied share memory from the start, also under ZeRO-3.
    with tied_before_loading(type(skeleton), untied):
        if is_deepspeed_zero3_enabled() and torch.distributed.get_rank() != 0:
            # Only the values of rank 0 are used.
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
        # A later call of tie_weights must not tie them either.
        model._tied_weights_keys = remaining_ties(model._tied_weights_keys, untied)
    model.config.name_or_path = model.name_or_path = name
    check_fit(name, model, found["missing_keys"], found["unexpected_keys"])
    return model


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and type on the meta device, without reading it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def set_dropouts(config: Any, options: LlmOptions) -> None:
    """Set the dropouts of a config as a run does; layers are never skipped at random."""
    _set(config, _DROPOUTS, options.dropout)
    _set(config, _ATTENTION_DROPOUTS, options.attention_dropout)
    _set(config, _LAYER_DROPS, 0.0)


def _set(config: Any, names: tuple[str, ...], value: float | None) -> None:
    """Set those `names` that a config or its text model's config has; None: no change."""
    if value is None:
        return
    for part in (config, config.get_text_config()):
        for name in names:
            if hasattr(part, name):
                setattr(part, name, value)


def _attention(how: str) -> dict[str, str]:
    """Return the arguments for this attention. Raises UserError if it is not available."""
    if how == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "llm.attention must be sdpa or eager without a GPU and the package flash-attn, "
            "got flash_attention_2. Install the package, or give --llm.attention=sdpa."
        )
    # sdpa is the default of transformers for a model that has it.
    return {} if how == "sdpa" else {"attn_implementation": how}


def can_quantize() -> bool:
    """Return whether weights of 8 and 4 bits can be loaded on this machine."""
    return torch.cuda.is_available() and bool(is_bitsandbytes_available())


def _quantization(bits: int) -> dict[str, Any]:
    """Return the arguments for weights of 8 or 4 bits; none for more bits.

    Raises UserError without a GPU or bitsandbytes.
    """
    if bits > 8:
        return {}
    if not can_quantize():
        raise UserError(
            "llm.bits must be 16 without a GPU and the package bitsandbytes, got "
            f"{bits}. Install the package, or give --llm.bits=16."
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
    # The complete model goes to the GPU of this process.
    device_map = {"": torch.cuda.current_device()}
    return {"quantization_config": quantization, "device_map": device_map}


# --- properties of a loaded LLM


def longest_input(llm: Any) -> int | None:
    """Return how many embeddings the LLM can read; None without a table of positions."""
    # The encoder of an encoder-decoder reads the visual tokens.
    reader = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    tables = []
    for name, module in reader.named_modules():
        # The names of position tables in BART and GPT-2, and in most other models.
        is_positions = name.rpartition(".")[2] in ("embed_positions", "wpe")
        if isinstance(module, torch.nn.Embedding) and is_positions:
            tables.append(module.num_embeddings)
    if not tables:
        return None
    # A table may have more rows than positions: BART's has two more.
    most = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return min(*tables, most or tables[0])


def llm_width(llm: Any) -> int:
    """Return E, the width of the embeddings that the LLM reads."""
    return int(llm.get_input_embeddings().embedding_dim)


def embedding_scale(llm: Any) -> float:
    """Return the factor of the word embeddings, such as sqrt(E) or 1.

    Visual tokens must have the size of embedded words. Raises UserError for an LLM that
    reads embeddings in another way than words.
    """
    return word_scale(probe_of(llm))
