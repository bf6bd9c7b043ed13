"""Define the configuration of a run as frozen dataclasses."""

from flallm_ds.config.run import FREE_TO_CHANGE, RunConfig, check_names
from flallm_ds.config.sections import (
    DataConfig,
    EvalConfig,
    LightTranslatorConfig,
    LlmConfig,
    OptimConfig,
    Stage,
    TrainConfig,
    VisualConfig,
    steps_of,
)

__all__ = [
    "FREE_TO_CHANGE",
    "DataConfig",
    "EvalConfig",
    "LightTranslatorConfig",
    "LlmConfig",
    "OptimConfig",
    "RunConfig",
    "Stage",
    "TrainConfig",
    "VisualConfig",
    "check_names",
    "steps_of",
]
