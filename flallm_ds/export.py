"""The export folder: a trained translator that loads without DeepSpeed.

README.md                      the model card
flallm.json                    stage, widths, frame picking, preprocessing, scores, how it was trained
visual_encoder.safetensors     the hand-over from stage 1 to stage 2
feature_extractor.safetensors  where the LLM reads states of Light-T's encoder: that and its VL-Adapter
adapter.safetensors
language_model/                Light-T or the LLM in the Hugging Face layout, tokenizer and vocabulary.json

Of an LLM with low-rank additions, or one that was not trained, only what was trained is stored, beside the
name of the LLM that it belongs to; `flallm export` makes one whole folder of both.
Numbers are stored as the engine held them: bf16 under a bf16 engine, as they were scored, else fp32. They are
loaded so again: sentences are those of the dev search.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.store import file_sha256
from flallm_ds.data.text import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.model_card import model_card, training_facts
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.feature_extractor import FeatureExtractor, Kind, encoder_of
from flallm_ds.models.light_translator import light_translator_from_config
from flallm_ds.models.llm import (
    Bits,
    LlmOptions,
    can_quantize,
    embedding_scale,
    llm_width,
    load_llm,
    save_configs,
)
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.tuning import read_additions, write_additions
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.models.weights import Weights, WeightsWriter, load_weights, must_hold

FORMAT = "flallm_ds export 2"
SETTINGS_FILE = "flallm.json"
EVALUATION = (
    "evaluation"  # what launch/evaluate.py writes: a corpus's texts, so it never leaves with an export
)
CARD_FILE = "README.md"
VISUAL_FILE = "visual_encoder.safetensors"
FEATURES_FILE = "feature_extractor.safetensors"
ADAPTER_FILE = "adapter.safetensors"
LANGUAGE_MODEL = "language_model"
ADDITIONS = "adapter_config.json"  # in it, where the LLM has low-rank additions
# Where the parameters of a SignTranslator go, by the beginnings of their names; the first that fits.
PLACES = {
    "visual.visual.": VISUAL_FILE,
    "visual.": FEATURES_FILE,
    "adapter.": ADAPTER_FILE,
    "language_model.": f"{LANGUAGE_MODEL}/model.safetensors",
}

# What a reader relies on in flallm.json; optional values are checked where they are used.
_TYPES = {
    "stage": str,
    "visual": {},
    "features": {"kind": str},
    "frames": dict.fromkeys(("short_side", "keep_every", "max_frames", "frame_size", "crop_size"), int),
    "generation": {"num_beams": int, "max_new_tokens": int, "length_penalty": (int, float)},
    "scores": {},
    "training": {},
}
_KINDS = {str: "text", int: "a whole number", (int, float): "a number"}


@dataclass(frozen=True)
class Export:
    """What an export folder holds, in eval mode on the host."""

    settings: dict[str, Any]
    visual: FeatureExtractor
    translator: SignTranslator
    codec: TextCodec


def settings_of(
    config: RunConfig,
    index: Index,
    scores: dict[str, Any],
    features: dict[str, Any] | None = None,
    visual: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of flallm.json. index: of the training clips; a user's video is brought to their form.

    features: `FeatureExtractor.settings`; none: sign-wise features. visual: `VisualEncoder.settings`; none: a
    ResNet-18 of visual.width.
    bits: of a quantized LLM. visual_autocast: whether the dev search saw frames in autocast, as a frozen
    encoder does. short_side: of the stored frames, px. fps: to which their build resampled them, if it did.
    """
    return {
        "format": FORMAT,
        "stage": config.stage,
        "visual": visual or {"width": config.visual.width, "temporal_kernel": config.visual.temporal_kernel},
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
            "feature_fps": config.data.feature_fps,
            "chunk_frames": config.visual.chunk_frames,
        },
        "generation": {
            "num_beams": 5,
            "length_penalty": config.eval.length_penalty,
            "max_new_tokens": config.eval.max_new_tokens,
        },
        "base": base_of(config),
        "bits": config.llm.bits if config.stage != "visual" and config.llm.bits < 16 else None,
        "visual_autocast": not config.trains_visual,
        "scores": scores,
        "training": training_facts(config, index),
    }


