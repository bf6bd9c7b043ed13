"""Image encoders of transformers and timm as backbones; all tiny, saved and loaded from folders."""

import copy
import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.models import backbones
from flallm_ds.models.backbones import Backbone, build_backbone, check_reachable, resnet_18
from flallm_ds.models.llm.tuning import Tuning, merged
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.training.batch_statistics import BatchStatistics

CROP = 32
TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
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
LORA = ("dinov3_vit", "vit", "swin", "convnext", "clip", "siglip", "timm/test_vit")


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


@pytest.fixture
def pixels_NCHW() -> torch.Tensor:
    return torch.randn(5, 3, CROP, CROP, generator=torch.Generator().manual_seed(1))


ALL = [*KINDS, *(f"timm/{name}" for name in TIMM_KINDS)]


@pytest.mark.parametrize("kind", ALL)
def test_a_backbone_of_each_kind(kind: str, tmp_path: Path, pixels_NCHW: torch.Tensor) -> None:
    """Its features are of each frame alone, gradients reach it, frozen it stays, and it is built again."""
    width, stages = KINDS[kind][1:] if kind in KINDS else TIMM_KINDS[kind.removeprefix("timm/")]
    backbone = backbone_of(kind, tmp_path).eval()
    with torch.no_grad():
        features_ND = backbone(pixels_NCHW)
        alone = torch.cat([backbone(frame) for frame in pixels_NCHW.split(1)])
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
    gradients = {n: p.grad for n, p in backbone.named_parameters()}
    assert sum(g is not None and g.abs().sum() > 0 for g in gradients.values()) > len(gradients) / 2
    for name, parameter in checkpointed.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)

    again.freeze(stages)
    frozen = sum(not p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match=rf"visual\.frozen_stages must be 0 to {stages}"):
        again.freeze(stages + 1)
    last = Backbone.from_settings(settings)
    last.freeze(stages - 1)
    assert 0 < sum(not p.requires_grad for p in last.parameters()) < frozen


