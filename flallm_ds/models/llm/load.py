"""The LLM, encoder-decoder or decoder-only: loaded from a hub id or folder; its vocabulary trimmed."""

import copy
import json
import pickle
from collections.abc import Iterable, Iterator
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
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    cached_file,
    is_bitsandbytes_available,
    is_flash_attn_2_available,
)

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.llm.quantized import (
    dequantized,
    method_of,
    must_be_plain,
    must_be_readable,
    quantization_of,
)
from flallm_ds.models.llm.stored import (
    NEEDLESS,
    freed_at_once,
    model_names,
    open_checkpoint,
    text_tensors,
    tied_before_loading,
    unfilled,
    unplaced,
    untied_names,
)
from flallm_ds.models.llm.vocabulary import chosen_rows, renumber, trimmed_config, word_dims
from flallm_ds.models.llm.word_scale import probe_of, word_scale
from flallm_ds.models.pretrained import check_llm_source, check_weights, first_line
from flallm_ds.models.weights import write_weights

# What transformers raises for a folder or hub id that does not hold a model it can load.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
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

# Multimodal model types whose text model, taken out, gives the logits of the whole model for text. Others are
# refused: Aya Vision, for one, leaves out its text model's logit_scale.
TAKEN_OUT = frozenset({
    "aria", "audioflamingo3", "deepseek_vl", "deepseek_vl_hybrid", "exaone4_5", "fast_vlm", "fuyu", "gemma3",
    "gemma4", "gemma4_unified", "glmasr", "got_ocr2", "hyperclovax_vision_v2", "idefics2", "idefics3",
    "internvl", "janus", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3",
    "moss_transcribe_diarize", "musicflamingo", "nemotron_h_omni", "ovis2", "paligemma", "perception_lm",
    "pp_chart2table", "qwen2_audio", "qwen3_5", "qwen3_5_moe", "qwen3_asr", "shieldgemma2", "smolvlm",
    "video_llama_3", "video_llava", "vipllava", "voxtral",
})  # fmt: skip
# Settings by which some text models change what their head says, None or 1 where they do not; most multimodal
# models have a plain head whatever these are, as PaliGemma 2's of a Gemma 2.
_OF_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping")
_WITH_LOGITS = ("gemma4", "gemma4_unified", "hyperclovax_vision_v2")  # they do as their text models
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
_FILE_BYTES = 10**9  # of a trimmed LLM's files: what waits in memory while one is written


Bits = Literal[32, 16, 8, 4]  # of a parameter: fp32, bf16, or integers of bitsandbytes


@dataclass(frozen=True)
class LlmOptions:
    """How an LLM is loaded. The dropouts replace its config's where given and where the model has them."""

    dropout: float | None = None
    attention_dropout: float | None = None
    attention: str = "sdpa"  # where the model has it, else eager; or eager, flash_attention_2
    pretrained: bool = True  # false: random weights, drawn from PyTorch's generator, which does not move
    hub_code: bool = False  # run code that comes with the model
    bits: Bits = 32


def llm_config(name: str, hub_code: bool = False) -> Any:
    """The config of the LLM `name`, of a multimodal model that of its text model.

    Raises UserError where there is none, or of another kind of model, or of one that is quantised in a way
    that cannot be undone.
    """
    return _source(name, hub_code).config


def check_llm(name: str, pretrained: bool = True, hub_code: bool = False, bits: Bits = 16) -> None:
    """Raise UserError for what can be said against an LLM without its weights being read.

    bits: that it is loaded in as it is; 16 where it is trimmed first.
    """
    _must_take(bits, _source(name, hub_code))
    if pretrained:
        check_weights(name)


@dataclass(frozen=True)
class _Source:
    """An LLM that is to be read.

    quantization: its config's settings, if its weights are quantised. wrapped: whether its tensors lie among
    those of a multimodal model.
    """

    name: str
    config: Any
    quantization: dict[str, Any]
    wrapped: bool

    def tensors(self, skeleton: Any) -> dict[str, torch.Tensor]:
        """Those of the LLM by their names in the checkpoint, none of them quantised.

        skeleton: the model on the meta device; of a multimodal checkpoint the names are those of its parts.
        """
        check_weights(self.name)
        dtype = getattr(self.config, "dtype", None) or torch.bfloat16
        state = dequantized(self.name, open_checkpoint(self.name), self.quantization, dtype)
        return text_tensors(skeleton, state) if self.wrapped else state


