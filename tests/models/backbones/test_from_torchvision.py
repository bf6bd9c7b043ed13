"""Backbones from .pth files of torchvision."""

import re
from pathlib import Path

import torch

from flallm_ds.models.backbones.build import build_backbone
from flallm_ds.models.backbones.from_torchvision import resnet_18
from tests.helpers.backbones import CROP, refused


def test_a_torchvision_file_of_another_network_raises_an_error(tmp_path: Path) -> None:
    """An SE-ResNet, for example, has all layers of a ResNet and more."""
    kinds = {"convolution": "conv", "normalization": "bn"}
    state = {}
    for name, tensor in resnet_18(8).model.state_dict().items():
        name = re.sub(r"embedder\.embedder\.(\w+)\.", lambda m: f"{kinds[m[1]]}1.", name)
        name = re.sub(
            r"encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.(\w+)\.",
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{kinds[m[4]]}{int(m[3]) + 1}.",
            name,
        )
        name = re.sub(
            r"encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.(\w+)\.",
            lambda m: (
                f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}."
            ),
            name,
        )
        state[name] = tensor
    path = tmp_path / "resnet.pth"
    torch.save(state | {"fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}, path)
    build_backbone(str(path), width=8, crop_size=CROP)
    torch.save(state | {"layer1.0.se.fc1.weight": torch.ones(2)}, path)
    refused(r"belong to no part of the model .*se\.fc1\.weight", str(path), width=8)