@pytest.mark.parametrize("kind", ["resnet", "vit", "timm/resnet10t"])
def test_a_frozen_backbone_keeps_every_bit(kind: str, tmp_path: Path, pixels_NCHW: torch.Tensor) -> None:
    backbone = backbone_of(kind, tmp_path)
    backbone.tune(Tuning("frozen", section="visual"))
    visual = VisualEncoder(backbone=backbone).train()
    before = {name: tensor.clone() for name, tensor in visual.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in visual.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    visual(pixels_NCHW, torch.tensor([2, 3])).sum().backward()
    optimizer.step()
    assert not any(module.training for module in visual.backbone.modules())
    assert all(p.grad is None for p in visual.backbone.parameters())
    assert all(torch.equal(before[name], t) for name, t in visual.backbone.state_dict().items())
    assert all(p.grad is not None for p in visual.temporal.parameters())


@pytest.mark.parametrize("kind", LORA)
def test_low_rank_additions_alone_learn_and_are_merged(
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


# --- what its features are


def test_a_pooler_without_weights_is_left_out_for_the_class_token(
    tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    """As of ViTs that were saved with a classifier: transformers would fill a pooler with random ones."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TOKENS, image_size=32)).eval()
    model.save_pretrained(tmp_path)
    backbone = build_backbone(str(tmp_path), crop_size=CROP).eval()
    with torch.no_grad():
        expected = model.vit(pixels_NCHW).last_hidden_state[:, 0]
        assert torch.allclose(backbone(pixels_NCHW), expected, atol=1e-6)
    assert not any("pooler" in name for name in backbone.state_dict())
    assert Backbone.from_settings(backbone.settings()).state_dict().keys() == backbone.state_dict().keys()


def test_without_pooled_output_and_class_token_it_is_the_mean(
    tmp_path: Path, pixels_NCHW: torch.Tensor
) -> None:
    config = transformers.PvtV2Config(
        hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], image_size=32
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = build_backbone(str(tmp_path), crop_size=CROP).eval()
    assert backbone.recipe.output == "mean"
    with torch.no_grad():
        last_NDHW = backbone.model(pixels_NCHW).last_hidden_state
        assert torch.allclose(backbone(pixels_NCHW), last_NDHW.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("mean_std", [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))])
def test_pixels_are_normalised_as_the_weights_know_them(
    mean_std: tuple[tuple[float, ...], tuple[float, ...]], tmp_path: Path
) -> None:
    """Of transformers by its image processor, of timm by its record of the weights."""
    mean, std = mean_std
    weights = saved("vit", tmp_path)
    normalises = mean[0] > 0
    processor = {"do_normalize": normalises, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = build_backbone(weights, crop_size=CROP).eval()
    bytes_NCHW = torch.rand(3, 3, CROP, CROP)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (bytes_NCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.no_grad():
        ours = backbone(normalised(IMAGENET_MEAN, IMAGENET_STD))
        theirs = backbone.model(normalised(mean, std), interpolate_pos_encoding=True).pooler_output
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert backbone.settings()["mean"] == mean and backbone.settings()["std"] == std
    assert "scale" not in backbone.state_dict()


def test_a_processor_out_of_reach_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compute node whose cache holds a model's weights, but not how its pixels are normalised."""
    saved("vit", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(backbones, "_image_config", lambda weights: config)
    with pytest.raises(UserError, match=r"with its preprocessor_config.json, but that of no/vit is not"):
        build_backbone("no/vit", crop_size=CROP)


def test_pixels_in_another_order_are_refused(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_flip_channel_order": True}))
    with pytest.raises(UserError, match="RGB"):
        build_backbone(weights, crop_size=CROP)


def test_timms_features_are_timms(tmp_path: Path, pixels_NCHW: torch.Tensor) -> None:
    weights = saved("timm/test_vit", tmp_path)
    theirs = timm.create_model(f"local-dir:{weights}", pretrained=True, num_classes=0, img_size=CROP).eval()
    backbone = build_backbone(weights, crop_size=CROP).eval()
    norm = timm.data.resolve_model_data_config(theirs)
    with torch.no_grad():
        ours, own = (
            torch.tensor(values).view(2, 3, 1, 1)
            for values in ([IMAGENET_MEAN, IMAGENET_STD], [norm["mean"], norm["std"]])
        )
        own_NCHW = (pixels_NCHW * ours[1] + ours[0] - own[0]) / own[1]
        assert torch.allclose(backbone(pixels_NCHW), theirs(own_NCHW), atol=1e-5)


def test_timms_weights_from_a_file_and_without(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = build_backbone(f"timm/test_resnet@{tmp_path / 'weights.pth'}", crop_size=CROP)
    assert torch.equal(loaded.model.conv1[0].weight, source.conv1[0].weight)
    torch.manual_seed(2)
    random = build_backbone("timm/test_resnet", pretrained=False, crop_size=CROP)
    assert not torch.equal(random.model.conv1[0].weight, source.conv1[0].weight)


def test_an_architecture_with_random_weights(tmp_path: Path) -> None:
    weights = saved("dinov2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(1)
    backbone = build_backbone(weights, pretrained=False, crop_size=CROP)
    assert backbone.feature_width == 32
    refused(r"must hold weights .*--visual\.pretrained=false", weights)


def test_random_numbers_drawn_later_do_not_depend_on_the_weights(tmp_path: Path) -> None:
    """So a run's new parts begin alike, whatever its backbone's weights."""
    weights, later = saved("vit", tmp_path), []
    for pretrained in (True, False):
        torch.manual_seed(3)
        build_backbone(weights, pretrained=pretrained, crop_size=CROP)
        later.append(torch.rand(4))
    assert torch.equal(*later)


def test_frames_of_another_size_than_the_weights_were_trained_on(tmp_path: Path) -> None:
    """Positions are interpolated: by transformers in each forward, by timm once."""
    for kind in ("vit", "clip", "siglip", "timm/test_vit"):
        weights = saved(kind, tmp_path / kind)
        backbone = build_backbone(weights, crop_size=64).eval()
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, backbone.feature_width)


def test_statistics_of_timms_batch_norm_enter_once_a_step(pixels_NCHW: torch.Tensor) -> None:
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


# --- what is refused


def refused(match: str, weights: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        build_backbone(weights, **{"crop_size": CROP, **options})


def test_a_model_that_does_not_read_images_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TOKENS, vocab_size=64)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused(r"must name an encoder of images, but .* is a bert model", str(tmp_path))


def test_a_model_that_reads_videos_is_refused(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(**TOKENS, image_size=32, num_frames=2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused(r"data\.crop_size=32", str(tmp_path))


def test_a_model_that_draws_at_random_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**TOKENS, image_size=32, patch_size=8)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    refused("draws at random", str(tmp_path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    refused("the folder is empty", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    refused("must name a model that transformers knows", str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused("must name a model that transformers knows", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    other = saved("dinov2", tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes(Path(other, "model.safetensors").read_bytes())
    refused("the weights .* must hold", weights)
    (tmp_path / "model.safetensors").write_bytes(b"not whole")
    refused(r"model\.safetensors must load, but did not: the file is cut off or damaged", weights)


def test_frames_that_are_not_whole_patches_are_refused(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    refused(r"data\.crop_size must be a multiple of 16, .*=32, or 48\.", weights, crop_size=40)
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


def test_a_resnet_of_another_width_is_refused(tmp_path: Path) -> None:
    refused(r"visual\.width must be 16", saved("resnet", tmp_path), width=64)


def test_names_that_timm_does_not_know_are_refused_with_near_ones() -> None:
    refused(r"timm.* resnet81 is none: did you mean .*resnet18", "timm/resnet81")
    refused(r"resnet18\.a1_in2k is none: did you mean .*resnet18\.a1_in1k", "timm/resnet18.a1_in2k")
    refused("there is no file nowhere.pth", "timm/resnet18@nowhere.pth")


def test_without_timm_its_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(r"pip install 'flallm_ds\[backbones\]'", "timm/resnet18")


def test_low_rank_additions_to_a_resnet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"visual\.tune must be full or frozen for a ResNetModel"):
        backbone_of("resnet", tmp_path).tune(Tuning("lora", section="visual"))


def test_settings_that_no_library_knows_are_refused() -> None:
    settings = {"library": "transformers", "config": {"model_type": "nothing_known"}}
    with pytest.raises(UserError, match="nothing_known"):
        Backbone.from_settings(settings)
    with pytest.raises(UserError, match="settings of a backbone"):
        Backbone.from_settings({"library": "timm", "config": {"model_name": "nothing_known"}})


# --- what a folder or file may be by mistake, and tensors that fit no part


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 4870\n"


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def pointer(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(POINTER) and None


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "facebook/dinov2-small"}')


def only(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        if name:
            (folder / name).write_bytes(b"GGUF")

    return spoil


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(folder / "touched")))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer": (pointer("model.safetensors"), r"model\.safetensors: it is a git-lfs pointer"),
    "pointer_config": (pointer("config.json"), r"config\.json: it is a git-lfs pointer"),
    "adapter": (adapter, r"visual\.weights must be a whole image encoder, .* Name facebook/dinov2-small"),
    "gguf": (only("vit.gguf"), r"Cannot train .*vit\.gguf: GGUF files"),
    "empty": (only(""), r"The image encoder .* the folder is empty\. Check --visual\.weights"),
    "no_config": (without("config.json"), r"must hold the config\.json of an image encoder, got model\.saf"),
    "cut_off": (cut_off, r"model\.safetensors must load, but did not: the file is cut off or damaged"),
    "no_weights": (without("model.safetensors"), r"weights|checkpoints"),
    "pickled": (pickled, r"more than tensors, which could run code|[Ww]eights.only"),
}


@pytest.mark.parametrize("kind", ["vit", "timm/test_vit"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_of_another_kind_is_refused_by_its_cause(kind: str, fault: str, tmp_path: Path) -> None:
    spoil, sentence = FAULTS[fault]
    weights = saved(kind, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence) as raised:
        build_backbone(weights, crop_size=CROP)
    assert "\n" not in str(raised.value) and not (tmp_path / "touched").exists()


def test_files_and_addresses_that_are_no_backbone_are_refused(tmp_path: Path) -> None:
    weights = saved("vit", tmp_path)
    refused(r"got the file .*model\.safetensors\. Name its folder: ", f"{weights}/model.safetensors")
    refused("GGUF", f"{weights}/vit.gguf")
    (tmp_path / "resnet.pth").write_text(POINTER)
    for name in (f"{weights}/resnet.pth", f"timm/resnet10t@{weights}/resnet.pth"):
        refused("it is a git-lfs pointer", name)
    address = "https://huggingface.co/facebook/dinov2-small/tree/main"
    for read in (check_reachable, build_backbone):
        with pytest.raises(UserError, match=r"got the address https.* Name it as facebook/dinov2-small\."):
            read(address)


def changed(folder: Path, more: dict[str, torch.Tensor], fewer: str = "no such tensor") -> None:
    path = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if not name.endswith(fewer)}
    save_file(tensors | more, path, metadata={"format": "pt"})


# Of each kind: a tensor within a part of it, as of one more layer, and one that it needs.
TENSORS = {
    "vit": ("encoder.layer.7.output.dense.weight", "layernorm.weight"),
    "dinov2": ("encoder.layer.1.attention.attention.gate.weight", "layernorm.bias"),
    "resnet": ("encoder.stages.0.layers.5.layer.0.convolution.weight", "embedder.convolution.weight"),
    "timm/test_vit": ("blocks.17.mlp.fc1.weight", "norm.weight"),
    "timm/resnet10t": ("layer1.0.se.fc1.weight", "layer1.0.conv1.weight"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_without_a_part_and_parts_without_a_tensor_are_refused(kind: str, tmp_path: Path) -> None:
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
    refused(r"the weights .* must hold .*weight|the weights .* must hold .*bias", weights, width=16)


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(
    "key", ["classifier.weight", "head.weight", "text_model.embed.weight", "decoder.mask.bias"]
)
def test_heads_and_other_models_next_to_a_backbone_are_left_out(kind: str, key: str, tmp_path: Path) -> None:
    weights = saved(kind, tmp_path)
    before = build_backbone(weights, width=16, crop_size=CROP).state_dict()
    changed(tmp_path, {key: torch.ones(2)})
    after = build_backbone(weights, width=16, crop_size=CROP).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("kind", "whole", "surplus"),
    [
        ("vit", "ViTForImageClassification", "vit.encoder.layer.7.output.dense.weight"),
        ("vit", "ViTForImageClassification", "vit.pooler.dense.weight"),  # of another shape
        ("dinov2", "Dinov2ForImageClassification", "dinov2.encoder.layer.9.mlp.fc1.weight"),
        ("resnet", "ResNetForImageClassification", "resnet.encoder.stages.1.layers.4.layer.0.bias"),
        ("clip", "CLIPModel", "vision_model.encoder.layers.9.mlp.fc1.weight"),
        ("beit", "BeitForMaskedImageModeling", "beit.encoder.layer.9.output.dense.weight"),
    ],
)
def test_the_backbone_of_a_whole_model_must_fit_as_well(
    kind: str, whole: str, surplus: str, tmp_path: Path
) -> None:
    """As most checkpoints of the hub: the tensors have a prefix, next to a head or a text model."""
    getattr(transformers, whole)(KINDS[kind][0]()).save_pretrained(tmp_path)
    build_backbone(str(tmp_path), width=16, crop_size=CROP)
    changed(tmp_path, {surplus: torch.ones(2)})
    refused(r"belong to no part of it|must hold pooler\.dense\.weight", str(tmp_path), width=16)


def test_a_torchvision_file_of_another_network_is_refused(tmp_path: Path) -> None:
    """As of an SE-ResNet, which has the layers of a ResNet and more."""
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
            lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'normalization')}.",
            name,
        )
        state[name] = tensor
    path = tmp_path / "resnet.pth"
    torch.save(state | {"fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}, path)
    build_backbone(str(path), width=8, crop_size=CROP)
    torch.save(state | {"layer1.0.se.fc1.weight": torch.ones(2)}, path)
    refused(r"belong to no part of it, .*se\.fc1\.weight", str(path), width=8)
