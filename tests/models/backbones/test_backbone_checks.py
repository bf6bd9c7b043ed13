"""Checks of a backbone: weights must fill it, and it must be able to read the frames."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flallm_ds.models.backbones.build import build_backbone
from tests.helpers.backbones import CROP, TOKENS, changed, refused, saved
from tests.helpers.tensors import same_tensors


def test_a_model_that_reads_videos_raises_an_error(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(**TOKENS, image_size=32, num_frames=2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused(r"data\.crop_size=32", str(tmp_path))


def test_a_model_that_draws_random_numbers_raises_an_error(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**TOKENS, image_size=32, patch_size=8)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused("which draws random numbers", str(tmp_path))


def test_frames_that_are_not_whole_patches_raise_an_error(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    refused(
        r"data\.crop_size must be a multiple of 16, .*=32 or 48\.", weights, crop_size=40
    )
    timms = saved("timm/test_vit", tmp_path / "timm")
    refused(r"data\.crop_size must be a multiple of 16", timms, crop_size=40)


def test_positions_for_frames_of_another_size_raise_an_error(tmp_path: Path) -> None:
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[1, 1, 1],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    assert build_backbone(str(tmp_path), crop_size=64).feature_width == 16
    refused(r"frames of data\.crop_size=80 px", str(tmp_path), crop_size=80)


# For each kind of backbone: a tensor of one layer too many, and a tensor that it needs.
TENSORS = {
    "vit": ("encoder.layer.7.output.dense.weight", "layernorm.weight"),
    "dinov2": ("encoder.layer.1.attention.attention.gate.weight", "layernorm.bias"),
    "resnet": (
        "encoder.stages.0.layers.5.layer.0.convolution.weight",
        "embedder.convolution.weight",
    ),
    "timm/test_vit": ("blocks.17.mlp.fc1.weight", "norm.weight"),
    "timm/resnet10t": ("layer1.0.se.fc1.weight", "layer1.0.conv1.weight"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_unexpected_and_missing_tensors_raise_an_error(kind: str, tmp_path: Path) -> None:
    surplus, needed = TENSORS[kind]
    weights = saved(kind, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    changed(tmp_path, {surplus: torch.ones(2)})
    refused(
        r"1 of their tensors belong to no part of the model .*, so the config is of another model",
        weights,
        width=16,
    )
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed(tmp_path, {}, fewer=needed)
    refused(
        r"Cannot load the weights .*: .*(weight|bias) is missing",
        weights,
        width=16,
    )


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(
    "key",
    ["classifier.weight", "head.weight", "text_model.embed.weight", "decoder.mask.bias"],
)
def test_heads_and_other_models_next_to_a_backbone_are_ignored(
    kind: str, key: str, tmp_path: Path
) -> None:
    weights = saved(kind, tmp_path)
    before = build_backbone(weights, width=16, crop_size=CROP).state_dict()
    changed(tmp_path, {key: torch.ones(2)})
    after = build_backbone(weights, width=16, crop_size=CROP).state_dict()
    assert same_tensors(before, after)