def base_of(config: RunConfig) -> str | None:
    """The LLM that an export of low-rank additions (or none) belongs to; None where all of it is stored.

    A hub id, or a folder: of the run's own trimmed LLM relative to the export.
    """
    llm = config.llm
    adds = llm.tune in ("lora", "dora") or (llm.tune == "frozen" and not llm.layers)
    if config.stage == "visual" or not adds or not llm.pretrained:
        return None
    if llm.trim_vocabulary:
        return "../llm_trimmed"
    return str(Path(llm.name).resolve()) if Path(llm.name).exists() else llm.name


def base_llm(folder: Path, base: str) -> str:
    """The name or folder of an export's base LLM. Raises UserError where a folder is gone."""
    if not base.startswith(".") and not Path(base).is_absolute():
        return base
    path = (folder / base).resolve()
    if not path.is_dir():
        raise UserError(
            f"the LLM that {folder} adds to must be at {path}, but is not: put it there, or make a folder "
            "that needs no other with flallm export."
        )
    return str(path)


def frame_sampling(settings: dict[str, Any]) -> FrameSampling:
    """Which frames of a clip the exported model sees."""
    frames = settings["frames"]
    return FrameSampling(
        frames["keep_every"], frames["max_frames"], frames.get("target_fps"), frames.get("cap", "uniform")
    )


