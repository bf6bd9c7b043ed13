"""VisualEncoder: packed clips, chunks of frames, settings, ImageNet weights and
freezing."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.build import build_backbone
from flallm_ds.models.visual_encoder import VisualEncoder, resnet_width
from tests.helpers.tensors import num_parameters, same_tensors, trained_names

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = VisualEncoder(width=8).eval()
    # Statistics that change their input.
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return encoder


def torchvision_resnet18(
    width: int = 64, batches_tracked: bool = True
) -> dict[str, torch.Tensor]:
    """Return a state dict with the names and shapes of torchvision's resnet18.

    All tensors have different values.
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (width, 3, 7, 7)}

    def norm(name: str, channels: int) -> None:
        for part in NORM[:5] if batches_tracked else NORM[:4]:
            shapes[f"{name}.{part}"] = () if part == "num_batches_tracked" else (channels,)

    norm("bn1", width)
    channels = width
    for layer in range(1, 5):
        out = width * 2 ** (layer - 1)
        for block in range(2):
            name = f"layer{layer}.{block}"
            shapes[f"{name}.conv1.weight"] = (out, channels, 3, 3)
            norm(f"{name}.bn1", out)
            shapes[f"{name}.conv2.weight"] = (out, out, 3, 3)
            norm(f"{name}.bn2", out)
            if block == 0 and layer > 1:
                shapes[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                norm(f"{name}.downsample.1", out)
            channels = out
    shapes |= {"fc.weight": (1000, 8 * width), "fc.bias": (1000,)}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        # A counter of batches has no shape.
        state[name] = torch.rand(shape, generator=generator) if shape else torch.tensor(7)
    return state


def each_alone(
    module: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    packed: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """Return what a module gives for packed clips, called once for each clip."""
    results = []
    for clip in packed.split(lengths):
        results.append(module(clip, torch.tensor([len(clip)])))
    return torch.cat(results)


# --- packing


def test_the_features_of_a_clip_do_not_depend_on_its_batch(encoder):
    num_frames_B = torch.tensor([5, 1, 9, 2])
    pixels_NCHW = torch.randn(17, 3, 32, 32)
    with torch.no_grad():
        together = encoder(pixels_NCHW, num_frames_B)
        alone = each_alone(encoder, pixels_NCHW, [5, 1, 9, 2])
    assert together.shape == (17, 64)
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std() > 0.05


def test_the_features_of_a_frame_depend_on_neighbours_in_its_clip_alone(encoder):
    num_frames_B = torch.tensor([6, 4])
    pixels_NCHW = torch.randn(10, 3, 32, 32)
    changed = pixels_NCHW.clone()
    changed[5] += 1  # the last frame of the first clip
    with torch.no_grad():
        before = encoder(pixels_NCHW, num_frames_B)
        after = encoder(changed, num_frames_B)
    differs = (before - after).abs().amax(1) > 1e-6
    assert differs.tolist() == [False] * 4 + [True] * 2 + [False] * 4


def test_a_wider_kernel_keeps_the_length_and_the_clips_apart():
    torch.manual_seed(0)
    encoder = VisualEncoder(width=4, temporal_kernel=5).eval()
    pixels_NCHW = torch.randn(11, 3, 32, 32)
    num_frames_B = torch.tensor([3, 8])
    with torch.no_grad():
        together = encoder(pixels_NCHW, num_frames_B)
        alone = each_alone(encoder, pixels_NCHW, [3, 8])
    assert len(together) == 11 and torch.allclose(together, alone, atol=1e-5)


def test_the_temporal_module_is_a_convolution_with_zeros_at_the_ends(encoder):
    frames_ND = torch.randn(7, 64)
    temporal = encoder.temporal
    with torch.no_grad():
        padded = torch.cat([torch.zeros(1, 64), frames_ND, torch.zeros(1, 64)])
        windows = padded.unfold(0, 3, 1)  # (7, 64, 3)
        by_hand = torch.einsum("oik,tik->to", temporal.conv.weight, windows)
        expected = torch.relu(temporal.norm(by_hand + temporal.conv.bias))
        assert torch.allclose(temporal(frames_ND, torch.tensor([7])), expected, atol=1e-5)


def test_batch_norm_of_the_temporal_module_never_sees_the_gaps(encoder):
    module = encoder.temporal.train()
    try:
        frames_ND = torch.randn(9, 64)
        with torch.no_grad():
            out = module(frames_ND, torch.tensor([4, 5]))
            first, second = frames_ND.split([4, 5])
            signs = torch.cat([module.conv(first.T), module.conv(second.T)], 1).T
            normalised = nn.functional.batch_norm(
                signs, None, None, module.norm.weight, module.norm.bias, True
            )
            expected = torch.relu(normalised)
        assert torch.allclose(out, expected, atol=1e-5)
    finally:
        module.eval()


@pytest.mark.parametrize(("width", "features"), [(8, 64), (16, 128), (64, 512)])
def test_features_are_eight_times_as_wide_as_the_first_stage(width, features):
    with torch.device("meta"):
        assert VisualEncoder(width=width).feature_width == features


def test_at_width_64_the_backbone_is_resnet18():
    """ResNet-18 has 11.69 M parameters, of which 513,000 are the classifier."""
    with torch.device("meta"):
        backbone = VisualEncoder().backbone
    assert num_parameters(backbone) == 11_689_512 - 513_000


# --- chunks of frames


def test_chunks_of_frames_give_the_same_features(encoder):
    pixels_NCHW, num_frames_B = torch.randn(11, 3, 32, 32), torch.tensor([8, 3])
    chunked = copy.deepcopy(encoder)
    chunked.chunk_frames = 4
    seen: list[int] = []
    chunked.backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    with torch.no_grad():
        assert torch.allclose(
            chunked(pixels_NCHW, num_frames_B),
            encoder(pixels_NCHW, num_frames_B),
            atol=1e-6,
        )
        assert seen == [4, 4, 3]
        assert chunked.frame_features(pixels_NCHW[:0]).shape == (0, 64)


def test_frames_are_not_split_if_gradients_or_batch_statistics_are_needed():
    encoder = VisualEncoder(width=4, chunk_frames=2)
    seen = []
    encoder.backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    pixels_NCHW = torch.randn(5, 3, 32, 32)
    encoder.train().frame_features(pixels_NCHW)
    encoder.eval().frame_features(pixels_NCHW)  # with gradients
    with torch.no_grad():
        encoder.train().frame_features(pixels_NCHW)  # BatchNorm sees the batch
    assert seen == [5, 5, 5]
    encoder.backbone.freeze()
    encoder.train().frame_features(pixels_NCHW)
    assert seen[3:] == [2, 2, 1]


# --- settings


def test_settings_build_the_same_architecture(encoder):
    settings = json.loads(json.dumps(VisualEncoder(width=8, temporal_kernel=5).settings()))
    again = VisualEncoder.from_settings(settings)
    assert (
        again.temporal.conv.kernel_size == (5,)
        and again.feature_width == again.backbone.feature_width == 64
    )
    assert resnet_width(settings) == 8
    same = VisualEncoder.from_settings(encoder.settings()).eval()
    same.load_state_dict(encoder.state_dict())
    pixels_NCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            same.frame_features(pixels_NCHW), encoder.frame_features(pixels_NCHW)
        )


def test_settings_with_a_width_alone_build_a_resnet_18():
    settings = {"width": 4, "temporal_kernel": 5}
    assert (
        VisualEncoder.from_settings(settings).feature_width == 32
        and resnet_width(settings) == 4
    )
    with pytest.raises(UserError, match="Cannot build a visual encoder"):
        VisualEncoder.from_settings({"depth": 4})


# --- ImageNet weights


@pytest.mark.parametrize(
    "batches_tracked", [True, False], ids=["new file", "file of before 2018"]
)
def test_torchvision_weights_are_loaded_into_the_right_tensors(tmp_path, batches_tracked):
    state = torchvision_resnet18(width=4, batches_tracked=batches_tracked)
    torch.save(state, tmp_path / "resnet18.pth")
    loaded = build_backbone(str(tmp_path / "resnet18.pth"), width=4).model.state_dict()
    assert torch.equal(
        loaded["embedder.embedder.convolution.weight"], state["conv1.weight"]
    )
    assert torch.equal(
        loaded["encoder.stages.2.layers.1.layer.0.normalization.running_var"],
        state["layer3.1.bn1.running_var"],
    )
    # Every tensor but the classifier's is used once: random tensors have different sums.
    used = sums_of(loaded)
    assert used == sums_of(state) and len(set(used)) == len(used)


def sums_of(state: dict[str, torch.Tensor]) -> list[float]:
    """Return the sum of each tensor but the counters' and the classifier's, sorted."""
    sums = []
    for name, tensor in state.items():
        if "tracked" not in name and "fc." not in name:
            sums.append(tensor.double().sum().item())
    return sorted(sums)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_the_backbone_computes_what_torchvision_computes(name, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    ours = build_backbone(str(tmp_path / f"{name}.pth")).eval()
    theirs.fc = nn.Identity()
    pixels_NCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features_ND = ours(pixels_NCHW)
        assert features_ND.shape == (2, ours.feature_width)
        assert torch.allclose(features_ND, theirs(pixels_NCHW), atol=1e-4)


def test_transformers_weights_load_from_a_folder(tmp_path):
    source = VisualEncoder(width=4).backbone
    source.model.save_pretrained(tmp_path)
    loaded = build_backbone(str(tmp_path), width=4, crop_size=32)
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_weights_of_another_width_raise_an_error(tmp_path):
    torch.save(torchvision_resnet18(width=8), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"Cannot load the weights .* for visual\.width=4"):
        build_backbone(str(tmp_path / "resnet18.pth"), width=4)


def test_a_missing_file_of_weights_raises_an_error(tmp_path):
    with pytest.raises(
        UserError, match=r"visual\.weights must be an existing file, got .*none\.pth"
    ):
        build_backbone(str(tmp_path / "none.pth"))


def test_a_file_without_the_state_dict_of_a_resnet_raises_an_error(tmp_path):
    (tmp_path / "resnet18.pth").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"resnet18\.pth"):
        build_backbone(str(tmp_path / "resnet18.pth"))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"must be a ResNet of torchvision"):
        build_backbone(str(tmp_path / "head.pth"))


def test_a_frozen_batch_norm_stays_in_eval_mode_and_keeps_its_statistics():
    encoder = VisualEncoder(width=16)
    encoder.backbone.freeze_batch_norm = True
    encoder.train()
    before = {name: value.clone() for name, value in encoder.backbone.named_buffers()}
    encoder(torch.randn(6, 3, 32, 32), torch.tensor([2, 4])).sum().backward()
    assert same_tensors(before, dict(encoder.backbone.named_buffers()))
    assert encoder.temporal.norm.training
    convolution = encoder.backbone.model.embedder.embedder.convolution.weight
    assert convolution.grad is not None and convolution.grad.abs().sum() > 0


def test_frozen_stages_keep_their_weights_and_the_rest_learns():
    encoder = VisualEncoder(width=16).train()
    encoder.backbone.freeze(stages=3)
    encoder(torch.randn(6, 3, 32, 32), torch.tensor([2, 4])).sum().backward()
    learns = {name for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    assert learns and all(name.startswith("model.encoder.stages.3.") for name in learns)
    assert trained_names(encoder.backbone) == learns
    assert all(p.grad is not None for p in encoder.temporal.parameters())
