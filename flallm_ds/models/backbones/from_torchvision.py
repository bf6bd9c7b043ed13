"""Build ResNet-18 to 152 from a .pth file of torchvision, or with random weights.

The model is the ResNet of transformers; torchvision itself is not needed.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from transformers import ResNetConfig

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.checks import OPTIONAL_TENSOR, check_no_surplus
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import BackboneSpec, plain_config
from flallm_ds.models.pretrained import first_line

_LAYER = {"conv": "convolution", "bn": "normalization"}


def resnet_18(width: int) -> Backbone:
    """Build a ResNet-18 with random weights.

    width: channels of the first stage, 64 in the paper.
    """
    return _random_resnet(width, [2, 2, 2, 2], "basic")


def build_torchvision(path: Path, width: int, pretrained: bool) -> Backbone:
    """Build the ResNet whose state dict is in a .pth file.

    width: channels of the first stage. pretrained: load the weights as well. Raises
    UserError if the file is not such a state dict, or has another width.
    """
    if not path.is_file():
        raise UserError(
            f"visual.weights must be an existing file, got {path}. Check the path."
        )
    state = _read_state(path)
    depths, layer_type = _layout(state)
    if min(depths) < 1:
        raise UserError(
            "visual.weights must be a ResNet of torchvision with layer1 to layer4, got "
            f"{path} without them. Give another file."
        )
    # Every tensor of the model must be in the file, under torchvision's name.
    backbone = _random_resnet(width, depths, layer_type)
    stored = {_transformers_name(name): tensor for name, tensor in state.items()}
    needed = {}
    for name, tensor in backbone.model.state_dict().items():
        if OPTIONAL_TENSOR.search(name):
            continue
        if name not in stored or stored[name].shape != tensor.shape:
            raise UserError(
                f"Cannot load the weights {path} for visual.width={width}: {name} does not "
                "fit. ImageNet weights need --visual.width=64; give --visual.weights=none "
                "for another width."
            )
        needed[name] = stored[name]
    # The remaining tensors may only be those of the classifier.
    check_no_surplus(str(path), stored.keys() - needed.keys())
    if pretrained:
        backbone.model.load_state_dict(needed, strict=False)
    return backbone


def _random_resnet(width: int, depths: list[int], layer_type: str) -> Backbone:
    """Build a ResNet with random weights. depths: numbers of blocks in four stages."""
    # A bottleneck block widens its output by four.
    first = width if layer_type == "basic" else 4 * width
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[first, 2 * first, 4 * first, 8 * first],
        depths=depths,
        layer_type=layer_type,
    )
    spec = BackboneSpec("transformers", plain_config(config), feature_width=8 * first)
    return Backbone(spec.build(), spec)


def _read_state(path: Path) -> dict[str, Any]:
    """Return the state dict of a .pth file. Raises UserError if it cannot be read."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise UserError(
            f"Cannot read {path} as a state dict of torchvision: "
            f"{first_line(error).rstrip('.')}. Fetch the file again."
        ) from error


def _layout(state: dict[str, Any]) -> tuple[list[int], str]:
    """Return (number of blocks of each of four stages, transformers' layer type).

    Both are read from the names of the tensors.
    """
    depths = [0, 0, 0, 0]
    layer_type = "basic"
    for name in state:
        found = re.match(r"layer([1-4])\.(\d+)\.conv(\d)\.weight", name)
        if found is None:
            continue
        # Stages are numbered from 1, blocks from 0.
        stage, num_blocks = int(found[1]) - 1, int(found[2]) + 1
        depths[stage] = max(depths[stage], num_blocks)
        if found[3] == "3":  # only a bottleneck block has three convolutions
            layer_type = "bottleneck"
    return depths, layer_type


def _transformers_name(name: str) -> str:
    """Translate the name of a tensor from torchvision's ResNet to transformers'."""
    # The stem: conv1 and bn1 before the first stage.
    stem = re.match(r"(conv|bn)1\.(.*)", name)
    if stem:
        return f"embedder.embedder.{_LAYER[stem[1]]}.{stem[2]}"
    # A block of a stage: convolutions, norms, and the shortcut ("downsample").
    found = re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.*)", name)
    if found is None:
        return name
    layer, block, kind, number, rest = found.groups()
    prefix = f"encoder.stages.{int(layer) - 1}.layers.{block}"
    if kind == "downsample.":
        part = "convolution" if number == "0" else "normalization"
        return f"{prefix}.shortcut.{part}.{rest}"
    return f"{prefix}.layer.{int(number) - 1}.{_LAYER[kind]}.{rest}"
