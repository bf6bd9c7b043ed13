"""Backbones of timm: by name, with a file and from a folder."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.models.backbones.build import build_backbone
from tests.helpers.backbones import CROP, refused, saved


def test_the_features_are_those_of_timm(tmp_path: Path, pixels_NCHW: torch.Tensor) -> None:
    weights = saved("timm/test_vit", tmp_path)
    theirs = timm.create_model(
        f"local-dir:{weights}", pretrained=True, num_classes=0, img_size=CROP
    ).eval()
    backbone = build_backbone(weights, crop_size=CROP).eval()
    norm = timm.data.resolve_model_data_config(theirs)
    with torch.no_grad():
        ours = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
        own = torch.tensor([norm["mean"], norm["std"]]).view(2, 3, 1, 1)
        own_NCHW = (pixels_NCHW * ours[1] + ours[0] - own[0]) / own[1]
        assert torch.allclose(backbone(pixels_NCHW), theirs(own_NCHW), atol=1e-5)


def test_weights_of_timm_come_from_a_file_or_are_random(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = build_backbone(f"timm/test_resnet@{tmp_path / 'weights.pth'}", crop_size=CROP)
    assert torch.equal(loaded.model.conv1[0].weight, source.conv1[0].weight)
    torch.manual_seed(2)
    random = build_backbone("timm/test_resnet", pretrained=False, crop_size=CROP)
    assert not torch.equal(random.model.conv1[0].weight, source.conv1[0].weight)


def test_the_error_for_an_unknown_name_lists_similar_names() -> None:
    refused(r"timm, got resnet81: did you mean .*resnet18", "timm/resnet81")
    refused(
        r"got resnet18\.a1_in2k: did you mean .*resnet18\.a1_in1k",
        "timm/resnet18.a1_in2k",
    )
    refused(r"an existing file, got nowhere\.pth", "timm/resnet18@nowhere.pth")


def test_a_model_of_timm_without_the_package_raises_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(r"pip install 'flallm_ds\[backbones\]'", "timm/resnet18")