def write(
    folder: Path,
    settings: dict[str, Any],
    state: Iterable[tuple[str, torch.Tensor]],
    language_model: Any,
    codec: TextCodec,
) -> None:
    """Fill an empty folder.

    state: (name, tensor) of a `SignTranslator` with its feature extractor as `visual`, in any order; at most
    2 GB of it for each file are held at a time.
    """
    lm_folder = folder / LANGUAGE_MODEL
    lm_folder.mkdir()
    additions: list[tuple[str, torch.Tensor | None]] = []
    with ExitStack() as stack:
        writers: dict[str, WeightsWriter] = {}
        for name, tensor in state:
            prefix = next(prefix for prefix in PLACES if name.startswith(prefix))
            if settings["base"] and prefix == "language_model.":
                additions.append((name.removeprefix(prefix), tensor))
                continue
            if prefix not in writers:
                place = folder / PLACES[prefix]
                writers[prefix] = stack.enter_context(WeightsWriter(place.parent, place.name))
            writers[prefix].add(name.removeprefix(prefix), tensor)
    if additions:
        write_additions(lm_folder, additions, language_model, settings["base"])
    save_configs(language_model, language_model.config, language_model.generation_config, lm_folder)
    codec.save(lm_folder)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(settings, codec), encoding="utf-8")


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
    """flallm.json. Raises UserError for another format, or where values have other types than ours."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / SETTINGS_FILE} must be JSON, but {error}.") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else None
        raise UserError(
            f"{folder} must be of format {FORMAT!r}, but is {found!r}: load it with the version that wrote "
            "it, or train again."
        )
    _check_types(settings, _TYPES, folder / SETTINGS_FILE)
    return settings


def _check_types(values: dict[str, Any], types: dict[str, Any], path: Path, section: str = "") -> None:
    """Raise UserError for a value that is missing or of another type: an export may come from anybody."""
    for name, wanted in types.items():
        value, place = values.get(name), f"{section}{name}"
        if isinstance(wanted, dict):
            if not isinstance(value, dict):
                raise UserError(f"{place} in {path} must be an object, got {value!r}.")
            _check_types(value, wanted, path, f"{place}.")
        elif not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{place} in {path} must be {_KINDS[wanted]}, got {value!r}.")
        elif wanted is not str and not (0 < value < 2**31 or name == "length_penalty"):
            raise UserError(f"{place} in {path} must be above 0, got {value!r}.")


def digest(folder: Path) -> str:
    """Return 16 hex digits that identify an export by its content, wherever it is copied.

    Covers the settings, the adapter and the visual encoder byte by byte: the adapter changes with
    every training step, so the gigabytes of an LLM need not be read again.
    """
    sha256 = hashlib.sha256()
    for name in (SETTINGS_FILE, ADAPTER_FILE, VISUAL_FILE, FEATURES_FILE):
        path = folder / name
        sha256.update(f"{name} {file_sha256(path) if path.is_file() else 'none'}\n".encode())
    return sha256.hexdigest()[:16]


def evaluated(source: Path, shards: Sequence[str] = ()) -> dict[str, Any]:
    """Return the scores of this very export of a run on these shards, by split.

    shards: as they were given; default those that the run began with.
    """
    config = source.parent / "config.json"
    if not config.is_file():
        return {}
    wanted = {
        "export": digest(source),
        "shards": list(shards or RunConfig.load(config).data.shards),
    }
    found = {}
    for path in sorted((source.parent / EVALUATION).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            split, scores = content["split"], content["scores"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"Cannot read {path}: it is no result of launch/evaluate.py ({error!r}). Remove it."
            ) from error
        if all(content.get(name) == value for name, value in wanted.items()):
            found[split] = scores
    return found


def read_visual(folder: Path) -> VisualEncoder:
    """The visual encoder alone, in eval mode."""
    settings = read_settings(folder)
    visual = VisualEncoder.from_settings(settings["visual"])
    visual.chunk_frames = settings.get("frames", {}).get("chunk_frames", 0)
    load_weights(visual, Weights(folder, VISUAL_FILE))
    return visual.eval()


def read_features(folder: Path, kind: Kind | None = None) -> FeatureExtractor:
    """What an LLM's adapter reads, in eval mode: what stage 2 takes from stage 1.

    kind: default that of the export. Raises UserError where the export has not got what this kind needs.
    """
    settings = read_settings(folder)
    visual = read_visual(folder)
    own = settings["features"]
    kind = kind or own["kind"]
    if kind != "light_t":
        return FeatureExtractor(visual, kind).eval()
    if own["kind"] == "light_t":
        extractor = FeatureExtractor.from_settings(visual, own)
        parts = {name: part for name, part in extractor.named_children() if name != "visual"}
        load_weights(nn.ModuleDict(parts), Weights(folder, FEATURES_FILE))
        return extractor.eval()
    if settings["stage"] != "visual":
        raise UserError(
            f"llm.input=light_t must read a result of stage visual, but {folder} is of stage "
            f"{settings['stage']}. Give its stage 1 as --visual_run."
        )
    light_t = _read_light_translator(folder / LANGUAGE_MODEL)
    adapter = _read_adapter(folder, visual.feature_width, light_t)
    return FeatureExtractor(visual, kind, adapter, encoder_of(light_t.get_encoder())).eval()


def trained_bits(folder: Path, settings: dict[str, Any]) -> Bits:
    """Bits of an LLM's parameter in the run that wrote the export.

    32 where they were quantized and cannot be here; 32 for fp16 as well, because fp32 holds its numbers.
    """
    quantized: Bits | None = settings.get("bits")
    if quantized is not None:
        return quantized if can_quantize() else 32
    weights = Weights(folder, ADAPTER_FILE)  # always there, and of the engine's type
    return 16 if weights[weights.names[0]].dtype == torch.bfloat16 else 32


def read(folder: Path, options: LlmOptions | None = None) -> Export:
    """Everything, ready to translate; no second copy of the weights is held on the way.

    options: of the LLM; none: in the precision of its training. The adapter is in bf16 where it was trained
    so, unless the LLM is asked for in fp32. Raises UserError where the folder is not whole.
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
    translator = SignTranslator(None, adapter, language_model, codec).eval().requires_grad_(False)
    return Export(settings, visual, translator, codec)


def read_llm(folder: Path, settings: dict[str, Any], options: LlmOptions) -> Any:
    """The LLM of an export, with its low-rank additions beside its weights where it has some."""
    lm_folder = folder / LANGUAGE_MODEL
    if settings["base"] is None:
        weights = Weights(lm_folder)
        language_model = load_llm(str(lm_folder), options)
        must_hold(weights, language_model)  # transformers fills what is missing with random numbers
        return language_model
    language_model = load_llm(base_llm(folder, settings["base"]), options)
    if (lm_folder / ADDITIONS).is_file():
        read_additions(lm_folder, language_model)
    elif settings["training"]["tune"] != "frozen":
        raise UserError(f"{lm_folder} must hold {ADDITIONS}, but does not: it is not whole.")
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