def _must_take(bits: Bits, source: _Source) -> None:
    """Raise UserError for integers of weights that are computed as they are read, or picked out of others."""
    if bits > 8 or not (source.quantization or source.wrapped):
        return
    got = f"quantised with {method_of(source.quantization)}" if source.quantization else "a multimodal model"
    raise UserError(
        f"llm.bits must be 16 where the weights of the LLM {source.name} are not ordinary ones, got {bits} "
        f"and {got}. Give --llm.bits=16, or --llm.trim_vocabulary=true, which writes ordinary weights first."
    )


def _source(name: str, hub_code: bool) -> _Source:
    check_llm_source(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=hub_code)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, error) from error
    quantization = quantization_of(config)
    must_be_readable(name, method_of(quantization))
    text = _text_part(config)
    text.name_or_path = name
    if getattr(text, "hidden_size_per_layer_input", None):
        raise UserError(
            f"the LLM must read embeddings, but each layer of {name} (a {text.model_type}) also reads token "
            "ids, which a video does not have. Give as --llm.name another one, such as google/gemma-3-1b-pt."
        )
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    _auto_class(text)
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and rows is not None and pad >= rows:  # a token that was added, but not its row
        text.pad_token_id = None if isinstance(text.eos_token_id, list) else text.eos_token_id
    for field in ("forced_bos_token_id", "forced_eos_token_id"):
        if getattr(text, field, None) is not None:
            setattr(text, field, None)  # our texts start with the language, and end by themselves
    return _Source(name, text, quantization, text is not config)


