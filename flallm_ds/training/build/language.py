"""Build the codec of the texts of a run, and its language model: Light-T or the LLM."""

import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.dist import World, main_first
from flallm_ds.errors import RankError, UserError, require
from flallm_ds.files import replace_folder
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.checkpointing import checkpoint_llm
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.light_translator import build_light_translator
from flallm_ds.models.llm.load import LlmOptions, embedding_scale, llm_width, load_llm
from flallm_ds.models.llm.source import check_llm, is_decoder_only, llm_config
from flallm_ds.models.llm.trim import trim_llm
from flallm_ds.models.llm.tuning import Tuning, check_bits, tune
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.training import engine as ds
from flallm_ds.training.deepspeed_json import zero_stage

# Largest share of unknown tokens in the training text: a model learns to leave them out.
MOST_UNKNOWN = 0.001


def open_codec(
    config: RunConfig, folder: Path, train_index: Index, world: World
) -> TextCodec:
    """Open the codec of the training text; rank 0 writes it at the first start of a run.

    Every rank must call it. Raises UserError on every rank if it cannot be written, or if
    the tokenizer of the LLM does not fit the texts.
    """
    path = folder / "tokenizer"

    # A resumed run must decode with the same vocabulary, even if the tokenizer of the LLM
    # has changed on the hub. So the codec is written once and then read from the run.
    def write(out: Path) -> None:
        texts = train_index.strings("text")
        codec = TextCodec.for_training_text(
            config.llm.name,
            _instruction(config, train_index),
            texts,
            config.llm.trim_vocabulary,
            config.llm.hub_code,
        )
        check_unknown(codec, texts, config.llm.name)
        codec.save(out)

    _write_once(path, write, world)
    codec = TextCodec.load(path, config.llm.hub_code)
    return codec.for_light_t() if config.stage == "visual" else codec


def _instruction(config: RunConfig, train_index: Index) -> Instruction:
    """Return the prompt and the languages of a run, and the facts about its LLM that decide
    the format."""
    llm = llm_config(config.llm.name, config.llm.hub_code)
    # The config has checked that each entry is CORPUS=NAME.
    sign_languages = dict(entry.split("=") for entry in config.llm.sign_languages)
    return Instruction(
        decoder_only=is_decoder_only(llm),
        start_token=getattr(llm, "decoder_start_token_id", None),
        rows=getattr(llm.get_text_config(), "vocab_size", None),
        language=config.llm.language,
        languages=tuple(sorted(set(train_index.strings("language")))),
        prompt=config.llm.prompt,
        sign_languages=sign_languages,
    )


def check_unknown(codec: TextCodec, texts: Iterable[str], name: str) -> None:
    """Raise UserError if too many tokens of the texts are unknown; print a few if any are.

    name: the LLM of the tokenizer.
    """
    unknown = codec.unknown_tokens(texts)
    require(
        unknown.num_unknown <= MOST_UNKNOWN * unknown.num_tokens,
        "llm.name must have a tokenizer that can write the training text, with at most "
        f"{100 * MOST_UNKNOWN:g} % unknown tokens, got {name} with {unknown}. Use another "
        "--llm.name (a stand-in LLM: one with a larger --vocab_size), or replace these "
        "characters in the texts.",
    )
    if unknown.num_unknown:
        print(f"unknown to the tokenizer of {name}: {unknown}.", flush=True)


def visual_model(
    config: RunConfig, codec: TextCodec, visual: FeatureExtractor
) -> SignTranslator:
    """Build the model of stage visual: the visual encoder, an adapter, and Light-T."""
    light_t = build_light_translator(config.light_t.size, codec, config.light_t.dropout)
    adapter = Adapter(visual.feature_width, llm_width(light_t), embedding_scale(light_t))
    return SignTranslator(visual, adapter, light_t, codec)


