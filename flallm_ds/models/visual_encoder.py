"""VisualEncoder: an image encoder for each frame, then the local temporal module.

N packed frames, B clips, M places (frames and gaps), D width of the features, C H W of a
frame.
Source: FLa-LLM (arXiv 2403.12556), section 3.2.
"""

from typing import Any

import torch
from torch import nn

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.from_torchvision import resnet_18
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.lengths import gap_positions


def resnet_width(settings: dict[str, Any]) -> int | None:
    """Return the width of the first stage of a ResNet; None for another backbone.

    settings: of a visual encoder. Old ones of a ResNet-18 hold the width alone.
    """
    if "backbone" not in settings:
        return int(settings["width"])
    # The stem and the blocks of the first stage have this width.
    config = settings["backbone"]["config"]
    return int(config["embedding_size"]) if config.get("model_type") == "resnet" else None


class LocalTemporalModule(nn.Module):
    """Conv1d, BatchNorm and ReLU over the frames of a clip; the length stays the same.

    Clips stay packed, with `kernel // 2` zeros between them. The zeros are the padding at
    the ends of a clip, so no clip reads from the next one, and BatchNorm sees no padding.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.gap = kernel // 2
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, frames_ND: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Map frames_ND to features_ND."""
        # Move the N frames to M places, with zeros after each clip.
        places_N = gap_positions(num_frames_B, self.gap).to(frames_ND.device)
        length = len(frames_ND) + self.gap * len(num_frames_B)
        empty_MD = frames_ND.new_zeros(length, frames_ND.shape[1])
        spread_MD = empty_MD.index_copy(0, places_N, frames_ND)

        # Conv1d reads (1, D, M). Then take the places of the frames again.
        convolved_MD = self.conv(spread_MD.T.unsqueeze(0)).squeeze(0).T
        signs_ND = convolved_MD.index_select(0, places_N)

        # Drop the row that `two_at_least` adds to a batch of one frame.
        normalised = self.norm(two_at_least(signs_ND) if self.training else signs_ND)
        return torch.relu(normalised[: len(signs_ND)])


def two_at_least(batch: torch.Tensor) -> torch.Tensor:
    """Return a batch of one frame with the frame repeated; other batches unchanged.

    In training BatchNorm raises an error for a single value of a channel.
    """
    return batch.expand(2, *batch.shape[1:]) if len(batch) == 1 else batch


class VisualEncoder(nn.Module):
    """Map pixels_NCHW of packed clips to sign-wise features_ND.

    width: channels of the first stage of a ResNet-18 with random weights, used if no
    backbone is given. chunk_frames: number of frames that are encoded at a time, to save
    memory, if neither gradients nor batch statistics are needed; 0: all frames at once.
    """

    def __init__(
        self,
        width: int = 64,
        temporal_kernel: int = 3,
        backbone: Backbone | None = None,
        chunk_frames: int = 0,
    ) -> None:
        super().__init__()
        self.chunk_frames = chunk_frames
        self.backbone = backbone or resnet_18(width)
        self.temporal = LocalTemporalModule(self.backbone.feature_width, temporal_kernel)

    @property
    def feature_width(self) -> int:
        """Return D."""
        return self.temporal.conv.out_channels

    def frame_features(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Return frame-wise features_ND: those of the backbone alone."""
        is_trained = any(p.requires_grad for p in self.backbone.parameters())
        learns = torch.is_grad_enabled() and is_trained
        # BatchNorm in train mode must see all frames of a batch at once.
        if learns or self.backbone.training:
            features_ND: torch.Tensor = self.backbone(two_at_least(pixels_NCHW))
            return features_ND[: len(pixels_NCHW)]
        with torch.no_grad():
            chunks = torch.split(pixels_NCHW, self.chunk_frames or max(1, len(pixels_NCHW)))
            return torch.cat([self.backbone(chunk) for chunk in chunks])

    def forward(
        self, pixels_NCHW: torch.Tensor, num_frames_B: torch.Tensor
    ) -> torch.Tensor:
        """Map pixels_NCHW to sign-wise features_ND."""
        frames_ND = self.frame_features(pixels_NCHW)
        features_ND: torch.Tensor = self.temporal(frames_ND, num_frames_B)
        return features_ND

    def settings(self) -> dict[str, Any]:
        """Return the argument of `from_settings`: plain values for a JSON file."""
        kernel = self.temporal.conv.kernel_size[0]
        return {"backbone": self.backbone.settings(), "temporal_kernel": kernel}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "VisualEncoder":
        """Build the same architecture with random weights, without files or a hub.

        Settings with the keys "width" and "temporal_kernel" are those of a ResNet-18.
        Raises UserError for unknown keys.
        """
        try:
            if "backbone" not in settings:
                return cls(**settings)
            backbone = Backbone.from_settings(settings["backbone"])
            return cls(temporal_kernel=settings["temporal_kernel"], backbone=backbone)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"Cannot build a visual encoder from the stored settings: {error!r}. Install "
                "the version of flallm_ds that wrote them."
            ) from error
