"""BackboneSpec: the architecture of a backbone in plain values."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError


@dataclass(frozen=True)
class BackboneSpec:
    """All that is needed to build a backbone again, in plain values for JSON.

    config: the complete config of a transformers model, or the name and the arguments of a
    timm model. output: the output of a transformers model that becomes the features. mean,
    std: of the pixels that the weights were trained on.
    """

    library: Literal["transformers", "timm"]
    config: dict[str, Any]
    feature_width: int = 0
    output: Literal["pooled", "class", "mean"] = "pooled"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def build(self) -> Any:
        """Return the model with random weights, in fp32."""
        if self.library == "timm":
            return import_timm().create_model(pretrained=False, **self.config)
        values = dict(self.config)
        model_type = values.pop("model_type")
        config = CONFIG_MAPPING[model_type].from_dict(values)
        model: Any = AutoModel.from_config(config, dtype=torch.float32)
        # A pooler that is not used would have random weights and no gradient.
        has_pooler = isinstance(getattr(model, "pooler", None), nn.Module)
        if self.output != "pooled" and has_pooler:
            model.pooler = None
        return model


def import_timm() -> Any:
    """Return the optional module timm. Raises UserError if it is not installed."""
    try:
        # optional
        import timm
    except ModuleNotFoundError as error:
        raise UserError(
            "Cannot build a backbone of timm: the package is not installed. Run pip install "
            "'flallm_ds[backbones]'."
        ) from error
    return timm


def plain_config(config: Any) -> dict[str, Any]:
    """Return all values of a transformers config, without its origin."""
    # Also values that equal the defaults of the class, because defaults may change.
    values = json.loads(config.to_json_string(use_diff=False))
    return dict(without_origin(values))


def without_origin(values: Any) -> Any:
    """Return a config without the version that wrote it and the folder that it is from.

    Parts of the config are cleaned in the same way. Other values are returned unchanged.
    """
    # Configs are nested: a multimodal model has one for each part.
    if not isinstance(values, dict):
        return values
    kept = {}
    for name, value in values.items():
        if name not in ("transformers_version", "_name_or_path"):
            kept[name] = without_origin(value)
    return kept
