"""Backbones from all sources: features, gradients, freezing, tuning and settings."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.models.backbones.build import build_backbone
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.llm.tuning import Tuning, merged
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.training.batch_statistics import BatchStatistics
from tests.helpers.backbones import (
    CROP,
    KINDS,
    TIMM_KINDS,
    backbone_of,
    saved,
)
from tests.helpers.tensors import same_tensors, trained_names

LORA = ("dinov3_vit", "vit", "swin", "convnext", "clip", "siglip", "timm/test_vit")
ALL = [*KINDS, *(f"timm/{name}" for name in TIMM_KINDS)]


@pytest.mark.parametrize("kind", ALL)
def test_each_kind_of_backbone_encodes_trains_freezes_and_is_built_again(
    kind: str, tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    """The features of a frame do not depend on the other frames."""
    if kind in KINDS:
        _, width, stages = KINDS[kind]
    else:
        width, stages = TIMM_KINDS[kind.removeprefix("timm/")]
    backbone = backbone_of(kind, tmp_path).eval()
    with torch.no_grad():
        features_ND = backbone(pixels_NCHW)
        alone = torch.cat(list(map(backbone, pixels_NCHW.split(1))))
    assert features_ND.shape == (5, width) and backbone.feature_width == width
    assert torch.allclose(features_ND, alone, atol=1e-5)
    assert features_ND.std(0).mean() > 1e-4, "every frame has the same features"

    settings = json.loads(json.dumps(backbone.settings()))
    again = Backbone.from_settings(settings).eval()
    again.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pixels_NCHW), features_ND)

    checkpointed = copy.deepcopy(backbone)
    checkpointed.checkpoint_activations()
    for module in (backbone, checkpointed):
        torch.manual_seed(0)
        module.train()(pixels_NCHW).square().sum().backward()
    reached = 0
    pairs = zip(backbone.parameters(), checkpointed.parameters(), strict=True)
    for parameter, other in pairs:
        if parameter.grad is not None:
            reached += int(parameter.grad.abs().sum() > 0)
            torch.testing.assert_close(other.grad, parameter.grad, atol=1e-4, rtol=1e-4)
    assert reached > len(list(backbone.parameters())) / 2

    again.freeze(stages)
    with pytest.raises(
        UserError, match=rf"visual\.frozen_stages must be at most {stages},"
    ):
        again.freeze(stages + 1)
    last = Backbone.from_settings(settings)
    last.freeze(stages - 1)
    every = {name for name, _ in last.named_parameters()}
    assert trained_names(again) < trained_names(last) < every


@pytest.mark.parametrize("kind", ["resnet", "vit", "timm/resnet10t"])
def test_a_frozen_backbone_stays_bit_identical(
    kind: str, tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    backbone = backbone_of(kind, tmp_path)
    backbone.tune(Tuning("frozen", section="visual"))
    visual = VisualEncoder(backbone=backbone).train()
    before = {name: tensor.clone() for name, tensor in visual.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in visual.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1
    )
    visual(pixels_NCHW, torch.tensor([2, 3])).sum().backward()
    optimizer.step()
    assert not any(module.training for module in visual.backbone.modules())
    assert all(p.grad is None for p in visual.backbone.parameters())
    assert same_tensors(before, visual.backbone.state_dict())
    assert all(p.grad is not None for p in visual.temporal.parameters())


@pytest.mark.parametrize("kind", LORA)
def test_only_lora_adapters_are_trained_and_can_be_merged(
    kind: str, tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    backbone = backbone_of(kind, tmp_path)
    settings = backbone.settings()
    with torch.no_grad():
        before = backbone.eval()(pixels_NCHW)
    backbone.tune(Tuning("lora", rank=2, dropout=0.0, section="visual"))
    with torch.no_grad():
        assert torch.allclose(backbone.eval()(pixels_NCHW), before, atol=1e-6)
    learns = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert learns and all(".lora_" in name for name in learns)
    optimizer = torch.optim.Adam(learns.values(), lr=0.05)
    for _ in range(2):  # in the first step only B, which is 0, has a gradient
        optimizer.zero_grad()
        backbone(pixels_NCHW).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learns.values())
    with torch.no_grad():
        after = backbone.eval()(pixels_NCHW)
    assert not torch.allclose(after, before, atol=1e-3)
    whole = Backbone.from_settings(settings).eval()
    whole.load_state_dict(dict(merged(backbone.state_dict().items(), backbone)))
    with torch.no_grad():
        assert torch.allclose(whole(pixels_NCHW), after, atol=1e-4)


def test_lora_adapters_for_a_resnet_raise_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"visual\.tune must be full or frozen for a ResNetModel"
    ):
        backbone_of("resnet", tmp_path).tune(Tuning("lora", section="visual"))


def test_random_numbers_drawn_later_do_not_depend_on_pretrained_weights(
    tmp_path: Path,
) -> None:
    """The new parts of a run start with the same values for all weights of the backbone."""
    weights, later = saved("vit", tmp_path), []
    for pretrained in (True, False):
        torch.manual_seed(3)
        build_backbone(weights, pretrained=pretrained, crop_size=CROP)
        later.append(torch.rand(4))
    assert torch.equal(*later)


def test_a_backbone_reads_frames_of_another_size_than_in_pretraining(
    tmp_path: Path,
) -> None:
    """transformers interpolates the positions in each forward pass, timm does it once."""
    for kind in ("vit", "clip", "siglip", "timm/test_vit"):
        weights = saved(kind, tmp_path / kind)
        backbone = build_backbone(weights, crop_size=64).eval()
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, backbone.feature_width)


def test_running_statistics_of_timms_batch_norm_are_updated_once_a_step(
    pixels_NCHW: torch.Tensor,
) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("timm/test_resnet", pretrained=False, crop_size=CROP).train()
    plain = copy.deepcopy(backbone)
    norm, other = backbone.model.bn1, plain.model.bn1
    assert isinstance(norm, nn.BatchNorm2d)
    with BatchStatistics(backbone, World(0, 1, 0, 1)), torch.no_grad():
        for _ in range(3):
            backbone(pixels_NCHW)
    with torch.no_grad():
        plain(pixels_NCHW)
    assert torch.allclose(norm.running_mean, other.running_mean, atol=1e-6)
    assert torch.allclose(norm.running_var, other.running_var, atol=1e-6)
    backbone.freeze_batch_norm = True
    assert not backbone.train().model.bn1.training and backbone.training


def test_settings_that_no_library_knows_raise_an_error() -> None:
    settings = {"library": "transformers", "config": {"model_type": "nothing_known"}}
    with pytest.raises(UserError, match="nothing_known"):
        Backbone.from_settings(settings)
    with pytest.raises(UserError, match="Cannot build a backbone from the stored settings"):
        Backbone.from_settings(
            {"library": "timm", "config": {"model_name": "nothing_known"}}
        )
