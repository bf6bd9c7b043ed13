"""The visual encoder: a per-frame ResNet-18 and the local temporal module (FLa-LLM, section 3.2)."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from flallm_ds.errors import UserError
from flallm_ds.models.lengths import gap_positions


class LocalTemporalModule(nn.Module):
    """Conv1d + BatchNorm + ReLU over a clip's frames; length is kept.

    Clips stay packed: `kernel // 2` zeros between them stand for the padding at a clip's ends, so nothing
    leaks from one clip to the next and BatchNorm never sees a padding frame.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.gap = kernel // 2
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, frames_ND: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        places_N = gap_positions(num_frames_B, self.gap).to(frames_ND.device)
        length = len(frames_ND) + self.gap * len(num_frames_B)
        spread = frames_ND.new_zeros(length, frames_ND.shape[1]).index_copy(0, places_N, frames_ND)
        signs = self.conv(spread.T.unsqueeze(0)).squeeze(0).T.index_select(0, places_N)
        return torch.relu(self.norm(signs))


class VisualEncoder(nn.Module):
    """pixels_NCHW of packed clips -> sign-wise features_ND, D = 8 * width.

    width: channels of the backbone's first stage; 64 is ResNet-18, whose ImageNet weights then fit.
    freeze_batch_norm: the backbone's BatchNorm keeps its statistics in training.
    frozen_stages: the stem and this many stages keep their weights, if any do; the backward pass ends there.
    """

    def __init__(
        self,
        width: int = 64,
        temporal_kernel: int = 3,
        freeze_batch_norm: bool = False,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        self.freeze_batch_norm = freeze_batch_norm
        stages = [width, 2 * width, 4 * width, 8 * width]
        config = ResNetConfig(
            embedding_size=width, hidden_sizes=stages, depths=[2, 2, 2, 2], layer_type="basic"
        )
        self.backbone = ResNetModel(config)
        if frozen_stages:
            for part in (self.backbone.embedder, *self.backbone.encoder.stages[:frozen_stages]):
                part.requires_grad_(False)
        self.temporal = LocalTemporalModule(8 * width, temporal_kernel)

    def train(self, mode: bool = True) -> "VisualEncoder":
        """As ever, but the backbone's BatchNorm stays in eval mode where it is frozen.

        A micro-batch of few clips shows few signers: its statistics tell who signs, unlike evaluation's.
        """
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @property
    def feature_width(self) -> int:
        return self.temporal.conv.out_channels

    def frame_features(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Frame-wise features_ND: each frame alone, after average pooling."""
        # Channels last is 1.3x faster on one CPU thread, but below 16 channels the backward pass of oneDNN's
        # strided 1x1 convolution writes past its workspace (its issue 6035: "free(): invalid next size").
        if pixels_NCHW.is_cuda or self.feature_width >= 8 * 16:
            pixels_NCHW = pixels_NCHW.contiguous(memory_format=torch.channels_last)
        pooled: torch.Tensor = self.backbone(pixels_NCHW).pooler_output
        return pooled.flatten(1)

    def forward(self, pixels_NCHW: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        features_ND: torch.Tensor = self.temporal(self.frame_features(pixels_NCHW), num_frames_B)
        return features_ND

    def load_backbone(self, weights: str) -> None:
        """ImageNet weights from a hub id or folder (transformers' ResNet) or a torchvision .pth file.

        Raises UserError where the file is missing or its widths differ; OSError where a hub is out of reach.
        """
        path = Path(weights)
        if weights.endswith(".pth") and not path.is_file():
            raise UserError(f"visual.weights must be a file, but there is none at {weights}.")
        if path.is_file():
            state = _from_torchvision(_read_pth(path))
        else:
            state = ResNetModel.from_pretrained(weights).state_dict()
        # Files from before 2018 lack BatchNorm's counter, which nothing reads.
        own = {n: t for n, t in self.backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
        wrong = [n for n in own if n not in state or state[n].shape != own[n].shape]
        if wrong:
            raise UserError(
                f"the weights {weights} must fit visual.width={self.feature_width // 8}, but {wrong[0]} does "
                "not. ImageNet weights are for --visual.width=64; use --visual.weights=none for other widths."
            )
        self.backbone.load_state_dict({n: state[n] for n in own}, strict=False)


def _read_pth(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise UserError(
            f"visual.weights must be a torchvision state dict, but {path} cannot be read as one "
            f"({str(error).splitlines()[0]})."
        ) from error


def _from_torchvision(state: dict[str, Any]) -> dict[str, Any]:
    """torchvision's ResNet parameter names as transformers' ones."""
    kinds = {"conv": "convolution", "bn": "normalization"}

    def rename(name: str) -> str:
        name = re.sub(r"^(conv|bn)1\.", lambda m: f"embedder.embedder.{kinds[m[1]]}.", name)
        block = r"^layer(\d)\.(\d)\."
        name = re.sub(
            block + r"(conv|bn)(\d)\.",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.layer.{int(m[4]) - 1}.{kinds[m[3]]}.",
            name,
        )
        name = re.sub(
            block + r"downsample\.(\d)\.",
            lambda m: (
                f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut."
                f"{'convolution' if m[3] == '0' else 'normalization'}."
            ),
            name,
        )
        return name

    return {rename(name): value for name, value in state.items()}
