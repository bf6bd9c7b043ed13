"""The export folder: a trained translator that loads without DeepSpeed.

README.md                      the model card
flallm.json                    stage, widths, frames, preprocessing, scores, training
visual_encoder.safetensors     the hand-over from stage 1 to stage 2
feature_extractor.safetensors  Light-T's encoder and its VL-Adapter, where the LLM reads that
adapter.safetensors
language_model/                Light-T or the LLM, its tokenizer and vocabulary.json

Of an LLM with LoRA adapters, or one that was not trained, only what was trained is
stored, beside the name of the LLM that it belongs to; `flallm export` makes one whole
folder of both. Numbers are stored as the engine held them: bf16 under a bf16 engine, as
they were scored, else fp32. They are loaded so again: sentences are those of the dev
search.
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
from flallm_ds.files import file_sha256

FORMAT = "flallm_ds export 2"
SETTINGS_FILE = "flallm.json"
# What launch/evaluate.py writes: a corpus's texts, so it never leaves with an export.
EVALUATION = "evaluation"
CARD_FILE = "README.md"
VISUAL_FILE = "visual_encoder.safetensors"
FEATURES_FILE = "feature_extractor.safetensors"
ADAPTER_FILE = "adapter.safetensors"
LANGUAGE_MODEL = "language_model"
ADDITIONS = "adapter_config.json"  # in it, where the LLM has LoRA adapters
# Where the parameters of a SignTranslator go, by the beginnings of their names; the first
# that fits.
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
    """The content of flallm.json. index: of the training clips; a user's video is brought
    to their form.

    features: `FeatureExtractor.settings`; none: sign-wise features. visual:
    `VisualEncoder.settings`; none: a ResNet-18 of visual.width. bits: of a quantized LLM.
    visual_autocast: whether the dev search saw frames in autocast, as a frozen encoder
    does. short_side: of the stored frames, px. fps: to which their build resampled them,
    if it did.
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


def base_of(config: RunConfig) -> str | None:
    """The LLM that an export of LoRA adapters (or none) belongs to; None where all
    of it is stored.

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
            f"the LLM that {folder} adds to must be at {path}, but is not: put it there, "
            "or make a folder that needs no other with flallm export."
        )
    return str(path)


def frame_sampling(settings: dict[str, Any]) -> FrameSampling:
    """Which frames of a clip the exported model sees."""
    return FrameSampling.of_settings(settings["frames"])


def find(folder: str | Path) -> Path:
    """The export folder itself, or `best` of a run folder. Raises UserError where there
    is neither."""
    folder = Path(folder)
    for candidate in (folder, folder / "best"):
        if (candidate / SETTINGS_FILE).is_file():
            return candidate
    raise UserError(
        f"there must be an export ({SETTINGS_FILE}) in {folder} or {folder / 'best'}, but "
        "there is none."
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """flallm.json. Raises UserError for another format, or where values have other types
    than ours."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / SETTINGS_FILE} must be JSON, but {error}.") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else None
        raise UserError(
            f"{folder} must be of format {FORMAT!r}, but is {found!r}: load it with the "
            "version that wrote it, or train again."
        )
    _check_types(settings, _TYPES, folder / SETTINGS_FILE)
    return settings


def _check_types(
    values: dict[str, Any], types: dict[str, Any], path: Path, section: str = ""
) -> None:
    """Raise UserError for a value that is missing or of another type: an export may come
    from anybody."""
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

    Covers the settings, the adapter and the visual encoder byte by byte: the adapter
    changes with every training step, so the gigabytes of an LLM need not be read again.
    """
    sha256 = hashlib.sha256()
    for name in (SETTINGS_FILE, ADAPTER_FILE, VISUAL_FILE, FEATURES_FILE):
        path = folder / name
        of_file = file_sha256(path) if path.is_file() else "none"
        sha256.update(f"{name} {of_file}\n".encode())
    return sha256.hexdigest()[:16]


def evaluated(source: Path, shards: Sequence[str] = ()) -> dict[str, Any]:
    """Return the scores of this very export of a run on these shards, by split.

    shards: as they were given; default those that the run began with.
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
                f"Cannot read {path}: it is no result of launch/evaluate.py ({error!r}). "
                "Remove it."
            ) from error
        # An older result is of another export of the run.
        if (
            content.get("export") == wanted_export
            and content.get("shards") == wanted_shards
        ):
            found[split] = scores
    return found
