"""Backbones of transformers: their features, and the errors for other models."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError
from flallm_ds.models.backbones import from_transformers
from flallm_ds.models.backbones.build import build_backbone
from flallm_ds.models.backbones.interface import Backbone
from tests.helpers.backbones import (
    CROP,
    KINDS,
    TOKENS,
    changed,
    refused,
    saved,
)


def test_the_class_token_replaces_a_pooler_without_weights(
    tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    """A ViT that was saved with a classifier has no pooler; transformers would fill one
    with random weights."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**TOKENS, image_size=32)
    ).eval()
    model.save_pretrained(tmp_path)
    backbone = build_backbone(str(tmp_path), crop_size=CROP).eval()
    with torch.no_grad():
        expected = model.vit(pixels_NCHW).last_hidden_state[:, 0]
        assert torch.allclose(backbone(pixels_NCHW), expected, atol=1e-6)
    assert not any("pooler" in name for name in backbone.state_dict())
    assert (
        Backbone.from_settings(backbone.settings()).state_dict().keys()
        == backbone.state_dict().keys()
    )


def test_the_mean_is_used_without_pooled_output_and_class_token(
    tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    config = transformers.PvtV2Config(
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        image_size=32,
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = build_backbone(str(tmp_path), crop_size=CROP).eval()
    assert backbone.spec.output == "mean"
    with torch.no_grad():
        last_NDHW = backbone.model(pixels_NCHW).last_hidden_state
        assert torch.allclose(backbone(pixels_NCHW), last_NDHW.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    "mean_std", [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]
)
def test_pixels_are_normalised_as_for_the_training_of_the_weights(
    mean_std: tuple[tuple[float, ...], tuple[float, ...]], tmp_path: Path
) -> None:
    """The image processor of transformers or timm's record of the weights says how."""
    mean, std = mean_std
    weights = saved("vit", tmp_path)
    normalises = mean[0] > 0
    processor = {"do_normalize": normalises, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = build_backbone(weights, crop_size=CROP).eval()
    bytes_NCHW = torch.rand(3, 3, CROP, CROP)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (bytes_NCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1
        )

    with torch.no_grad():
        ours = backbone(normalised(IMAGENET_MEAN, IMAGENET_STD))
        theirs = backbone.model(
            normalised(mean, std), interpolate_pos_encoding=True
        ).pooler_output
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert backbone.settings()["mean"] == mean and backbone.settings()["std"] == std
    assert "scale" not in backbone.state_dict()


def test_a_processor_that_is_not_available_raises_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of a compute node may hold the weights but not the image processor."""
    saved("vit", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(from_transformers, "_image_config", lambda weights: config)
    with pytest.raises(
        UserError, match=r"Cannot read the preprocessor_config\.json of no/vit"
    ):
        build_backbone("no/vit", crop_size=CROP)


def test_an_encoder_of_bgr_pixels_raises_an_error(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"do_flip_channel_order": True})
    )
    with pytest.raises(UserError, match="RGB"):
        build_backbone(weights, crop_size=CROP)


def test_a_folder_without_weights_gives_an_architecture_with_random_weights(
    tmp_path: Path,
) -> None:
    weights = saved("dinov2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(1)
    backbone = build_backbone(weights, pretrained=False, crop_size=CROP)
    assert backbone.feature_width == 32
    refused(r"must hold weights .*--visual\.pretrained=false", weights)


def test_a_model_that_does_not_read_images_raises_an_error(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TOKENS, vocab_size=64)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused(r"must name an image encoder, got .*, a bert model", str(tmp_path))


def test_a_folder_without_a_known_config_raises_an_error(tmp_path: Path) -> None:
    refused("the folder is empty", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    refused("must name a model that transformers knows", str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}'
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused("must name a model that transformers knows", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_raise_an_error(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    other = saved("dinov2", tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes(
        Path(other, "model.safetensors").read_bytes()
    )
    refused(r"Cannot load the weights .* is missing", weights)
    (tmp_path / "model.safetensors").write_bytes(b"not whole")
    refused(
        r"Cannot load the weights .*model\.safetensors: the file is truncated or damaged",
        weights,
    )


def test_a_resnet_of_another_width_raises_an_error(tmp_path: Path) -> None:
    refused(r"visual\.width must be 16", saved("resnet", tmp_path), width=64)


@pytest.mark.parametrize(
    ("kind", "whole", "surplus"),
    [
        ("vit", "ViTForImageClassification", "vit.encoder.layer.7.output.dense.weight"),
        # of another shape
        ("vit", "ViTForImageClassification", "vit.pooler.dense.weight"),
        ("dinov2", "Dinov2ForImageClassification", "dinov2.encoder.layer.9.mlp.fc1.weight"),
        (
            "resnet",
            "ResNetForImageClassification",
            "resnet.encoder.stages.1.layers.4.layer.0.bias",
        ),
        ("clip", "CLIPModel", "vision_model.encoder.layers.9.mlp.fc1.weight"),
        ("beit", "BeitForMaskedImageModeling", "beit.encoder.layer.9.output.dense.weight"),
    ],
)
def test_unexpected_tensors_in_a_larger_model_raise_an_error(
    kind: str, whole: str, surplus: str, tmp_path: Path
) -> None:
    """Most checkpoints of the hub hold a backbone with a prefix, and a head or a text
    model."""
    getattr(transformers, whole)(KINDS[kind][0]()).save_pretrained(tmp_path)
    build_backbone(str(tmp_path), width=16, crop_size=CROP)
    changed(tmp_path, {surplus: torch.ones(2)})
    refused(
        r"belong to no part of the model|pooler\.dense\.weight is missing",
        str(tmp_path),
        width=16,
    )
