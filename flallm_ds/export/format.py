"""Define the format of an export folder: a trained translator that loads without DeepSpeed.

README.md                      model card
flallm.json                    stage, widths, frames, preprocessing, scores, training
visual_encoder.safetensors     visual encoder, which stage 2 takes from stage 1
feature_extractor.safetensors  encoder and VL-Adapter of Light-T, if the LLM reads them
adapter.safetensors
language_model/                Light-T or the LLM, with tokenizer and vocabulary.json

If the LLM has LoRA adapters or is not trained, the folder contains the adapter weights and
the name of the base model. `flallm export` combines both in one folder.

Weights are stored and loaded in the precision of the engine: bf16 if the engine is bf16,
else fp32. So hypotheses equal those of the search on dev in training.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import UserError
from flallm_ds.export.model_card import training_facts
from flallm_ds.export_folder import SETTINGS_FILE
from flallm_ds.files import file_sha256

FORMAT = "flallm_ds export 2"
# Results of launch/evaluate.py. They contain texts of the corpus, so they are never copied
# with an export.
EVALUATION = "evaluation"
CARD_FILE = "README.md"
VISUAL_FILE = "visual_encoder.safetensors"
FEATURES_FILE = "feature_extractor.safetensors"
ADAPTER_FILE = "adapter.safetensors"
LANGUAGE_MODEL = "language_model"
# In the folder of the language model, if the LLM has LoRA adapters.
LORA_CONFIG_FILE = "adapter_config.json"
# Maps the prefix of parameter names of a SignTranslator to a file. The first match counts.
PLACES = {
    "visual.encoder.": VISUAL_FILE,
    "visual.": FEATURES_FILE,
    "adapter.": ADAPTER_FILE,
    "language_model.": f"{LANGUAGE_MODEL}/model.safetensors",
}

# Required values of flallm.json. Optional values are checked where they are used.
_TYPES = {
    "stage": str,
    "visual": {},
    "features": {"kind": str},
    "frames": dict.fromkeys(
        ("short_side", "keep_every", "max_frames", "frame_size", "crop_size"), int
    ),
    "generation": {"num_beams": int, "max_new_tokens": int, "length_penalty": (int, float)},
    "scores": {},
    "training": {},
}
_KINDS = {str: "text", int: "a whole number", (int, float): "a number"}


def settings_of(
    config: RunConfig,
    index: Index,
    scores: dict[str, Any],
    features: dict[str, Any] | None = None,
    visual: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of flallm.json.

    index: training clips. A video of a user is converted to their format.
    features: `FeatureExtractor.settings`; None: sign-wise features.
    visual: `VisualEncoder.settings`; None: a ResNet-18 of visual.width.

    Keys of the result: bits: bits of a parameter of a quantized LLM. visual_autocast:
    whether the visual encoder ran in autocast in the search on dev, as a frozen encoder
    does. short_side: of the stored frames in pixels. fps: frame rate to which the shards
    were resampled, if they were. longest_s: the longest training clip in seconds.
    """
    if visual is None:
        visual = {
            "width": config.visual.width,
            "temporal_kernel": config.visual.temporal_kernel,
        }
    quantized = config.stage != "visual" and config.llm.bits < 16
    return {
        "format": FORMAT,
        "stage": config.stage,
        "visual": visual,
        "features": features or {"kind": "signs"},
        "frames": {
            "short_side": min(index.frame_hw),
            "fps": index.options.get("fps"),
            "longest_s": _longest_s(index),
            **FrameSampling.of(config.data).settings(),
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
        "bits": config.llm.bits if quantized else None,
        "visual_autocast": not config.trains_visual,
        "scores": scores,
        "training": training_facts(config, index),
    }


def _longest_s(index: Index) -> float:
    """Return the length of the longest clip in seconds."""
    return round(float((index.num_frames / index.arrays["fps"]).max()), 3)


def base_of(config: RunConfig) -> str | None:
    """Return the base model of an export: a hub id or a folder.

    The folder of a trimmed LLM is relative to the export. None if the export contains all
    weights of the LLM.
    """
    llm = config.llm
    needs_base = llm.tune in ("lora", "dora") or (llm.tune == "frozen" and not llm.layers)
    if config.stage == "visual" or not needs_base or not llm.pretrained:
        return None
    if llm.trim_vocabulary:
        return "../llm_trimmed"
    return str(Path(llm.name).resolve()) if Path(llm.name).exists() else llm.name


def base_llm(folder: Path, base: str) -> str:
    """Return the hub id or folder of the base model. Raises UserError if it is missing."""
    if not base.startswith(".") and not Path(base).is_absolute():
        return base
    path = (folder / base).resolve()
    if not path.is_dir():
        raise UserError(
            f"Cannot read export {folder}: its base model {path} does not exist. Copy the "
            "base model to this path, or run flallm export to make one complete folder."
        )
    return str(path)


def frame_sampling(settings: dict[str, Any]) -> FrameSampling:
    """Return the frame sampling of the exported model."""
    return FrameSampling.of_settings(settings["frames"])


def read_settings(folder: Path) -> dict[str, Any]:
    """Read flallm.json. Raises UserError for another format or a value of another type."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {folder / SETTINGS_FILE}: it is not JSON ({error})."
        ) from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else None
        raise UserError(
            f"The format of export {folder} must be {FORMAT!r}, got {found!r}. Load it with "
            "the version that wrote it, or train again."
        )
    _check_types(settings, _TYPES, folder / SETTINGS_FILE)
    return settings


def _check_types(
    values: dict[str, Any], types: dict[str, Any], path: Path, section: str = ""
) -> None:
    """Raise UserError if a value is missing or has another type.

    types: maps names to types, or to a dictionary for a nested object. section: prefix of
    names in messages.
    """
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
    """Return 16 hex digits that identify an export by its content.

    They cover the settings, the adapter and the visual encoder. The LLM is not read, which
    would be gigabytes: the adapter changes with every training step.
    """
    sha256 = hashlib.sha256()
    for name in (SETTINGS_FILE, ADAPTER_FILE, VISUAL_FILE, FEATURES_FILE):
        path = folder / name
        of_file = file_sha256(path) if path.is_file() else "none"
        sha256.update(f"{name} {of_file}\n".encode())
    return sha256.hexdigest()[:16]


def evaluated(source: Path, shards: Sequence[str] = ()) -> dict[str, Any]:
    """Return {split: scores} of exactly this export of a run on these shards.

    shards: as given to the evaluation; default: the shards of the run.
    """
    config = source.parent / "config.json"
    if not config.is_file():
        return {}
    wanted_export = digest(source)
    wanted_shards = list(shards or RunConfig.load(config).data.shards)
    found = {}
    for path in sorted((source.parent / EVALUATION).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            split, scores = content["split"], content["scores"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"Cannot read {path}: it is not a result of launch/evaluate.py "
                f"({error!r}). Remove it."
            ) from error
        # An older result belongs to another export of the run.
        if (
            content.get("export") == wanted_export
            and content.get("shards") == wanted_shards
        ):
            found[split] = scores
    return found
