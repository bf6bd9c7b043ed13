"""Backbone: one image encoder, frame by frame.

N frames, C H W of a frame, D width of the features.
"""

import inspect
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError
from flallm_ds.models.backbones.spec import BackboneSpec
from flallm_ds.models.checkpointing import checkpoint_stages, stages_of
from flallm_ds.models.llm.tuning import Tuning, tune


class Backbone(nn.Module):
    """Turn pixels_NCHW, normalised by ImageNet's mean and std, into features_ND.

    In eval mode the features of a frame do not depend on the other frames.
    """

    model: Any
    scale: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.frozen = self.freeze_batch_norm = False
        can_interpolate = (
            "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        )
        self._options = {"interpolate_pos_encoding": True} if can_interpolate else {}
        scale, shift = _from_imagenet(spec.mean, spec.std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # Channels last is 1.3x faster on one CPU thread. But below 16 channels the
        # backward pass of a strided 1x1 convolution in oneDNN writes past its workspace
        # (oneDNN issue 6035: "free(): invalid next size").
        self._channels_last_on_cpu = _fewest_channels(model) >= 16

    @property
    def feature_width(self) -> int:
        return self.spec.feature_width

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return self.spec.features(self.outputs(pixels_NCHW))

    def outputs(self, pixels_NCHW: torch.Tensor) -> Any:
        """Return what the model itself returns."""
        if pixels_NCHW.is_cuda or self._channels_last_on_cpu:
            pixels_NCHW = pixels_NCHW.contiguous(memory_format=torch.channels_last)
        if self.scale is not None and self.shift is not None:
            pixels_NCHW = pixels_NCHW * self.scale + self.shift
        return self.model(pixels_NCHW, **self._options)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode as any module does, but keep frozen parts in eval mode.

        A micro-batch of few clips shows few signers: its BatchNorm statistics tell who
        signs, unlike those of the evaluation.
        """
        super().train(mode and not self.frozen)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze(self, stages: int | None = None) -> None:
        """Freeze all weights and statistics, or only the weights of the stem and the
        first stages.

        stages: how many of them. Raises UserError if the model has fewer.
        """
        if stages is None:
            self.frozen = True
            self.requires_grad_(False)
            self.train(self.training)
        elif stages > 0:
            for parameter in self._first_parameters(stages):
                parameter.requires_grad_(False)

    def _first_parameters(self, num_stages: int) -> list[nn.Parameter]:
        """Return the parameters of the stem and the first stages.

        In the order of the model these are all up to the last parameter of the last such
        stage.
        """
        stages = _stages(self.model, "frozen_stages must be 0")
        if num_stages > len(stages):
            raise UserError(
                f"visual.frozen_stages must be 0 to {len(stages)}, the stages of this "
                f"backbone, but is {num_stages}."
            )
        of_last_stage = set(map(id, stages[num_stages - 1].parameters()))
        parameters = list(self.model.parameters())
        end = 0
        for place, parameter in enumerate(parameters):
            if id(parameter) in of_last_stage:
                end = place + 1
        return parameters[:end]

    def tune(self, tuning: Tuning, seed: int = 0) -> None:
        """Make all weights trainable, or LoRA adapters of the linear layers, or nothing.

        Raises UserError if the tuning needs linear layers and the model has none.
        """
        has_linear = any(isinstance(module, nn.Linear) for module in self.model.modules())
        if tuning.low_rank and not has_linear:
            raise UserError(
                f"visual.tune must be full or frozen for a {type(self.model).__name__}, "
                f"which has no linear layers, but is {tuning.how}."
            )
        tune(self.model, tuning, seed)
        if tuning.how == "frozen":
            self.freeze()

    def checkpoint_activations(self) -> None:
        """Keep only the input of each stage for the backward pass.

        Raises UserError if the model has no stages.
        """
        _stages(self.model, "checkpointing must be false")
        checkpoint_stages(self.model)

    def settings(self) -> dict[str, Any]:
        """Return what `from_settings` needs; plain values for a JSON file."""
        return asdict(self.spec)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Backbone":
        """Build the same architecture with random weights; read no file and no hub.

        Raises UserError if the installed libraries do not know the settings.
        """
        values: dict[str, Any] = {}
        try:
            for name, value in settings.items():
                values[name] = tuple(value) if isinstance(value, list) else value
            spec = BackboneSpec(**values)
            return cls(spec.build(), spec)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            must = "the settings of a backbone must be those of this version's libraries"
            raise UserError(f"{must}, but {error!r}.") from error


def _fewest_channels(model: nn.Module) -> int:
    """Return the fewest output channels of a 2-D convolution; 0 for a model without one."""
    channels = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            channels.append(module.out_channels)
    return min(channels, default=0)


def _from_imagenet(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (scale, shift) from pixels normalised as ImageNet's to pixels of this mean and std.

    Both have the shape (1, 3, 1, 1). Both are None if mean and std are those of ImageNet.
    """
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return None, None
    # pixels = x * std_imagenet + mean_imagenet; then (pixels - mean) / std.
    scale = _by_channel(IMAGENET_STD) / _by_channel(std)
    shift = (_by_channel(IMAGENET_MEAN) - _by_channel(mean)) / _by_channel(std)
    return scale.float(), shift.float()


def _by_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


def _stages(model: nn.Module, must: str) -> list[nn.Module]:
    """Return the model's stages. must: of the option that needs them, in the UserError."""
    try:
        return stages_of(model)
    except ValueError as error:
        raise UserError(f"visual.{must} for this backbone, because {error}.") from error
