"""What all sources of backbones have in common: weights must fill the model, frames must suit it.

N frames, C H W of a frame, D width of the features.
"""

import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import BackboneSpec
from flallm_ds.models.pretrained import first_line

# What models raise when frames do not suit them.
UNSUITED = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError)
# What the libraries raise when files of weights are damaged or of another model.
UNREADABLE = (RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError)
# Tensors that a checkpoint may hold or lack, whatever the model: files from before 2018
# lack BatchNorm's counter, which nothing reads; nobody masks patches here; the others are
# computed.
OPTIONAL_TENSOR = re.compile(
    r"(num_batches_tracked|mask_token|position_ids|relative_position_index|attn_mask|inv_freq)$"
)
# Tensors of a classifier, which a backbone does without; names of timm.
_HEAD_TENSOR = re.compile(r"^(head|fc|classifier|pre_logits|fc_norm)[._]")


def needed(names: Iterable[str]) -> list[str]:
    """Return the names of tensors, sorted, without those that a checkpoint may hold or lack."""
    return sorted(name for name in names if not OPTIONAL_TENSOR.search(name))


def check_fit(
    weights: str,
    model: nn.Module,
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Raise UserError if a tensor of the model is missing, or a stored tensor is of no part.

    A stored tensor counts only if it lies within a part of the model, as of one more
    layer: a classifier, a text model or a decoder of patches next to the backbone is left
    out.
    """
    lost = needed(missing)
    if lost:
        must = f"the weights {weights} must hold {lost[0]}, but do not"
        raise UserError(f"{must}: they are of another model or not whole.")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {name.split(".")[0] for name in model.state_dict()}
    within = []
    for name in unexpected:
        if name.removeprefix(prefix).split(".")[0] in parts:
            within.append(name)
    check_no_surplus(weights, within)


def check_no_surplus(weights: str, unexpected: Iterable[str]) -> None:
    """Raise UserError if one of the unexpected tensors is more than a classifier's or
    optional."""
    surplus = []
    for name in needed(unexpected):
        if not _HEAD_TENSOR.match(name):
            surplus.append(name)
    if surplus:
        raise UserError(
            f"the weights {weights} must be of the model that is built for them, but "
            f"{len(surplus)} of their tensors belong to no part of it, {surplus[0]} being "
            "one: the config is of another model. Fetch both again."
        )


def check_patch(weights: str, patch: Any, crop_size: int) -> None:
    """Raise UserError if a frame is not a whole number of patches: its edge would be lost.

    patch: side or sides of a patch, px; other types mean that the model has no patches.
    """
    sides = patch if isinstance(patch, list | tuple) else [patch]
    for side in sides:
        if isinstance(side, int) and crop_size % side:
            below = max(side, crop_size // side * side)
            raise UserError(
                f"data.crop_size must be a multiple of {side}, the patch of {weights}, but "
                f"is {crop_size}. Give --data.crop_size={below}, or {below + side}."
            )


def probe_output(
    model: nn.Module,
    spec: BackboneSpec,
    weights: str,
    crop_size: int,
) -> BackboneSpec:
    """Run one frame twice and return the spec with the output and the feature width found.

    Raises UserError if the model does not take such frames, or if the two results differ.
    """
    draw = torch.Generator().manual_seed(0)
    frame_1CHW = torch.rand(1, 3, crop_size, crop_size, generator=draw)
    pixels_NCHW = frame_1CHW.repeat(2, 1, 1, 1)
    backbone = Backbone(model, spec)
    was_training = model.training
    try:
        # A model may draw random numbers; those of the caller must not change.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = backbone.eval().outputs(pixels_NCHW)
        has_pooled = getattr(outputs, "pooler_output", None) is not None
        if spec.library == "transformers" and not has_pooled:
            spec = replace(spec, output=token_output(model))
        features_ND = spec.features(outputs)
        if features_ND.dim() != 2 or len(features_ND) != 2:
            raise ValueError(f"its features are of the shape {tuple(features_ND.shape)}")
    except UNSUITED as error:
        raise UserError(
            "visual.weights must name an encoder that takes frames of "
            f"data.crop_size={crop_size} px, but {weights} does not: {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    if not torch.allclose(features_ND[0], features_ND[1], atol=1e-4, rtol=1e-3):
        raise UserError(
            "visual.weights must name an encoder that sees a frame the same way each time, "
            f"but {weights} does not: it draws at random."
        )
    return replace(spec, feature_width=features_ND.shape[1])


def token_output(model: nn.Module) -> Literal["class", "mean"]:
    """Return the output of a model without pooled output: its class token if it has one."""
    for name, _ in model.named_parameters():
        if re.search(r"(^|\.)(cls_token|class_embedding)$", name):
            return "class"
    return "mean"
