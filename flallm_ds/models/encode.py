"""From a batch to visual features, for training, the translator and the writing of features."""

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
    """Return features_ND, float32: the cached ones of the batch, or those of its frames.

    extractor: in eval mode, on `device`. train: crop and augment the frames by the random
    numbers of the batch. autocast: whether a GPU computes in bf16, as for each encoder
    that is frozen in training. False for an encoder that was trained: the dev search of
    its training used full precision.
    """
    if isinstance(batch, FeatureBatch):
        return batch.features_ND.to(device, non_blocking=True).float()
    assert isinstance(batch, VideoBatch)
    assert not extractor.training, (
        "an encoder in train mode would change its BatchNorm statistics"
    )
    pixels_NCHW = preprocess(batch, train, device)
    with torch.autocast(
        device.type, torch.bfloat16, enabled=autocast and device.type == "cuda"
    ):
        features_ND: torch.Tensor = extractor(pixels_NCHW, batch.num_frames_B)
    return features_ND.float()
