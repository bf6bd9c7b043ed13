"""Encoding of a batch: the path that training, translation and cached features share."""

import dataclasses

import pytest
import torch

from flallm_ds.batch import Batch, FeatureBatch, VideoBatch
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.models.encode import encode
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.visual_encoder import VisualEncoder

PREPROCESS = Preprocess(frame_size=32, crop_size=28)
CPU = torch.device("cpu")


@pytest.fixture
def extractor() -> FeatureExtractor:
    torch.manual_seed(0)
    return FeatureExtractor(VisualEncoder(width=4)).eval()


@pytest.fixture
def batch() -> VideoBatch:
    """Two clips of two and three frames."""
    generator = torch.Generator().manual_seed(0)
    return VideoBatch(
        frames_NHWC=torch.randint(
            0, 256, (5, 40, 30, 3), dtype=torch.uint8, generator=generator
        ),
        num_frames_B=torch.tensor([2, 3]),
        size_B2=torch.tensor([[40.0, 30.0]] * 2),
        draws_B9=torch.rand(2, 9, generator=generator),
        target_ids_BL=torch.full((2, 1), -100),
        keys=("a", "b"),
        texts=("", ""),
        corpora=("", ""),
        languages=("", ""),
        real_B=(True, True),
    )


@pytest.mark.parametrize("train", [True, False])
def test_frames_are_encoded_as_the_extractor_encodes_them(
    extractor: FeatureExtractor, batch: VideoBatch, train: bool
) -> None:
    features_ND = encode(batch, extractor, PREPROCESS, train=train, device=CPU)
    with torch.no_grad():
        expected_ND = extractor(PREPROCESS(batch, train, CPU), batch.num_frames_B)
    assert torch.equal(features_ND, expected_ND)
    assert not features_ND.requires_grad


def test_cached_features_are_returned_unchanged(
    extractor: FeatureExtractor, batch: VideoBatch
) -> None:
    cached_ND = torch.randn(5, 32).half()
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    cached = FeatureBatch(features_ND=cached_ND, **fields)
    features_ND = encode(cached, extractor, PREPROCESS, train=True, device=CPU)
    assert torch.equal(features_ND, cached_ND.float())


def test_an_encoder_in_train_mode_raises_an_error(
    extractor: FeatureExtractor, batch: VideoBatch
) -> None:
    with pytest.raises(AssertionError, match="in train mode"):
        encode(batch, extractor.train(), PREPROCESS, train=True, device=CPU)


@pytest.mark.gpu
def test_a_gpu_computes_in_bf16_only_under_autocast(
    extractor: FeatureExtractor, batch: VideoBatch
) -> None:
    device = torch.device("cuda")
    extractor.to(device)
    arguments = (batch, extractor, PREPROCESS)
    half_ND = encode(*arguments, train=False, device=device)
    full_ND = encode(*arguments, train=False, device=device, autocast=False)
    assert half_ND.dtype == full_ND.dtype == torch.float32
    assert torch.equal(half_ND, half_ND.bfloat16().float())
    assert not torch.equal(full_ND, full_ND.bfloat16().float())
    torch.testing.assert_close(half_ND, full_ND, rtol=0.1, atol=0.1)
