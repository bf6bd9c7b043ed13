"""Build backbones with transformers, from a hub id or a folder with a config.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, file_exists, try_to_load_from_cache
from transformers import MODEL_MAPPING, AutoConfig
from transformers.image_processing_base import ImageProcessingMixin

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError
from flallm_ds.models.backbones.checks import (
    check_fit,
    check_patch,
    needed,
    probe_output,
    token_output,
)
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import BackboneSpec, plain_config
from flallm_ds.models.pretrained import (
    HUB_ERRORS,
    UNREADABLE,
    check_weights,
    first_line,
    unreadable,
)


def build_transformers(
    weights: str, width: int, pretrained: bool, crop_size: int
) -> Backbone:
    """Build the backbone of a hub id or a folder.

    width: required number of channels of the first stage of a ResNet. pretrained: load the
    weights as well. crop_size: side of the frames, px. Raises UserError if these do not fit
    together.
    """
    config = _image_config(weights)
    check_patch(weights, getattr(config, "patch_size", None), crop_size)
    if config.model_type == "resnet" and config.embedding_size != width:
        raise UserError(
            f"visual.width must be {config.embedding_size}, the width of {weights}, got "
            f"{width}. ImageNet weights need --visual.width=64; give --visual.weights=none "
            "for another width."
        )
    mean, std = _processor_norm(weights, config.model_type)
    spec = BackboneSpec("transformers", plain_config(config), mean=mean, std=std)
    # Random weights are drawn even if stored ones replace them: the numbers that are drawn
    # later must not depend on `pretrained`.
    model = spec.build()
    if pretrained:
        spec = _load_weights(model, weights, config, spec)
    spec = probe_output(model, spec, weights, crop_size)
    return Backbone(model, spec)


def _image_config(weights: str) -> Any:
    """Return the config of the model or its vision part. Raises UserError without one."""
    try:
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"visual.weights must name a model that transformers knows, got {weights}: "
            f"{first_line(error).rstrip('.')}. Choose another model."
        ) from error
    # CLIP, SigLIP and others hold the config of their image encoder as a part.
    config = getattr(config, "vision_config", config)
    model_class = MODEL_MAPPING.get(type(config), None)
    if getattr(model_class, "main_input_name", None) != "pixel_values":
        raise UserError(
            f"visual.weights must name an image encoder, got {weights}, a "
            f"{config.model_type} model. Choose another model."
        )
    return config


def _processor_norm(
    weights: str, model_type: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of the image processor; those of ImageNet without a processor."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(weights)
    except OSError as error:
        # A ResNet is always trained on pixels normalised by ImageNet's mean and std.
        if model_type == "resnet" or not _may_have_processor(weights):
            return IMAGENET_MEAN, IMAGENET_STD
        raise UserError(
            f"Cannot read the preprocessor_config.json of {weights}: "
            f"{first_line(error).rstrip('.')}. Fetch it on a machine with a network, or give "
            "a folder."
        ) from error
    if processor.get("do_flip_channel_order"):
        raise UserError(
            f"visual.weights must name an encoder of RGB images, got {weights}, which reads "
            "BGR. Choose another encoder."
        )
    # Without normalisation the pixels are in [0, 1].
    if not processor.get("do_normalize", "image_mean" in processor):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = processor.get("image_mean") or IMAGENET_MEAN
    std = processor.get("image_std") or IMAGENET_STD
    return tuple(mean), tuple(std)


def _may_have_processor(weights: str) -> bool:
    """Return whether a model may have an image processor that is just not available now."""
    if Path(weights).is_dir():
        return False
    # The cache also records that a file does not exist on the hub.
    known = try_to_load_from_cache(weights, "preprocessor_config.json")
    try:
        return known is not _CACHED_NO_EXIST and file_exists(
            weights, "preprocessor_config.json"
        )
    except HUB_ERRORS:
        return True


def _load_weights(
    model: Any, weights: str, config: Any, spec: BackboneSpec
) -> BackboneSpec:
    """Load the weights into the model and return its spec.

    A pooler without stored weights is removed from the model; checkpoints with a classifier
    have none. Raises UserError if the weights cannot be read, or are of another model.
    """
    # The errors of transformers do not name a file that is truncated or missing.
    check_weights(weights, "visual")
    try:
        source, info = type(model).from_pretrained(
            weights,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_fit` below names the first one
        )
    except UNREADABLE as error:
        raise unreadable(weights, error) from error
    missing = needed(info["missing_keys"])
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    # Only a pooler is missing: use the class token or the mean instead.
    without_pooler = bool(missing) and all(name.startswith("pooler.") for name in missing)
    lost = mismatched if without_pooler else [*missing, *mismatched]
    check_fit(weights, source, lost, info["unexpected_keys"])
    if without_pooler:
        source.pooler = None
        model.pooler = None
        spec = replace(spec, output=token_output(model))
    # `from_pretrained` has built another model; the drawn one gets its weights.
    model.load_state_dict(source.state_dict())
    return spec
