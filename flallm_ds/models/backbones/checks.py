"""Checks of a backbone, whatever its source: do the weights and the frames fit the model?

N frames, C H W of a frame, D width of the features.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.interface import Backbone, features_of
from flallm_ds.models.backbones.spec import BackboneSpec
from flallm_ds.models.pretrained import first_line

# What models raise for frames that they cannot read.
UNSUITED = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError)
# Tensors that a checkpoint of any model may hold or lack. Files from before 2018 lack the
# counter of BatchNorm, which nothing reads. No patches are masked here. The other tensors
# are computed.
OPTIONAL_TENSOR = re.compile(
    r"(num_batches_tracked|mask_token|position_ids|relative_position_index|attn_mask|inv_freq)$"
)
# Tensors of a classifier, which a backbone does not have, as timm names them.
_HEAD_TENSOR = re.compile(r"^(head|fc|classifier|pre_logits|fc_norm)[._]")


def needed(names: Iterable[str]) -> list[str]:
    """Return the names without those of optional tensors, sorted."""
    return sorted(name for name in names if not OPTIONAL_TENSOR.search(name))


def check_fit(
    weights: str,
    model: nn.Module,
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Raise UserError if a tensor of the model is missing or a stored tensor is unexpected.

    missing, unexpected: names of tensors, as `load_state_dict` reports them. An unexpected
    tensor counts only if its name begins with a part of the model, such as the tensor of
    one layer too many. A classifier, a text model or a decoder of patches that is stored
    with the backbone is ignored.
    """
    lost = needed(missing)
    if lost:
        raise UserError(
            f"Cannot load the weights {weights}: {lost[0]} is missing, so they are "
            "incomplete or of another model. Fetch them again."
        )
    # A model with a head stores its backbone under this prefix, such as `vit.`.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # The first words of the model's names, such as `embeddings` and `encoder`.
    parts = {name.split(".")[0] for name in model.state_dict()}
    within = []
    for name in unexpected:
        if name.removeprefix(prefix).split(".")[0] in parts:
            within.append(name)
    check_no_surplus(weights, within)


def check_no_surplus(weights: str, unexpected: Iterable[str]) -> None:
    """Raise UserError for unexpected tensors, except optional ones and a classifier's."""
    surplus = []
    for name in needed(unexpected):
        if not _HEAD_TENSOR.match(name):
            surplus.append(name)
    if surplus:
        raise UserError(
            f"Cannot load the weights {weights}: {len(surplus)} of their tensors belong to "
            f"no part of the model ({surplus[0]} for example), so the config is of another "
            "model. Fetch the weights and the config again."
        )


def check_patch(weights: str, patch: Any, crop_size: int) -> None:
    """Raise UserError if a frame is not a whole number of patches.

    patch: side or sides of a patch, px; other types mean that the model has no patches.
    """
    # A model would ignore the rest of a frame at its edge without a warning.
    sides = patch if isinstance(patch, list | tuple) else [patch]
    for side in sides:
        if isinstance(side, int) and crop_size % side:
            # The nearest multiples of the patch, for the error message.
            below = max(side, crop_size // side * side)
            raise UserError(
                f"data.crop_size must be a multiple of {side}, the patch size of {weights}, "
                f"got {crop_size}. Give --data.crop_size={below} or {below + side}."
            )


def probe_output(
    model: nn.Module,
    spec: BackboneSpec,
    weights: str,
    crop_size: int,
) -> BackboneSpec:
    """Encode one frame twice; return the spec with the output and the feature width found.

    Raises UserError if the model cannot read such frames, or if the two results differ.
    """
    # A batch of two equal frames. Their features must be equal as well.
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
        # A spec starts with the pooled output, which this model does not have.
        if spec.library == "transformers" and not has_pooled:
            spec = replace(spec, output=token_output(model))
        features_ND = features_of(outputs, spec)
        if features_ND.dim() != 2 or len(features_ND) != 2:
            shape = tuple(features_ND.shape)
            raise ValueError(
                f"the features of 2 frames must have the shape (2, D), got {shape}"
            )
    except UNSUITED as error:
        raise UserError(
            "visual.weights must name an encoder that can read frames of "
            f"data.crop_size={crop_size} px, got {weights}: "
            f"{first_line(error).rstrip('.')}. Give another --data.crop_size or encoder."
        ) from error
    finally:
        model.train(was_training)
    # The tolerance allows for another order of sums in the two rows of a batch.
    if not torch.allclose(features_ND[0], features_ND[1], atol=1e-4, rtol=1e-3):
        raise UserError(
            "visual.weights must name an encoder that always gives a frame the same "
            f"features, got {weights}, which draws random numbers. Choose another encoder."
        )
    return replace(spec, feature_width=features_ND.shape[1])


def token_output(model: nn.Module) -> Literal["class", "mean"]:
    """Return which output to use without a pooled one: the class token if there is one."""
    for name, _ in model.named_parameters():
        if re.search(r"(^|\.)(cls_token|class_embedding)$", name):
            return "class"
    return "mean"
