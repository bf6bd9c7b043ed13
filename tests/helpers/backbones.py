"""Tiny image encoders of each kind, saved into folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.build import build_backbone
from flallm_ds.models.backbones.interface import Backbone

CROP = 32
TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
STAGES = {"hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1]}

# Of each kind: its config, the width of its features, the stages that it can freeze.
KINDS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "resnet": (
        lambda: transformers.ResNetConfig(embedding_size=16, layer_type="basic", **STAGES),
        32,
        4,
    ),
    "resnet-bottleneck": (
        lambda: transformers.ResNetConfig(embedding_size=16, layer_type="bottleneck", **STAGES),
        32,
        4,
    ),
    "convnext": (lambda: transformers.ConvNextConfig(**STAGES, layer_scale_init_value=1.0), 32, 4),
    "convnextv2": (lambda: transformers.ConvNextV2Config(**STAGES), 32, 4),
    "dinov2": (lambda: transformers.Dinov2Config(**TOKENS, image_size=48, patch_size=16), 32, 3),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**TOKENS, image_size=48, patch_size=16),
        32,
        3,
    ),
    "dinov3_vit": (lambda: transformers.DINOv3ViTConfig(**TOKENS, image_size=48, patch_size=16), 32, 3),
    "dinov3_convnext": (lambda: transformers.DINOv3ConvNextConfig(**STAGES), 32, 4),
    "vit": (lambda: transformers.ViTConfig(**TOKENS, image_size=48, patch_size=16), 32, 3),
    "swin": (
        lambda: transformers.SwinConfig(
            embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=48, patch_size=4
        ),
        32,
        2,
    ),
    "beit": (lambda: transformers.BeitConfig(**TOKENS, image_size=32, patch_size=16), 32, 3),
    "clip": (
        lambda: transformers.CLIPConfig(
            text_config={**TOKENS, "vocab_size": 64},
            vision_config={**TOKENS, "image_size": 48, "patch_size": 16},
        ),
        32,
        3,
    ),
    "siglip": (
        lambda: transformers.SiglipVisionConfig(**TOKENS, image_size=48, patch_size=16),
        32,
        3,
    ),
}  # fmt: skip
TIMM_KINDS = {
    "resnet10t": (512, 4),
    "test_vit": (64, 6),
    "test_convnext": (64, 4),
}


def saved(kind: str, folder: Path) -> str:
    """visual.weights of a tiny backbone with random weights in a folder."""
    torch.manual_seed(0)
    if kind.startswith("timm/"):
        name = kind.removeprefix("timm/")
        model = timm.create_model(name, num_classes=0)
        timm.models.save_for_hf(model, folder, safe_serialization=True)
    else:
        model = transformers.AutoModel.from_config(KINDS[kind][0]())
        model.save_pretrained(folder)
    return str(folder)


def backbone_of(kind: str, folder: Path, **options: Any) -> Backbone:
    return build_backbone(saved(kind, folder), width=16, crop_size=CROP, **options)


def refused(match: str, weights: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        build_backbone(weights, **{"crop_size": CROP, **options})


def changed(
    folder: Path, more: dict[str, torch.Tensor], fewer: str = "no such tensor"
) -> None:
    path = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if not name.endswith(fewer)}
    save_file(tensors | more, path, metadata={"format": "pt"})
