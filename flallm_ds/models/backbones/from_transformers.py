"""Backbones from transformers: a hub id, or a folder with a config.json."""

import pickle
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
    UNREADABLE,
    check_fit,
    check_patch,
    needed,
    probe_output,
    token_output,
)
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import BackboneSpec, plain_config
from flallm_ds.models.pretrained import HUB_ERRORS, check_weights, first_line


def build_transformers(
    weights: str, width: int, pretrained: bool, crop_size: int
) -> Backbone:
    """Build the backbone of a hub id or a folder.

    width: that the first stage of a ResNet must have. pretrained: load the weights, too.
    crop_size: side of the frames, px. Raises UserError if these do not fit together.
    """
    config = _image_config(weights)
    check_patch(weights, getattr(config, "patch_size", None), crop_size)
    if config.model_type == "resnet" and config.embedding_size != width:
        raise UserError(
            f"visual.width must be {config.embedding_size}, as of {weights}, but is "
            f"{width}. ImageNet weights are for --visual.width=64; use "
            "--visual.weights=none for other widths."
        )
    mean, std = _processor_norm(weights, config.model_type)
    spec = BackboneSpec("transformers", plain_config(config), mean=mean, std=std)
    # Drawn even if weights follow: what is drawn later must not depend on that.
    model = spec.build()
    if pretrained:
        spec = _load_weights(model, weights, config, spec)
    spec = probe_output(model, spec, weights, crop_size)
    return Backbone(model, spec)


def _image_config(weights: str) -> Any:
    """Return the model's config, or that of its vision part. Raises UserError without one."""
    try:
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"visual.weights must name a model that transformers knows, but {weights} is "
            f"not: {first_line(error)}"
        ) from error
    config = getattr(config, "vision_config", config)
    model_class = MODEL_MAPPING.get(type(config), None)
    if getattr(model_class, "main_input_name", None) != "pixel_values":
        raise UserError(
            f"visual.weights must name an encoder of images, but {weights} is a "
            f"{config.model_type} model, which reads something else."
        )
    return config


def _processor_norm(
    weights: str, model_type: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of the model's image processor; ImageNet's if it comes without one."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(weights)
    except OSError as error:
        # The processor of a ResNet is ImageNet's.
        if model_type == "resnet" or not _may_have_processor(weights):
            return IMAGENET_MEAN, IMAGENET_STD
        raise UserError(
            "visual.weights must be within reach with its preprocessor_config.json, but "
            f"that of {weights} is not: {first_line(error)} Fetch it where there is a "
            "network, or give a folder."
        ) from error
    if processor.get("do_flip_channel_order"):
        must = "visual.weights must name an encoder of RGB images"
        raise UserError(f"{must}, but {weights} reads BGR.")
    if not processor.get("do_normalize", "image_mean" in processor):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = processor.get("image_mean") or IMAGENET_MEAN
    std = processor.get("image_std") or IMAGENET_STD
    return tuple(mean), tuple(std)


def _may_have_processor(weights: str) -> bool:
    """Say whether a hub's model may have an image processor that is only out of reach."""
    if Path(weights).is_dir():
        return False
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

    A pooler without weights, as of a checkpoint with a classifier, is removed from the
    model. Raises UserError if the weights cannot be read, or are of another model.
    """
    check_weights(weights, "visual")
    try:
        source, info = type(model).from_pretrained(
            weights,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and refused below, by name
        )
    except UNREADABLE as error:
        raise _unreadable(weights, error) from error
    missing = needed(info["missing_keys"])
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    # A pooler that is missing as a whole is no fault: the class token or the mean is read.
    without_pooler = bool(missing) and all(name.startswith("pooler.") for name in missing)
    lost = mismatched if without_pooler else [*missing, *mismatched]
    check_fit(weights, source, lost, info["unexpected_keys"])
    if without_pooler:
        source.pooler = None
        model.pooler = None
        spec = replace(spec, output=token_output(model))
    model.load_state_dict(source.state_dict())
    return spec


def _unreadable(weights: str, error: Exception) -> UserError:
    reason = first_line(error)
    pickled = isinstance(error, pickle.UnpicklingError)
    if pickled or "Weights only load failed" in str(error):
        reason = (
            "pickled weights (.bin) are damaged, or hold more than tensors, which could "
            "run code. Fetch the safetensors files of the model."
        )
    return UserError(
        f"the weights {weights} must fit their config.json, but do not: {reason}"
    )
