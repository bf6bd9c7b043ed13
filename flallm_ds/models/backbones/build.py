"""Which source `visual.weights` names, and the backbone from it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, try_to_load_from_cache

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.from_timm import (
    TIMM,
    build_timm,
    build_timm_folder,
    split_name,
)
from flallm_ds.models.backbones.from_torchvision import build_torchvision, resnet_18
from flallm_ds.models.backbones.from_transformers import build_transformers
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import import_timm
from flallm_ds.models.pretrained import (
    CHECKPOINT_FILES,
    HUB_ERRORS,
    check_backbone_source,
    first_line,
    read_cache_alone_if_unreachable,
)


def build_backbone(
    weights: str = "none", width: int = 64, pretrained: bool = True, crop_size: int = 224
) -> Backbone:
    """Build the backbone that the option `visual.weights` names, with its weights.

    weights: "none" for a random ResNet-18; a .pth file with torchvision's ResNet-18 to
    152; timm/NAME, or timm/NAME@FILE with its weights in a file; else a hub id or folder
    of transformers or timm. width: that the first stage of a ResNet must have.
    pretrained: if false, only the architecture is taken. crop_size: side of the frames,
    px. Raises UserError if these do not fit together; OSError if a hub is out of reach.
    """
    if weights == "none":
        return resnet_18(width)
    _check_source(weights, pretrained)
    if weights.startswith(TIMM):
        return build_timm(weights, pretrained, crop_size)
    path = Path(weights)
    if path.is_file() or weights.endswith(".pth"):
        return build_torchvision(path, width, pretrained)
    config = _read_config(weights)
    if "architecture" in config:
        return build_timm_folder(weights, config, pretrained, crop_size)
    return build_transformers(weights, width, pretrained, crop_size)


def _check_source(weights: str, pretrained: bool) -> None:
    """Raise UserError if the file, folder or address cannot be a backbone."""
    file = split_name(weights)[1] if weights.startswith(TIMM) else ""
    check_backbone_source(file or weights, pretrained)


def _read_config(weights: str) -> dict[str, Any]:
    """Return the config.json of a folder; an empty one for a hub id."""
    folder = Path(weights)
    if not folder.is_dir():
        return {}
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"visual.weights must be a folder with a config.json, but {weights} is not "
            f"({error})."
        ) from error


def hub_id(weights: str) -> str:
    """Return the hub id that `weights` names; if it names something else, return it unchanged."""
    if not weights.startswith(TIMM) or "@" in weights:
        return weights
    try:
        known = import_timm().models.get_pretrained_cfg(weights.removeprefix(TIMM))
    except RuntimeError:  # no model of timm: refused when it is built
        known = None
    return getattr(known, "hf_hub_id", None) or weights


def check_reachable(weights: str) -> None:
    """Raise UserError if a hub's backbone is neither cached nor on a hub that answers.

    Sends one request without retries: the libraries would retry each of theirs for half a
    minute.
    """
    _check_source(weights, pretrained=True)
    name = hub_id(weights)
    of_file = "@" in weights or weights.endswith(".pth") or Path(weights).exists()
    if weights == "none" or of_file:
        return
    try:
        for file in CHECKPOINT_FILES:
            if isinstance(try_to_load_from_cache(name, file), str):
                read_cache_alone_if_unreachable(name)
                return
        if file_exists(name, "config.json"):
            return
        reason = "the hub has no such model with a config.json, or not for you"
    except HUB_ERRORS as error:
        reason = f"the hub cannot be reached ({first_line(error)})"
    raise UserError(
        f"visual.weights must be within reach, but {weights} is no file or folder here and "
        f"is not in the hub's cache, and {reason}. Give a folder or file of this machine, "
        "or --visual.weights=none to train from random weights, which costs accuracy."
    )
