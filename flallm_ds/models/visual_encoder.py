"""From the pixels of a clip's frames to the visual tokens that a translator reads.

An image encoder per frame, then the local temporal module (FLa-LLM, section 3.2), then
the adapter. This is also the only file that knows how packed clips are laid out.

N packed frames, B clips, S visual tokens of the longest clip, D width of the visual
features, E width of the language model, C H W of a frame.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import MBartConfig
from transformers.models.mbart.modeling_mbart import MBartEncoder

from flallm_ds.errors import UserError
from flallm_ds.models.backbones.from_torchvision import resnet_18
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import without_origin

Kind = Literal["signs", "frames", "light_t"]
Frozen = Literal["all", "backbone", "none"]


# --- packed clips


def pad_parts(
    parts: Sequence[torch.Tensor], side: Literal["left", "right"] = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(padded_BSE with zeros on one side of each part, mask_BS of 1 where there is a token)."""
    pad = torch.nn.utils.rnn.pad_sequence
    padded_BSE = pad(list(parts), batch_first=True, padding_side=side)
    ones = [torch.ones(len(part), dtype=torch.long) for part in parts]
    mask_BS = pad(ones, batch_first=True, padding_side=side)
    return padded_BSE, mask_BS.to(padded_BSE.device)


def pad_packed(
    packed_ND: torch.Tensor, num_frames_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(padded_BSD with zeros after each clip's end, mask_BS of 1 where there is a token)."""
    return pad_parts(torch.split(packed_ND, num_frames_B.tolist()))


def gap_positions(num_frames_B: torch.Tensor, gap: int) -> torch.Tensor:
    """Where each packed frame stands when `gap` empty places follow every clip; int64 (N,)."""
    # The number of the clip that each frame belongs to: so many gaps come before the
    # frame.
    clip_N = torch.repeat_interleave(torch.arange(len(num_frames_B)), num_frames_B.cpu())
    return torch.arange(len(clip_N)) + clip_N * gap


# --- frames to features


def resnet_width(settings: dict[str, Any]) -> int | None:
    """Channels of the first stage, by a visual encoder's settings; None for another backbone."""
    if "backbone" not in settings:
        return int(settings["width"])
    config = settings["backbone"]["config"]
    return int(config["embedding_size"]) if config.get("model_type") == "resnet" else None


class LocalTemporalModule(nn.Module):
    """Conv1d + BatchNorm + ReLU over a clip's frames; length is kept.

    Clips stay packed: `kernel // 2` zeros between them stand for the padding at a clip's
    ends, so nothing leaks from one clip to the next and BatchNorm never sees a padding
    frame.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.gap = kernel // 2
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, frames_ND: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """frames_ND -> features_ND."""
        # Spread the clips out, with zeros after each: M places, of which N hold a frame.
        places_N = gap_positions(num_frames_B, self.gap).to(frames_ND.device)
        length = len(frames_ND) + self.gap * len(num_frames_B)
        empty_MD = frames_ND.new_zeros(length, frames_ND.shape[1])
        spread_MD = empty_MD.index_copy(0, places_N, frames_ND)

        # Conv1d reads (1, D, M). Then take the places of the frames out again.
        convolved_MD = self.conv(spread_MD.T.unsqueeze(0)).squeeze(0).T
        signs_ND = convolved_MD.index_select(0, places_N)

        # Cut off what `two_at_least` adds to a batch of one frame.
        normalised = self.norm(two_at_least(signs_ND) if self.training else signs_ND)
        return torch.relu(normalised[: len(signs_ND)])


def two_at_least(batch: torch.Tensor) -> torch.Tensor:
    """Return a batch of one frame twice, others as they are.

    BatchNorm refuses to train on a single value for a channel.
    """
    return batch.expand(2, *batch.shape[1:]) if len(batch) == 1 else batch


class VisualEncoder(nn.Module):
    """pixels_NCHW of packed clips -> sign-wise features_ND.

    width: channels of the first stage of a ResNet-18 with random weights, where no
    backbone is given. chunk_frames: what needs no gradient and no batch statistics is
    seen this many frames at a time, in less memory; 0: all at once.
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
        """D."""
        return self.temporal.conv.out_channels

    def frame_features(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Frame-wise features_ND: each frame alone."""
        is_trained = any(p.requires_grad for p in self.backbone.parameters())
        learns = torch.is_grad_enabled() and is_trained
        if learns or self.backbone.training:
            features_ND: torch.Tensor = self.backbone(two_at_least(pixels_NCHW))
            return features_ND[: len(pixels_NCHW)]
        with torch.no_grad():
            chunks = torch.split(pixels_NCHW, self.chunk_frames or max(1, len(pixels_NCHW)))
            return torch.cat([self.backbone(chunk) for chunk in chunks])

    def forward(
        self, pixels_NCHW: torch.Tensor, num_frames_B: torch.Tensor
    ) -> torch.Tensor:
        """pixels_NCHW -> features_ND."""
        frames_ND = self.frame_features(pixels_NCHW)
        features_ND: torch.Tensor = self.temporal(frames_ND, num_frames_B)
        return features_ND

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs; plain values for a JSON file."""
        kernel = self.temporal.conv.kernel_size[0]
        return {"backbone": self.backbone.settings(), "temporal_kernel": kernel}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "VisualEncoder":
        """The same architecture with random weights; no file and no hub is read.

        {"width", "temporal_kernel"} alone is a ResNet-18. Raises UserError for other
        keys.
        """
        try:
            if "backbone" not in settings:
                return cls(**settings)
            backbone = Backbone.from_settings(settings["backbone"])
            return cls(temporal_kernel=settings["temporal_kernel"], backbone=backbone)
        except (TypeError, KeyError) as error:
            raise UserError(
                "the settings of a visual encoder must be those of this version, but "
                f"{error!r}."
            ) from error


# --- features to tokens of a language model


class Adapter(nn.Sequential):
    """The MLP between visual encoder and translator: VL-Adapter (stage 1), LLM-Adapter (stage 2).

    Linear-ReLU-Linear, one hidden layer as wide as the output (FLa-LLM; the paper does
    not give the hidden width). scale: what the output is multiplied by, sqrt(E) where the
    language model scales its word embeddings.
    """

    def __init__(self, in_width: int, out_width: int, scale: float = 1.0) -> None:
        super().__init__(
            nn.Linear(in_width, out_width), nn.ReLU(), nn.Linear(out_width, out_width)
        )
        self.scale = scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., E)."""
        adapted: torch.Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return adapted * self.scale


class FeatureExtractor(nn.Module):
    """pixels_NCHW of packed clips -> features_ND that a language model's adapter reads.

    kind (FLa-LLM, Table 8): "signs", the visual encoder's output; "frames", what its
    local temporal module would read; "light_t", the states of stage 1's Light-T encoder,
    which reads the visual encoder through `vl_adapter`. light_t_encoder: as `encoder_of`
    returns it.
    """

    def __init__(
        self,
        visual: VisualEncoder,
        kind: Kind = "signs",
        vl_adapter: Adapter | None = None,
        light_t_encoder: Any = None,
    ) -> None:
        super().__init__()
        assert kind in get_args(Kind)
        assert (
            (kind == "light_t") == (vl_adapter is not None) == (light_t_encoder is not None)
        )
        self.kind = kind
        self.visual = visual
        self.vl_adapter = vl_adapter
        self.light_t_encoder: Any = light_t_encoder
        self.frozen_parts: tuple[nn.Module, ...] = ()

    @property
    def feature_width(self) -> int:
        """D of what is extracted."""
        if self.light_t_encoder is not None:
            return int(self.light_t_encoder.config.d_model)
        if self.kind == "frames":
            return self.visual.temporal.conv.in_channels
        return self.visual.feature_width

    def forward(
        self, pixels_NCHW: torch.Tensor, num_frames_B: torch.Tensor
    ) -> torch.Tensor:
        """pixels_NCHW -> features_ND."""
        if self.kind == "frames":
            return self.visual.frame_features(pixels_NCHW)
        features_ND: torch.Tensor = self.visual(pixels_NCHW, num_frames_B)
        if self.vl_adapter is None or self.light_t_encoder is None:
            return features_ND
        # Light-T reads padded clips; its states are packed again.
        embeds_BSE, mask_BS = pad_packed(self.vl_adapter(features_ND), num_frames_B)
        output = self.light_t_encoder(inputs_embeds=embeds_BSE, attention_mask=mask_BS)
        packed_ND: torch.Tensor = output.last_hidden_state[mask_BS.bool()]
        return packed_ND

    def freeze(self, how: Frozen) -> "FeatureExtractor":
        """Keep parts as they are: their weights, and, in eval mode for good, BatchNorm
        statistics.

        The Light-T encoder is never trained in stage 2, nor is what "frames" does not
        use.
        """
        parts: list[nn.Module | None] = [self.vl_adapter, self.light_t_encoder]
        if how == "backbone":
            parts.append(self.visual.backbone)
        if self.kind == "frames":
            parts.append(self.visual.temporal)
        if how == "all":
            parts = [self]
        self.frozen_parts = tuple(part for part in parts if part is not None)
        for part in self.frozen_parts:
            part.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Set the mode of all but the frozen parts, which stay in eval mode."""
        super().train(mode and self not in self.frozen_parts)
        for part in self.frozen_parts:
            if part is not self:
                part.eval()
        return self

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs besides the visual encoder; plain values for a JSON file."""
        if self.light_t_encoder is None:
            return {"kind": self.kind}
        config = self.light_t_encoder.config.to_diff_dict()
        return {"kind": self.kind, "light_t": without_origin(config)}

    @classmethod
    def from_settings(
        cls, visual: VisualEncoder, settings: dict[str, Any]
    ) -> "FeatureExtractor":
        """Build one with these settings; all but the given visual encoder has random weights."""
        if settings["kind"] != "light_t":
            return cls(visual, settings["kind"])
        try:
            encoder = encoder_of(MBartEncoder(MBartConfig(**settings["light_t"])))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the settings of a Light-T encoder must be mBART's, but {error}."
            ) from error
        vl_adapter = Adapter(visual.feature_width, encoder.config.d_model)
        return cls(visual, "light_t", vl_adapter, encoder)

    def fingerprint(self) -> str:
        """sha256 of settings and weights: equal for extractors that make the same features."""
        settings = {"features": self.settings(), "visual": self.visual.settings()}
        digest = hashlib.sha256(
            json.dumps(without_origin(settings), sort_keys=True).encode()
        )
        for name, tensor in sorted(self.state_dict().items()):
            if name.endswith("num_batches_tracked"):
                continue  # no feature depends on it
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {plain.dtype} {list(tensor.shape)}".encode())
            digest.update(plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def encoder_of(light_t_encoder: Any) -> Any:
    """Take the word embedding out of Light-T's encoder, in place: visual tokens do not use it."""
    light_t_encoder.embed_tokens = nn.Identity()
    return light_t_encoder