def _text_part(config: Any) -> Any:
    """The config of a multimodal model's text model; of another model its own.

    Raises UserError where the text model alone is no LLM, or is not known to give the logits of the whole.
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
            f"{config.name_or_path} is a multimodal {config.model_type}, which is neither, and its text "
            "model cannot be taken out. Give as --llm.name a text-only model"
            f"{f', such as {sibling}' if sibling else ' of its family'}."
        )
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = text.dtype or config.dtype
    return text


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
    if isinstance(error, UserError):
        return error
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in reason:
        return UserError(
            f"the LLM {name} must load, but did not: its pickled weights (.bin) are damaged, or hold "
            "more than tensors, which could run code. Fetch the safetensors files of the model."
        )
    if "custom code" in reason:
        return UserError(
            f"the LLM {name} must be of a kind that transformers knows, but comes with its own code. "
            "Read that code, then give --llm.hub_code=true to run it."
        )
    return UserError(f"the LLM {name} must load, but did not: {reason} Check --llm.name.")


def longest_input(llm: Any) -> int | None:
    """Most embeddings that the LLM can read; None where its positions are not a table that ends."""
    reader = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    tables = [
        module.num_embeddings
        for name, module in reader.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("embed_positions", "wpe")
    ]
    most = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return min(*tables, most or tables[0]) if tables else None


def load_llm(name: str, options: LlmOptions = LlmOptions()) -> Any:
    """The LLM `name`, in eval mode.

    Under ZeRO-3 (an `HfDeepSpeedConfig` is alive) its JSON decides the type of the parameters, and no rank
    holds a whole copy. Raises UserError where it cannot be loaded as asked.
    """
    source = _source(name, options.hub_code)
    _must_take(options.bits, source)
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
        word_scale(_skeleton(config, options.hub_code))  # refuses what cannot read visual tokens
        with freed_at_once():
            return _model(source, options, arguments)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, error) from error


def _model(source: _Source, options: LlmOptions, arguments: dict[str, Any]) -> Any:
    name, config = source.name, source.config
    auto = _auto_class(config)
    if not options.pretrained:
        with torch.random.fork_rng():  # under ZeRO-3 rank 0 alone draws
            return auto.from_config(config, trust_remote_code=options.hub_code, **arguments).eval()
    if source.quantization or source.wrapped or (is_deepspeed_zero3_enabled() and options.bits > 8):
        return _from_tensors(source, options.hub_code, arguments)
    check_weights(name)
    must_be_plain(name, open_checkpoint(name))
    model, found = auto.from_pretrained(
        name,
        config=config,
        generation_config=_generation_config(name, config),
        trust_remote_code=options.hub_code,
        output_loading_info=True,
        **arguments,
    )
    _must_fit(name, model, found["missing_keys"], found["unexpected_keys"])
    return model


def _from_tensors(source: _Source, hub_code: bool, arguments: dict[str, Any]) -> Any:
    """The pretrained model from tensors that are read one at a time.

    Under ZeRO-3 rank 0 reads them and every rank keeps its part: transformers' own way maps all files
    at once, so that rank 0 comes to hold the whole checkpoint. Quantised weights and the text model of a
    multimodal one are read this way, too.
    """
    name = source.name
    skeleton = _skeleton(source.config, hub_code)
    state = source.tensors(skeleton)
    untied = untied_names(skeleton, state)
    with tied_before_loading(type(skeleton), untied):
        if is_deepspeed_zero3_enabled() and torch.distributed.get_rank() != 0:
            state = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in state.items()}
        model, found = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=state,
            generation_config=_generation_config(name, source.config),
            output_loading_info=True,
            **arguments,
        )
    if untied:
        model._tied_weights_keys = {t: s for t, s in model._tied_weights_keys.items() if t not in untied}
    model.config.name_or_path = model.name_or_path = name
    _must_fit(name, model, found["missing_keys"], found["unexpected_keys"])
    return model


def _skeleton(config: Any, hub_code: bool) -> Any:
    """The model on the meta device: names and shapes, no weights; whole under ZeRO-3 as well."""
    with set_zero3_state(), torch.device("meta"), no_init_weights():
        return _auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=hub_code)


def ids_alone(*sources: Any) -> GenerationConfig:
    """The ids of configs, the first that has one, without their search settings: the run says how to search.

    Left out are penalties, sampling, lengths, beams, and forced and forbidden tokens.
    """
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    held = {n: [getattr(s, n) for s in sources if getattr(s, n, None) is not None] for n in names}
    return GenerationConfig(**{name: values[0] for name, values in held.items() if values})


def _generation_config(name: str, config: Any) -> GenerationConfig:
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
    generation = _generation_config(str(folder), config)
    generation.to_json_file(folder / GENERATION_CONFIG_NAME)


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


def can_quantize() -> bool:
    """Whether weights of 8 and 4 bits can be loaded here."""
    return torch.cuda.is_available() and bool(is_bitsandbytes_available())


def _quantization(bits: int) -> dict[str, Any]:
    if bits > 8:
        return {}
    if not can_quantize():
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


def _must_fit(name: str, model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise UserError for parts without a tensor, or tensors without a part.

    transformers would go on with random numbers for the first, and without the second.
    """
    surplus = sorted(key for key in unexpected if not NEEDLESS.search(key))
    if surplus:
        raise UserError(
            f"the LLM {name} must be of the kind that its config.json says, but {len(surplus)} of its "
            f"tensors belong to no part of a {type(model).__name__}, {surplus[0]} being one. Check "
            "--llm.name and its config.json."
        )
    lost = sorted(key for key in missing if not NEEDLESS.search(key))
    if lost:
        raise UserError(
            f"the LLM {name} must hold all weights of its model, but lacks {len(lost)}, {lost[0]} being one. "
            "Check --llm.name, or give --llm.pretrained=false for random weights."
        )


def llm_width(llm: Any) -> int:
    """E, the width of what the LLM reads in place of words."""
    return int(llm.get_input_embeddings().embedding_dim)


def embedding_scale(llm: Any) -> float:
    """What the LLM multiplies its word embeddings by (sqrt(E) or 1): visual tokens must be as large.

    Raises UserError for an LLM that does not read embeddings as it reads words.
    """
    return word_scale(probe_of(llm))


