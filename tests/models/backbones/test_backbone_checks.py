"""Weights must fill a backbone, and frames must suit it."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flallm_ds.models.backbones.build import build_backbone
from tests.helpers.backbones import CROP, TOKENS, changed, refused, saved
from tests.helpers.tensors import same_tensors


def test_a_model_that_reads_videos_is_refused(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(**TOKENS, image_size=32, num_frames=2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused(r"data\.crop_size=32", str(tmp_path))


def test_a_model_that_draws_at_random_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**TOKENS, image_size=32, patch_size=8)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused("draws at random", str(tmp_path))


def test_frames_that_are_not_whole_patches_are_refused(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    refused(
        r"data\.crop_size must be a multiple of 16, .*=32, or 48\.", weights, crop_size=40
    )
    timms = saved("timm/test_vit", tmp_path / "timm")
    refused(r"data\.crop_size must be a multiple of 16", timms, crop_size=40)


def test_positions_of_one_size_are_refused_for_another(tmp_path: Path) -> None:
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


# Of each kind: a tensor within a part of it, as of one more layer, and one that it needs.
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
def test_tensors_without_a_part_and_parts_without_a_tensor_are_refused(
    kind: str, tmp_path: Path
) -> None:
    surplus, needed = TENSORS[kind]
    weights = saved(kind, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    changed(tmp_path, {surplus: torch.ones(2)})
    refused(
        r"1 of their tensors belong to no part of it, .* being one: the config is of another",
        weights,
        width=16,
    )
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed(tmp_path, {}, fewer=needed)
    refused(
        r"the weights .* must hold .*weight|the weights .* must hold .*bias",
        weights,
        width=16,
    )


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(
    "key",
    ["classifier.weight", "head.weight", "text_model.embed.weight", "decoder.mask.bias"],
)
def test_heads_and_other_models_next_to_a_backbone_are_left_out(
    kind: str, key: str, tmp_path: Path
) -> None:
    weights = saved(kind, tmp_path)
    before = build_backbone(weights, width=16, crop_size=CROP).state_dict()
    changed(tmp_path, {key: torch.ones(2)})
    after = build_backbone(weights, width=16, crop_size=CROP).state_dict()
    assert same_tensors(before, after)
