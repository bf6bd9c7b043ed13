"""FeatureExtractor: the three kinds of features, frozen parts, settings and
fingerprints."""

import json

import pytest
import torch
from torch import nn
from transformers import MBartConfig
from transformers.models.mbart.modeling_mbart import MBartEncoder

from flallm_ds.models.adapters import Adapter
from flallm_ds.models.feature_extractor import FeatureExtractor, encoder_of
from flallm_ds.models.visual_encoder import VisualEncoder

KINDS = ("signs", "frames", "light_t")


def extractor(kind: str) -> FeatureExtractor:
    torch.manual_seed(0)
    visual = VisualEncoder(width=4)
    if kind != "light_t":
        return FeatureExtractor(visual, kind)
    config = MBartConfig(
        vocab_size=9,
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        max_position_embeddings=64,
        dropout=0.1,
    )
    return FeatureExtractor(
        visual, kind, Adapter(visual.feature_width, 16), encoder_of(MBartEncoder(config))
    )


@pytest.mark.parametrize(
    ("kind", "width"), [("signs", 32), ("frames", 32), ("light_t", 16)]
)
def test_features_of_a_clip_do_not_depend_on_its_batch(kind, width):
    model = extractor(kind).eval()
    pixels_NCHW, num_frames_B = torch.randn(9, 3, 32, 32), torch.tensor([4, 2, 3])
    with torch.no_grad():
        features_ND = model(pixels_NCHW, num_frames_B)
        alone = []
        for clip in torch.split(pixels_NCHW, num_frames_B.tolist()):
            alone.append(model(clip, torch.tensor([len(clip)])))
    assert features_ND.shape == (9, width) and model.feature_width == width
    torch.testing.assert_close(features_ND, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_fingerprint_does_not_depend_on_the_version_that_wrote_the_config():
    model = extractor("light_t")
    config = model.light_t_encoder.config
    before, settings = model.fingerprint(), model.settings()
    config._name_or_path, config.transformers_version = "/elsewhere", "99"
    assert model.fingerprint() == before and model.settings() == settings
    assert "transformers_version" not in json.dumps(settings | model.encoder.settings())
    config.encoder_layers = 2
    assert model.fingerprint() != before


def test_frame_wise_features_are_the_input_of_the_temporal_module():
    frames, signs = extractor("frames").eval(), extractor("signs").eval()
    pixels_NCHW, num_frames_B = torch.randn(5, 3, 32, 32), torch.tensor([5])
    with torch.no_grad():
        read = signs.encoder.temporal(frames(pixels_NCHW, num_frames_B), num_frames_B)
        torch.testing.assert_close(read, signs(pixels_NCHW, num_frames_B))


@pytest.mark.parametrize(
    ("kind", "how", "trained"),
    [
        ("signs", "all", set()),
        ("signs", "backbone", {"temporal"}),
        ("signs", "none", {"backbone", "temporal"}),
        ("frames", "none", {"backbone"}),
        ("light_t", "none", {"backbone", "temporal"}),
        ("light_t", "all", set()),
    ],
)
def test_frozen_parts_stay_frozen_in_train_mode(kind, how, trained):
    model = extractor(kind).freeze(how)
    nn.ModuleList([model]).train()
    parts = {
        "backbone": model.encoder.backbone,
        "temporal": model.encoder.temporal,
        "adapter": model.vl_adapter,
        "encoder": model.light_t_encoder,
    }
    for name, part in parts.items():
        if part is not None:
            is_trained = name in trained
            assert part.training == is_trained, name
            assert {p.requires_grad for p in part.parameters()} == {is_trained}, name
    before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    model(torch.randn(6, 3, 32, 32), torch.tensor([6]))
    changed = set()
    for name, buffer in model.named_buffers():
        if name in before and not buffer.equal(before[name]):
            changed.add(name.split(".")[1])
    assert changed == trained


@pytest.mark.parametrize("kind", KINDS)
def test_settings_and_weights_make_the_same_extractor(kind):
    model = extractor(kind)
    visual = VisualEncoder.from_settings(model.encoder.settings())
    again = FeatureExtractor.from_settings(visual, model.settings())
    assert again.fingerprint() != model.fingerprint()
    again.load_state_dict(model.state_dict())
    assert again.fingerprint() == model.fingerprint()


def test_the_fingerprint_depends_on_the_kind_and_on_every_weight():
    assert len({extractor(kind).fingerprint() for kind in KINDS}) == 3
    model = extractor("signs")
    before = model.fingerprint()
    with torch.no_grad():
        model.encoder.temporal.norm.running_var[3] += 1e-3
    assert model.fingerprint() != before