def trim_llm(name: str, codec: TextCodec, out: Path, hub_code: bool = False) -> None:
    """Write the LLM `name` to `out` with the rows of the codec's kept pieces alone, codec beside it.

    Tensor by tensor, in the types they are stored in. Run on one rank. Ids that the LLM has no rows for stay
    without. Source: FLa-LLM, section 4.1 (2,215 pieces on PHOENIX14T).
    """
    try:
        source = _source(name, hub_code)
        skeleton = _skeleton(source.config, hub_code)
        word_scale(probe_of(skeleton))  # refuses what cannot read visual tokens
        state = source.tensors(skeleton)
        names = model_names(skeleton, list(state))
        _must_fit(name, skeleton, unfilled(skeleton, names), unplaced(skeleton, names, state))
        twins = skeleton.all_tied_weights_keys.keys() - untied_names(skeleton, state)
    except _LOAD_ERRORS as error:
        raise _not_loaded(name, error) from error
    words = skeleton.get_input_embeddings().num_embeddings
    kept = codec.kept_ids[codec.kept_ids < words]
    config = trimmed_config(skeleton.config, codec, words, len(kept))
    dims = word_dims(skeleton, _skeleton(config, hub_code))
    out.mkdir(parents=True, exist_ok=True)
    twins = {t for t in twins if skeleton.all_tied_weights_keys[t] in names.values()}
    write_weights(
        out,
        (
            (key, chosen_rows(state[key], kept, dims[own]) if own in dims else state[key])
            for key, own in names.items()
            if own not in twins
        ),
        file_bytes=_FILE_BYTES,
    )
    generation = _generation_config(name, skeleton.config)
    renumber(generation, codec)
    save_configs(skeleton, config, generation, out)
    codec.save(out)


def untrim_llm(trimmed: Path, base_name: str, codec: TextCodec, out: Path, hub_code: bool = False) -> None:
    """Write a trained, trimmed LLM into the folder `out` with all the words of the LLM that it began as.

    trimmed: a folder that was written by `trim_llm` or trained since. Words that were not kept have the rows
    of `base_name`. Raises UserError where the two are not of one kind.
    """
    sources = _source(str(trimmed), hub_code), _source(base_name, hub_code)
    small, whole = (_skeleton(source.config, hub_code) for source in sources)
    try:
        state, base = sources[0].tensors(small), sources[1].tensors(whole)
    except _LOAD_ERRORS as error:
        raise _not_loaded(f"{trimmed} or {base_name}", error) from error
    names = model_names(small, list(state))
    _must_fit(str(trimmed), small, unfilled(small, names), unplaced(small, names, state))
    base_names = model_names(whole, list(base))
    _must_fit(base_name, whole, unfilled(whole, base_names), unplaced(whole, base_names, base))
    dims = _same_but_for_words(small, whole, base_name)
    base_rows = _by_own_name(whole, base)
    kept = codec.kept_ids[codec.kept_ids < whole.get_input_embeddings().num_embeddings]

    out.mkdir(parents=True, exist_ok=True)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, own in names.items():
            tensor = state[key].detach()
            if own in dims:
                rows = base_rows.get(own)
                if rows is None:  # a bias that old checkpoints leave out
                    rows = torch.zeros(whole.state_dict()[own].shape)
                place = torch.from_numpy(kept)
                tensor = rows.to(tensor.dtype, copy=True).index_copy_(dims[own], place, tensor)
            yield key, tensor

    write_weights(out, tensors(), file_bytes=_FILE_BYTES)
    whole.config.dtype = small.config.dtype
    save_configs(whole, whole.config, _generation_config(base_name, whole.config), out)
    codec.untrimmed().save(out)


def _same_but_for_words(small: Any, whole: Any, base_name: str) -> dict[str, int]:
    """The dimension of words of each tensor that has one. Raises UserError where more differs."""
    names = small.state_dict().keys()
    if small.config.model_type == whole.config.model_type and names == whole.state_dict().keys():
        dims = word_dims(whole, small)
        words = {small.get_input_embeddings().num_embeddings}
        if {small.state_dict()[name].shape[dim] for name, dim in dims.items()} <= words:
            return dims
    raise UserError(f"the base LLM must be the one that was trimmed, but {base_name} has other tensors.")


def _by_own_name(skeleton: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by every name that the model has for them, tied ones by each of theirs."""
    stored = {name: state[key] for key, name in model_names(skeleton, list(state)).items()}
    ties = skeleton.all_tied_weights_keys
    for target, source in ties.items():
        if target in stored:
            stored.setdefault(source, stored[target])
    return stored | {t: stored[s] for t, s in ties.items() if t not in stored and s in stored}


def save_configs(llm: Any, config: Any, generation: Any, out: Path) -> None:
    """Write config.json, generation_config.json, and the code of the LLM's class where it is its own."""
    config.architectures = [type(llm).__name__]
    if llm._auto_class is not None:
        custom_object_save(llm, out, config=config)
    config.save_pretrained(out)
    generation.to_json_file(out / GENERATION_CONFIG_NAME)  # whatever its checks think of it
