"""The export folder: a trained translator that loads without DeepSpeed.

flallm.json                  stage, widths, frame picking, preprocessing, scores
visual_encoder.safetensors   the hand-over from stage 1 to stage 2
feature_extractor.safetensors  where the LLM reads states of Light-T's encoder: that and its VL-Adapter
adapter.safetensors
language_model/              Light-T or the LLM in the Hugging Face layout, tokenizer and vocabulary.json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.text import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.feature_extractor import FeatureExtractor, Kind, encoder_of
from flallm_ds.models.light_translator import light_translator_from_config
from flallm_ds.models.llm import load_llm
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder

FORMAT = "flallm_ds export 1"
SETTINGS_FILE = "flallm.json"
VISUAL_FILE = "visual_encoder.safetensors"
FEATURES_FILE = "feature_extractor.safetensors"
ADAPTER_FILE = "adapter.safetensors"
LANGUAGE_MODEL = "language_model"


@dataclass(frozen=True)
class Export:
    """What an export folder holds, in eval mode on the host."""

    settings: dict[str, Any]
    visual: FeatureExtractor
    translator: SignTranslator
    codec: TextCodec


def settings_of(
    config: RunConfig, index: Index, scores: dict[str, Any], features: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of flallm.json. index: of the training clips; a user's video is brought to their form.

    features: `FeatureExtractor.settings`; none: sign-wise features.
    short_side: of the stored frames, px. fps: to which their build resampled them, if it did.
    """
    return {
        "format": FORMAT,
        "stage": config.stage,
        "visual": {"width": config.visual.width, "temporal_kernel": config.visual.temporal_kernel},
        "features": features or {"kind": "signs"},
        "frames": {
            "short_side": min(index.frame_hw),
            "fps": index.options.get("fps"),
            "keep_every": config.data.keep_every,
            "target_fps": config.data.target_fps,
            "max_frames": config.data.max_frames,
            "cap": config.data.cap,
            "frame_size": config.data.frame_size,
            "crop_size": config.data.crop_size,
        },
        "generation": {
            "num_beams": 5,
            "length_penalty": config.eval.length_penalty,
            "max_new_tokens": config.eval.max_new_tokens,
        },
        "scores": scores,
    }


def frame_sampling(settings: dict[str, Any]) -> FrameSampling:
    """Which frames of a clip the exported model sees."""
    frames = settings["frames"]
    return FrameSampling(
        frames["keep_every"], frames["max_frames"], frames.get("target_fps"), frames.get("cap", "uniform")
    )


