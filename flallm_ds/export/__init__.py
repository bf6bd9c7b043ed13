"""Write, read and publish export folders: trained models that load without DeepSpeed."""

from flallm_ds.export.format import (
    ADAPTER_FILE,
    CARD_FILE,
    EVALUATION,
    FEATURES_FILE,
    FORMAT,
    LANGUAGE_MODEL,
    LORA_CONFIG_FILE,
    VISUAL_FILE,
    base_llm,
    base_of,
    digest,
    evaluated,
    frame_sampling,
    read_settings,
    settings_of,
)
from flallm_ds.export.reader import (
    Export,
    read,
    read_features,
    read_llm,
    read_visual,
    trained_bits,
)
from flallm_ds.export.writer import write
from flallm_ds.export_folder import SETTINGS_FILE
from flallm_ds.export_folder import find_export as find

__all__ = [
    "ADAPTER_FILE",
    "CARD_FILE",
    "EVALUATION",
    "FEATURES_FILE",
    "FORMAT",
    "LANGUAGE_MODEL",
    "LORA_CONFIG_FILE",
    "SETTINGS_FILE",
    "VISUAL_FILE",
    "Export",
    "base_llm",
    "base_of",
    "digest",
    "evaluated",
    "find",
    "frame_sampling",
    "read",
    "read_features",
    "read_llm",
    "read_settings",
    "read_visual",
    "settings_of",
    "trained_bits",
    "write",
]