def llm_model(
    config: RunConfig,
    codec: TextCodec,
    folder: Path,
    extractor: FeatureExtractor,
    ds_config: dict[str, Any],
    world: World,
) -> SignTranslator:
    """Build the model of stages llm and joint: the LLM, an adapter, and a trained encoder.

    folder: of the run, for the LLM with a trimmed vocabulary. Every rank must call it.
    Raises UserError if the LLM cannot be loaded, RankError if only some ranks cannot.
    """
    name = config.llm.name
    check_bits(config.llm.bits, config.llm.tune, zero_stage(ds_config), world.device)
    if config.llm.trim_vocabulary:
        trimmed = folder / "llm_trimmed"

        def trim(out: Path) -> None:
            trim_llm(config.llm.name, codec, out, config.llm.hub_code)

        _write_once(trimmed, trim, world)
        name = str(trimmed)
    partitioning = ds.model_loading(ds_config)  # held until the model is loaded
    if not config.llm.pretrained:
        # Seed again, because trimming may have drawn numbers: a resumed run trims nothing,
        # but must draw the same weights.
        torch.manual_seed(config.train.seed)
    # Under ZeRO-3, each parameter is partitioned as soon as it is created.
    try:
        llm = load_llm(name, llm_options(config, ds_config))
    except UserError as error:
        # Rank 0 prints the UserErrors of all ranks. A file may be missing only on another
        # machine: one rank of each machine prints that itself.
        if world.is_main or world.local_rank:
            raise
        raise RankError(f"{error} (On {socket.gethostname()}.)") from error
    tune(llm, llm_tuning(config), config.train.seed)
    del partitioning
    if config.llm.checkpointing:
        checkpoint_llm(llm)
    adapter = Adapter(extractor.feature_width, llm_width(llm), embedding_scale(llm))
    # A frozen encoder stays outside the model: neither DeepSpeed nor a checkpoint needs it.
    visual = extractor if config.trains_visual else None
    model = SignTranslator(visual, adapter, llm, codec, config.llm.loss)
    # ZeRO-3 has partitioned the parameters already, and decides their device.
    return model if zero_stage(ds_config) == 3 else model.to(world.device)


def llm_options(config: RunConfig, ds_config: dict[str, Any]) -> LlmOptions:
    """Return the options for loading the LLM of a run."""
    llm = config.llm
    # Load in the precision of the weights in DeepSpeed, or quantised.
    bits: Literal[32, 16, 8, 4] = 16 if ds_config.get("bf16", {}).get("enabled") else 32
    if llm.bits < 16:
        bits = llm.bits
    return LlmOptions(
        llm.dropout,
        llm.attention_dropout,
        llm.attention,
        llm.pretrained,
        llm.hub_code,
        bits,
    )


def llm_tuning(config: RunConfig) -> Tuning:
    """Return which parameters of the LLM a run trains, and the settings of LoRA."""
    llm = config.llm
    return Tuning(
        llm.tune,
        llm.layers,
        llm.lora_rank,
        llm.lora_alpha,
        llm.lora_dropout,
        llm.lora_targets,
    )


def check_llm_of(config: RunConfig) -> None:
    """Raise UserError if the LLM of a run cannot be loaded, unless the run has a copy."""
    run, llm = Path(config.run), config.llm
    # A resumed run reads the copies in its folder. Stage visual reads only the tokenizer.
    is_visual = config.stage == "visual"
    has_codec, has_llm = (run / "tokenizer").is_dir(), (run / "llm_trimmed").is_dir()
    if has_codec and (has_llm or is_visual):
        return
    # Trimming reads 16 bits; the trimmed copy is quantised when it is loaded.
    bits = 16 if is_visual or llm.trim_vocabulary else llm.bits
    check_llm(llm.name, llm.pretrained and not is_visual, llm.hub_code, bits)


def _write_once(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Write a folder on rank 0, unless it exists. Raises UserError on every rank if rank 0
    cannot write it."""

    def first() -> None:
        if folder.is_dir():
            return
        try:
            replace_folder(folder, write)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Cannot write {folder}: {error}. Free some space and run the same command "
                "again."
            ) from error

    main_first(first, world)
