"""Load an export folder, or parts of it."""

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
    FEATURES_FILE,
    LANGUAGE_MODEL,
    LORA_CONFIG_FILE,
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
from flallm_ds.models.llm.tuning import read_lora
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.models.weights import Weights, load_weights, must_hold


@dataclass(frozen=True)
class Export:
    """The content of an export folder, in eval mode on the CPU."""

    settings: dict[str, Any]
    visual: FeatureExtractor
    translator: SignTranslator
    codec: TextCodec


def read_visual(folder: Path) -> VisualEncoder:
    """Load only the visual encoder, in eval mode."""
    settings = read_settings(folder)
    visual = VisualEncoder.from_settings(settings["visual"])
    visual.chunk_frames = settings.get("frames", {}).get("chunk_frames", 0)
    load_weights(visual, Weights(folder, VISUAL_FILE))
    return visual.eval()


def read_features(folder: Path, kind: Kind | None = None) -> FeatureExtractor:
    """Load the feature extractor in eval mode: the part that stage 2 takes from stage 1.

    kind: kind of features; default: that of the export. Raises UserError if the export does
    not contain the weights for this kind.
    """
    settings = read_settings(folder)
    visual = read_visual(folder)
    own = settings["features"]
    kind = kind or own["kind"]
    if kind != "light_t":
        return FeatureExtractor(visual, kind).eval()
    if own["kind"] == "light_t":
        extractor = FeatureExtractor.from_settings(visual, own)
        # The visual encoder is in another file.
        parts = dict(extractor.named_children())
        del parts["encoder"]
        load_weights(nn.ModuleDict(parts), Weights(folder, FEATURES_FILE))
        return extractor.eval()
    if settings["stage"] != "visual":
        raise UserError(
            f"--visual_run must be a run of stage visual for llm.input=light_t, got {folder} "
            f"of stage {settings['stage']}. Give its stage 1 as --visual_run."
        )
    light_t = _read_light_translator(folder / LANGUAGE_MODEL)
    adapter = _read_adapter(folder, visual.feature_width, light_t)
    return FeatureExtractor(visual, kind, adapter, encoder_of(light_t.get_encoder())).eval()


def trained_bits(folder: Path, settings: dict[str, Any]) -> Bits:
    """Return the number of bits of an LLM parameter in the run that wrote the export.

    32 if the LLM was quantized and this machine cannot quantize. 32 also for fp16, because
    fp32 represents all its values.
    """
    quantized: Bits | None = settings.get("bits")
    if quantized is not None:
        return quantized if can_quantize() else 32
    # The adapter always exists and has the dtype of the engine.
    weights = Weights(folder, ADAPTER_FILE)
    return 16 if weights[weights.names[0]].dtype == torch.bfloat16 else 32


def read(folder: Path, options: LlmOptions | None = None) -> Export:
    """Load a complete export, ready to translate, without a second copy of the weights.

    options: how to load the LLM; None: in the precision of its training. The adapter is
    bf16 if it was trained in bf16, unless options ask for fp32. Raises UserError if the
    folder is incomplete.
    """
    settings = read_settings(folder)
    visual = read_features(folder).requires_grad_(False)
    lm_folder = folder / LANGUAGE_MODEL
    options = options or LlmOptions(bits=trained_bits(folder, settings))
    codec = TextCodec.load(lm_folder, options.hub_code)
    if settings["stage"] == "visual":
        codec = codec.for_light_t()
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
    """Load the LLM of an export, with unmerged LoRA adapters if it has them."""
    lm_folder = folder / LANGUAGE_MODEL
    if settings["base"] is None:
        weights = Weights(lm_folder)
        language_model = load_llm(str(lm_folder), options)
        # transformers would initialize missing tensors with random values.
        must_hold(weights, language_model)
        return language_model
    language_model = load_llm(base_llm(folder, settings["base"]), options)
    if (lm_folder / LORA_CONFIG_FILE).is_file():
        read_lora(lm_folder, language_model)
    elif settings["training"]["tune"] != "frozen":
        raise UserError(
            f"Cannot read export {folder}: {lm_folder / LORA_CONFIG_FILE} does not exist."
        )
    return language_model


def _read_light_translator(folder: Path) -> Any:
    """Load Light-T. Raises UserError if its config.json or its weights cannot be read."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Cannot read {folder / 'config.json'}: {reason}") from error
    light_t = light_translator_from_config(config)
    load_weights(light_t, Weights(folder))
    return light_t


def _read_adapter(folder: Path, in_width: int, language_model: Any) -> Adapter:
    """Load the adapter from features of `in_width` to embeddings of the language model."""
    adapter = Adapter(in_width, llm_width(language_model), embedding_scale(language_model))
    load_weights(adapter, Weights(folder, ADAPTER_FILE))
    return adapter
