"""Build the language side of a run: the codec of its texts, and Light-T or the LLM."""

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

# of the training tokens: a model learns to leave out what it reads as unknown
MOST_UNKNOWN = 0.001


def open_codec(
    config: RunConfig, folder: Path, train_index: Index, world: World
) -> TextCodec:
    """Make the codec of the training text, on rank 0 and once a run; every rank reads it."""
    path = folder / "tokenizer"

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
    llm = llm_config(config.llm.name, config.llm.hub_code)
    # Each entry is CORPUS=NAME, which the config has checked.
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
    """Raise UserError where the LLM's tokenizer cannot write the texts; print a few unknown ones.

    name: of the LLM.
    """
    unknown = codec.unknown_tokens(texts)
    require(
        unknown.num_unknown <= MOST_UNKNOWN * unknown.num_tokens,
        "llm.name must have a tokenizer that can write the training text, at most "
        f"{100 * MOST_UNKNOWN:g} % of the tokens unknown, got {name} with {unknown}. Give "
        "another --llm.name (a stand-in LLM: one with a larger --vocab_size), or replace "
        "these characters in the texts.",
    )
    if unknown.num_unknown:
        print(f"unknown to the tokenizer of {name}: {unknown}.", flush=True)


def visual_model(
    config: RunConfig, codec: TextCodec, visual: FeatureExtractor
) -> SignTranslator:
    """Build what stage visual trains: the encoder, an adapter, and Light-T."""
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
    """Build what stages llm and joint train. Raises UserError where the LLM cannot be loaded.

    folder: of the run, for the LLM with a trimmed vocabulary. A frozen encoder is left
    out.
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
        # a resumed run, which trims nothing, draws the same weights
        torch.manual_seed(config.train.seed)
    try:
        llm = load_llm(name, llm_options(config, ds_config))
    except UserError as error:
        if world.is_main or world.local_rank:
            raise
        # rank 0 may not have met it
        raise RankError(f"{error} (On {socket.gethostname()}.)") from error
    tune(llm, llm_tuning(config), config.train.seed)
    del partitioning
    if config.llm.checkpointing:
        checkpoint_llm(llm)
    adapter = Adapter(extractor.feature_width, llm_width(llm), embedding_scale(llm))
    visual = extractor if config.trains_visual else None
    model = SignTranslator(visual, adapter, llm, codec, config.llm.loss)
    return model if zero_stage(ds_config) == 3 else model.to(world.device)


def llm_options(config: RunConfig, ds_config: dict[str, Any]) -> LlmOptions:
    llm = config.llm
    # Load in the precision in which DeepSpeed keeps the weights, or quantised.
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
    """Raise UserError for an LLM that cannot be loaded, if this run still has to read it."""
    run, llm = Path(config.run), config.llm
    # A resumed run reads the copies in its folder. Stage visual reads the tokenizer alone.
    is_visual = config.stage == "visual"
    has_codec, has_llm = (run / "tokenizer").is_dir(), (run / "llm_trimmed").is_dir()
    if has_codec and (has_llm or is_visual):
        return
    # What is trimmed is quantised later: trimming itself reads 16 bits.
    bits = 16 if is_visual or llm.trim_vocabulary else llm.bits
    check_llm(llm.name, llm.pretrained and not is_visual, llm.hub_code, bits)


def _write_once(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Write a folder on rank 0 if it is not there. Raises UserError on every rank if it
    cannot."""

    def first() -> None:
        if folder.is_dir():
            return
        try:
            replace_folder(folder, write)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder} must be written, but was not ({error}). Free some space and "
                "give the same command again."
            ) from error

    main_first(first, world)
