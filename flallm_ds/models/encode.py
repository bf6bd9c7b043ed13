"""Encode a batch as visual features: for training, translation and cached features."""

import torch

from flallm_ds.batch import Batch, FeatureBatch, VideoBatch
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.models.feature_extractor import FeatureExtractor


@torch.no_grad()
def encode(
    batch: Batch,
    extractor: FeatureExtractor,
    preprocess: Preprocess,
    *,
    train: bool,
    device: torch.device,
    autocast: bool = True,
) -> torch.Tensor:
    """Return features_ND in float32: the cached ones of the batch, or those of its frames.

    extractor: in eval mode, on `device`. train: crop and augment the frames by the random
    numbers of the batch. autocast: compute in bf16 on a GPU, as for an encoder that is
    frozen in training. Pass False for an encoder that was trained, because the search on
    the dev split used full precision in its training.
    """
    # With cached features the batch has no frames, and no encoder is needed.
    if isinstance(batch, FeatureBatch):
        return batch.features_ND.to(device, non_blocking=True).float()
    assert isinstance(batch, VideoBatch)
    assert not extractor.training, (
        "an encoder in train mode would change its BatchNorm statistics"
    )
    pixels_NCHW = preprocess(batch, train, device)
    # Only a GPU computes in bf16.
    with torch.autocast(
        device.type, torch.bfloat16, enabled=autocast and device.type == "cuda"
    ):
        features_ND: torch.Tensor = extractor(pixels_NCHW, batch.num_frames_B)
    return features_ND.float()
