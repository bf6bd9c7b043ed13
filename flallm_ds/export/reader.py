"""Load an export folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.export.format import (
    ADAPTER_FILE,
    ADDITIONS,
    FEATURES_FILE,
    LANGUAGE_MODEL,
    VISUAL_FILE,
    base_llm,
    read_settings,
)
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.feature_extractor import FeatureExtractor, Kind, encoder_of
from flallm_ds.models.light_translator import light_translator_from_config
from flallm_ds.models.llm.load import (
    LlmOptions,
    can_quantize,
    embedding_scale,
    llm_width,
    load_llm,
)
from flallm_ds.models.llm.source import Bits
from flallm_ds.models.llm.tuning import read_additions
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.models.weights import Weights, load_weights, must_hold


@dataclass(frozen=True)
class Export:
    """What an export folder holds, in eval mode on the host."""

    settings: dict[str, Any]
    visual: FeatureExtractor
    translator: SignTranslator
    codec: TextCodec


def read_visual(folder: Path) -> VisualEncoder:
    """The visual encoder alone, in eval mode."""
    settings = read_settings(folder)
    visual = VisualEncoder.from_settings(settings["visual"])
    visual.chunk_frames = settings.get("frames", {}).get("chunk_frames", 0)
    load_weights(visual, Weights(folder, VISUAL_FILE))
    return visual.eval()


def read_features(folder: Path, kind: Kind | None = None) -> FeatureExtractor:
    """What an LLM's adapter reads, in eval mode: what stage 2 takes from stage 1.

    kind: default that of the export. Raises UserError where the export has not got what
    this kind needs.
    """
    settings = read_settings(folder)
    visual = read_visual(folder)
    own = settings["features"]
    kind = kind or own["kind"]
    if kind != "light_t":
        return FeatureExtractor(visual, kind).eval()
    if own["kind"] == "light_t":
        extractor = FeatureExtractor.from_settings(visual, own)
        # The visual encoder has a file of its own.
        parts = dict(extractor.named_children())
        del parts["visual"]
        load_weights(nn.ModuleDict(parts), Weights(folder, FEATURES_FILE))
        return extractor.eval()
    if settings["stage"] != "visual":
        raise UserError(
            f"llm.input=light_t must read a result of stage visual, but {folder} is of "
            f"stage {settings['stage']}. Give its stage 1 as --visual_run."
        )
    light_t = _read_light_translator(folder / LANGUAGE_MODEL)
    adapter = _read_adapter(folder, visual.feature_width, light_t)
    return FeatureExtractor(visual, kind, adapter, encoder_of(light_t.get_encoder())).eval()


def trained_bits(folder: Path, settings: dict[str, Any]) -> Bits:
    """Bits of an LLM's parameter in the run that wrote the export.

    32 where they were quantized and cannot be here; 32 for fp16 as well, because fp32
    holds its numbers.
    """
    quantized: Bits | None = settings.get("bits")
    if quantized is not None:
        return quantized if can_quantize() else 32
    weights = Weights(folder, ADAPTER_FILE)  # always there, and of the engine's type
    return 16 if weights[weights.names[0]].dtype == torch.bfloat16 else 32


def read(folder: Path, options: LlmOptions | None = None) -> Export:
    """Everything, ready to translate; no second copy of the weights is held on the way.

    options: of the LLM; none: in the precision of its training. The adapter is in bf16
    where it was trained so, unless the LLM is asked for in fp32. Raises UserError where
    the folder is not whole.
    """
    settings = read_settings(folder)
    visual = read_features(folder).requires_grad_(False)
    lm_folder = folder / LANGUAGE_MODEL
    options = options or LlmOptions(bits=trained_bits(folder, settings))
    codec = TextCodec.load(lm_folder, options.hub_code)
    if settings["stage"] == "visual":
        language_model = _read_light_translator(lm_folder)
    else:
        language_model = read_llm(folder, settings, options)
    adapter = _read_adapter(folder, visual.feature_width, language_model)
    if options.bits < 32:
        adapter.to(Weights(folder, ADAPTER_FILE)["0.weight"].dtype)
    translator = (
        SignTranslator(None, adapter, language_model, codec).eval().requires_grad_(False)
    )
    return Export(settings, visual, translator, codec)


def read_llm(folder: Path, settings: dict[str, Any], options: LlmOptions) -> Any:
    """Load the LLM of an export, with its LoRA adapters next to its weights if it has some."""
    lm_folder = folder / LANGUAGE_MODEL
    if settings["base"] is None:
        weights = Weights(lm_folder)
        language_model = load_llm(str(lm_folder), options)
        # transformers fills what is missing with random numbers
        must_hold(weights, language_model)
        return language_model
    language_model = load_llm(base_llm(folder, settings["base"]), options)
    if (lm_folder / ADDITIONS).is_file():
        read_additions(lm_folder, language_model)
    elif settings["training"]["tune"] != "frozen":
        raise UserError(
            f"{lm_folder} must hold {ADDITIONS}, but does not: it is not whole."
        )
    return language_model


def _read_light_translator(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} must hold a config.json, but does not: {str(error).splitlines()[0]}"
        ) from error
    light_t = light_translator_from_config(config)
    load_weights(light_t, Weights(folder))
    return light_t


def _read_adapter(folder: Path, in_width: int, language_model: Any) -> Adapter:
    adapter = Adapter(in_width, llm_width(language_model), embedding_scale(language_model))
    load_weights(adapter, Weights(folder, ADAPTER_FILE))
    return adapter
