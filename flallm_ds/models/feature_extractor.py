"""FeatureExtractor: visual features for the adapter of an LLM, from frames.

N packed frames, B clips, S frames of the longest clip, C H W of a frame, D width of the
features, E width of Light-T.
"""

import hashlib
import json
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import MBartConfig
from transformers.models.mbart.modeling_mbart import MBartEncoder

from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.backbones.spec import without_origin
from flallm_ds.models.lengths import pad_packed
from flallm_ds.models.visual_encoder import VisualEncoder

# Features of each sign or of each frame, or states of the encoder of Light-T.
Kind = Literal["signs", "frames", "light_t"]
Frozen = Literal["all", "backbone", "none"]


class FeatureExtractor(nn.Module):
    """Map pixels_NCHW of packed clips to features_ND for the adapter of a language model.

    kind (FLa-LLM, Table 8): "signs", the output of the visual encoder; "frames", the input
    of its local temporal module; "light_t", the states of the Light-T encoder of stage 1,
    which reads the output of the visual encoder through `vl_adapter`. light_t_encoder: as
    `encoder_of` returns it.
    """

    def __init__(
        self,
        encoder: VisualEncoder,
        kind: Kind = "signs",
        vl_adapter: Adapter | None = None,
        light_t_encoder: Any = None,
    ) -> None:
        super().__init__()
        assert kind in get_args(Kind)
        # Light-T needs its adapter and its encoder. The other kinds have neither.
        assert (
            (kind == "light_t") == (vl_adapter is not None) == (light_t_encoder is not None)
        )
        self.kind = kind
        self.encoder = encoder
        self.vl_adapter = vl_adapter
        self.light_t_encoder: Any = light_t_encoder
        self.frozen_parts: tuple[nn.Module, ...] = ()

    @property
    def feature_width(self) -> int:
        """Return D."""
        if self.light_t_encoder is not None:
            return int(self.light_t_encoder.config.d_model)
        if self.kind == "frames":
            return self.encoder.temporal.conv.in_channels
        return self.encoder.feature_width

    def forward(
        self, pixels_NCHW: torch.Tensor, num_frames_B: torch.Tensor
    ) -> torch.Tensor:
        """Map pixels_NCHW to features_ND."""
        if self.kind == "frames":
            return self.encoder.frame_features(pixels_NCHW)
        features_ND: torch.Tensor = self.encoder(pixels_NCHW, num_frames_B)
        if self.vl_adapter is None or self.light_t_encoder is None:
            return features_ND
        # Light-T reads padded clips. Its states are packed again.
        embeds_BSE, mask_BS = pad_packed(self.vl_adapter(features_ND), num_frames_B)
        output = self.light_t_encoder(inputs_embeds=embeds_BSE, attention_mask=mask_BS)
        packed_ND: torch.Tensor = output.last_hidden_state[mask_BS.bool()]
        return packed_ND

    def freeze(self, how: Frozen) -> "FeatureExtractor":
        """Freeze the weights of parts, and their BatchNorm statistics by a permanent eval
        mode.

        how: "all", "backbone" or "none" of the visual encoder. The Light-T encoder is
        always frozen, and so is the temporal module if kind is "frames", which does not use
        it.
        """
        parts: list[nn.Module | None] = [self.vl_adapter, self.light_t_encoder]
        if how == "backbone":
            parts.append(self.encoder.backbone)
        if self.kind == "frames":
            parts.append(self.encoder.temporal)
        if how == "all":
            parts = [self]
        # Extractors without Light-T have None in the list.
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
        """Return the settings for `from_settings`: plain values for a JSON file."""
        if self.light_t_encoder is None:
            return {"kind": self.kind}
        config = self.light_t_encoder.config.to_diff_dict()
        return {"kind": self.kind, "light_t": without_origin(config)}

    @classmethod
    def from_settings(
        cls, visual: VisualEncoder, settings: dict[str, Any]
    ) -> "FeatureExtractor":
        """Build an extractor around a visual encoder; all other parts have random weights.

        Raises UserError if transformers does not know the settings of Light-T.
        """
        if settings["kind"] != "light_t":
            return cls(visual, settings["kind"])
        try:
            encoder = encoder_of(MBartEncoder(MBartConfig(**settings["light_t"])))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"Cannot build a Light-T encoder from the stored settings: {error}. Install "
                "the version of transformers that wrote them."
            ) from error
        # The adapter has no settings: both widths follow from its neighbours.
        vl_adapter = Adapter(visual.feature_width, encoder.config.d_model)
        return cls(visual, "light_t", vl_adapter, encoder)

    def fingerprint(self) -> str:
        """Return the sha256 of settings and weights; equal if the features are the same."""
        settings = {"features": self.settings(), "visual": self.encoder.settings()}
        digest = hashlib.sha256(
            json.dumps(without_origin(settings), sort_keys=True).encode()
        )
        # Hash the name that the encoder had in version 0.1: folders of cached features
        # store the fingerprint.
        tensors = {}
        for name, tensor in self.state_dict().items():
            own = name.removeprefix("encoder.")
            tensors[name if own == name else f"visual.{own}"] = tensor
        # Sorted by name: the order of a state dict depends on how a module was built.
        for name, tensor in sorted(tensors.items()):
            if name.endswith("num_batches_tracked"):
                continue  # the features do not depend on it
            # bf16 has no NumPy type, so the bytes of the tensor are hashed.
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {plain.dtype} {list(tensor.shape)}".encode())
            digest.update(plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def encoder_of(light_t_encoder: Any) -> Any:
    """Remove the word embedding of Light-T's encoder, in place, and return the encoder.

    Visual tokens are embeddings already.
    """
    light_t_encoder.embed_tokens = nn.Identity()
    return light_t_encoder
