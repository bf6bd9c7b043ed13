"""Build the backbone that the option `visual.weights` names."""

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

    weights: "none" for a ResNet-18 with random weights; a .pth file with a ResNet-18 to 152
    of torchvision; timm/NAME, or timm/NAME@FILE with the weights in a file; else a hub id
    or a folder of transformers or timm. width: required number of channels of the first
    stage of a ResNet. pretrained: if false, only the architecture is used and the weights
    are random. crop_size: side of the frames, px. Raises UserError if these do not fit
    together, OSError if a hub is not available.
    """
    if weights == "none":
        return resnet_18(width)
    _check_source(weights, pretrained)
    # timm itself resolves its names, to a hub or a local file.
    if weights.startswith(TIMM):
        return build_timm(weights, pretrained, crop_size)
    # A .pth file that does not exist is reported as a file, not as a hub id.
    path = Path(weights)
    if path.is_file() or weights.endswith(".pth"):
        return build_torchvision(path, width, pretrained)
    # timm writes the name of the architecture into config.json, transformers does not.
    config = _read_config(weights)
    if "architecture" in config:
        return build_timm_folder(weights, config, pretrained, crop_size)
    return build_transformers(weights, width, pretrained, crop_size)


def _check_source(weights: str, pretrained: bool) -> None:
    """Raise UserError if the file, folder or URL cannot be a backbone."""
    file = split_name(weights)[1] if weights.startswith(TIMM) else ""
    check_backbone_source(file or weights, pretrained)


def _read_config(weights: str) -> dict[str, Any]:
    """Return the config.json of a folder; an empty dict for a hub id."""
    folder = Path(weights)
    if not folder.is_dir():
        return {}
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise UserError(
            f"Cannot read {folder / 'config.json'}: {first_line(error).rstrip('.')}. Fetch "
            "the model again."
        ) from error


def hub_id(weights: str) -> str:
    """Return the hub id of `weights`; `weights` itself if it is not on a hub."""
    # A name with @FILE takes its weights from that file, not from a hub.
    if not weights.startswith(TIMM) or "@" in weights:
        return weights
    try:
        known = import_timm().models.get_pretrained_cfg(weights.removeprefix(TIMM))
    except RuntimeError:  # not a model of timm; `build_timm` raises an error
        known = None
    return getattr(known, "hf_hub_id", None) or weights


def check_reachable(weights: str) -> None:
    """Raise UserError if the backbone of a hub is neither cached nor available on the hub.

    Sends one request without retries. The libraries would retry each request for half a
    minute.
    """
    _check_source(weights, pretrained=True)
    name = hub_id(weights)
    is_local = "@" in weights or weights.endswith(".pth") or Path(weights).exists()
    if weights == "none" or is_local:
        return
    try:
        # Cached weights are enough: the hub is not needed.
        for file in CHECKPOINT_FILES:
            if isinstance(try_to_load_from_cache(name, file), str):
                read_cache_alone_if_unreachable(name)
                return
        # A private model looks like a missing one to a user without access.
        if file_exists(name, "config.json"):
            return
        reason = "the hub has no such model with a config.json, or you have no access"
    except HUB_ERRORS as error:
        reason = f"the hub cannot be reached ({first_line(error)})"
    raise UserError(
        f"visual.weights must be a file, a folder or an available hub id, got {weights}: "
        "there is no such file or folder, the hub's cache does not hold the model, and "
        f"{reason}. Give a local folder or file, or --visual.weights=none to train from "
        "random weights, which costs accuracy."
    )