def write(
    folder: Path,
    settings: dict[str, Any],
    state: dict[str, torch.Tensor],
    language_model: Any,
    codec: TextCodec,
) -> None:
    """Fill an empty folder. state: parameters named visual.*, features.*, adapter.* and language_model.*."""
    names = ("visual", "features", "adapter", "language_model")
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    lm_folder = folder / LANGUAGE_MODEL
    lm_folder.mkdir()
    save_file(parts["visual"], folder / VISUAL_FILE)
    if parts["features"]:
        save_file(parts["features"], folder / FEATURES_FILE)
    save_file(parts["adapter"], folder / ADAPTER_FILE)
    save_file(parts["language_model"], lm_folder / "model.safetensors", metadata={"format": "pt"})
    language_model.config.save_pretrained(lm_folder)
    language_model.generation_config.save_pretrained(lm_folder)
    codec.save(lm_folder)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def find(folder: str | Path) -> Path:
    """The export folder itself, or `best` of a run folder. Raises UserError where there is neither."""
    folder = Path(folder)
    for candidate in (folder, folder / "best"):
        if (candidate / SETTINGS_FILE).is_file():
            return candidate
    raise UserError(
        f"there must be an export ({SETTINGS_FILE}) in {folder} or {folder / 'best'}, but there is none."
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """flallm.json. Raises UserError for another format."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / SETTINGS_FILE} must be JSON, but {error}.") from error
    if settings.get("format") != FORMAT:
        raise UserError(f"{folder} must be of format {FORMAT!r}, but is {settings.get('format')!r}.")
    return dict(settings)


def read_visual(folder: Path) -> VisualEncoder:
    """The visual encoder alone, in eval mode."""
    settings = read_settings(folder)
    visual = VisualEncoder(**settings["visual"])
    _load_into(visual, folder / VISUAL_FILE)
    return visual.eval()


def read_features(folder: Path, kind: Kind | None = None) -> FeatureExtractor:
    """What an LLM's adapter reads, in eval mode: what stage 2 takes from stage 1.

    kind: default that of the export. Raises UserError where the export has not got what this kind needs.
    """
    settings = read_settings(folder)
    visual = read_visual(folder)
    own = settings.get("features", {"kind": "signs"})
    kind = kind or own["kind"]
    if kind != "light_t":
        return FeatureExtractor(visual, kind).eval()
    if own["kind"] == "light_t":
        extractor = FeatureExtractor.from_settings(visual, own)
        state = _load(folder / FEATURES_FILE)
        _load_into(extractor, folder / FEATURES_FILE, state | _prefixed("visual.", visual.state_dict()))
        return extractor.eval()
    if settings["stage"] != "visual":
        raise UserError(
            f"llm.input=light_t must read a result of stage visual, but {folder} is of stage "
            f"{settings['stage']}. Give its stage 1 as --visual_run."
        )
    light_t = light_translator_from_config(_read_config(folder / LANGUAGE_MODEL))
    _load_into(light_t, folder / LANGUAGE_MODEL / "model.safetensors")
    adapter = Adapter(visual.feature_width, light_t.config.d_model, adapter_scale(light_t))
    _load_into(adapter, folder / ADAPTER_FILE)
    return FeatureExtractor(visual, kind, adapter, encoder_of(light_t.get_encoder())).eval()


def read(folder: Path) -> Export:
    """Everything, ready to translate. Raises UserError where the folder is not whole."""
    settings = read_settings(folder)
    visual = read_features(folder).requires_grad_(False)
    lm_folder = folder / LANGUAGE_MODEL
    codec = TextCodec.load(lm_folder)
    if settings["stage"] == "visual":
        language_model = light_translator_from_config(_read_config(lm_folder))
        _load_into(language_model, lm_folder / "model.safetensors")
    else:
        state = _load(lm_folder / "model.safetensors")
        language_model = load_llm(str(lm_folder))  # transformers fills what is missing with random numbers
        _must_hold(language_model, state, lm_folder / "model.safetensors")
    adapter = Adapter(visual.feature_width, language_model.config.d_model, adapter_scale(language_model))
    _load_into(adapter, folder / ADAPTER_FILE)
    translator = SignTranslator(None, adapter, language_model, codec).eval().requires_grad_(False)
    return Export(settings, visual, translator, codec)


def adapter_scale(language_model: Any) -> float:
    """sqrt(E) where the language model scales its word embeddings, so that visual tokens are as large."""
    config = language_model.config
    return float(config.d_model) ** 0.5 if getattr(config, "scale_embedding", False) else 1.0


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} must hold a config.json, but does not: {str(error).splitlines()[0]}"
        ) from error


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _load_into(
    module: torch.nn.Module, path: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """state: default what the file at `path` holds."""
    state = _load(path) if state is None else state
    _must_hold(module, state, path)
    try:
        module.load_state_dict(state, strict=False)  # second names of tied parameters are left out
    except RuntimeError as error:
        raise UserError(
            f"{path} must fit its settings, but does not: {str(error).splitlines()[-1].strip()}"
        ) from error


def _must_hold(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise UserError if a parameter or a running statistic would keep the value it was made with."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    missing = [n for n, _ in tensors if n not in state and n in module.state_dict()]
    if missing:
        raise UserError(f"{path} must hold {missing[0]}, but does not: it is of another model or not whole.")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} must be a whole safetensors file, but is not ({error}).") from error
