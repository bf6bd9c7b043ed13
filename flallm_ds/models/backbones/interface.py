"""Backbone: an image encoder that reads each frame alone.

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
    """Encode pixels_NCHW, normalised by ImageNet's mean and std, as features_ND.

    In eval mode the features of a frame do not depend on the other frames.
    """

    model: Any
    scale: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        # `train` keeps the backbone, or its BatchNorm modules, in eval mode.
        self.frozen = self.freeze_batch_norm = False
        # Frames may have another size than those that the weights were trained on.
        parameters = inspect.signature(model.forward).parameters
        self._options: dict[str, bool] = {}
        if "interpolate_pos_encoding" in parameters:
            self._options["interpolate_pos_encoding"] = True
        # Not persistent: `settings` holds the mean and std, checkpoints need no copy.
        scale, shift = _from_imagenet(spec.mean, spec.std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # Channels last is 1.3x faster on one CPU thread. But below 16 channels the
        # backward pass of a strided 1x1 convolution in oneDNN writes past its workspace
        # (oneDNN issue 6035: "free(): invalid next size").
        self._channels_last_on_cpu = _fewest_channels(model) >= 16

    @property
    def feature_width(self) -> int:
        """Return D."""
        return self.spec.feature_width

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Return features_ND."""
        return features_of(self.outputs(pixels_NCHW), self.spec)

    def outputs(self, pixels_NCHW: torch.Tensor) -> Any:
        """Return the output of the model itself."""
        # Convolutions on a GPU are faster with channels last as well.
        if pixels_NCHW.is_cuda or self._channels_last_on_cpu:
            pixels_NCHW = pixels_NCHW.contiguous(memory_format=torch.channels_last)
        if self.scale is not None and self.shift is not None:
            pixels_NCHW = pixels_NCHW * self.scale + self.shift
        return self.model(pixels_NCHW, **self._options)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode as any module does, but keep frozen parts in eval mode.

        A micro-batch of few clips shows few signers, so its BatchNorm statistics depend on
        who signs. The statistics of an evaluation do not.
        """
        super().train(mode and not self.frozen)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze(self, stages: int | None = None) -> None:
        """Freeze all weights and statistics, or the weights of the first stages only.

        stages: number of stages to freeze, and the stem with them; None: everything. Raises
        UserError if the model has fewer stages.
        """
        if stages is None:
            self.frozen = True
            self.requires_grad_(False)
            self.train(self.training)
        # Partly frozen: only the weights are fixed, the statistics still change.
        elif stages > 0:
            for parameter in self._first_parameters(stages):
                parameter.requires_grad_(False)

    def _first_parameters(self, num_stages: int) -> list[nn.Parameter]:
        """Return the parameters of the stem and the first stages.

        These are all parameters up to the last one of the last of these stages, in the
        order of the model.
        """
        stages = _stages(self.model, "visual.frozen_stages must be 0", num_stages)
        if num_stages > len(stages):
            raise UserError(
                f"visual.frozen_stages must be at most {len(stages)}, the number of stages "
                f"of this backbone, got {num_stages}."
            )
        # By identity, because == compares the values of tensors.
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
                f"which has no linear layers, got {tuning.how}."
            )
        tune(self.model, tuning, seed)
        if tuning.how == "frozen":
            self.freeze()

    def checkpoint_activations(self) -> None:
        """Keep only the input of each stage for the backward pass.

        Raises UserError if the model has no stages.
        """
        _stages(self.model, "visual.checkpointing must be false", "true")
        checkpoint_stages(self.model)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `from_settings`: plain values for a JSON file."""
        return asdict(self.spec)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Backbone":
        """Build the same architecture with random weights, without files or a hub.

        Raises UserError if the installed libraries do not know the settings.
        """
        values: dict[str, Any] = {}
        try:
            # JSON has lists where the spec has tuples.
            for name, value in settings.items():
                values[name] = tuple(value) if isinstance(value, list) else value
            spec = BackboneSpec(**values)
            return cls(spec.build(), spec)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"Cannot build a backbone from the stored settings: {error!r}. Install the "
                "versions of transformers and timm that wrote them."
            ) from error


def features_of(outputs: Any, spec: BackboneSpec) -> torch.Tensor:
    """Return features_ND, taken from the output of a model of this architecture."""
    if spec.library == "timm":
        features_ND: torch.Tensor = outputs
        return features_ND
    if spec.output == "pooled":
        pooled: torch.Tensor = outputs.pooler_output
        return pooled.flatten(1)
    last: torch.Tensor = outputs.last_hidden_state
    if last.dim() == 4:  # (N, D, H, W), of convolutions
        return last.mean((2, 3))
    # (N, positions, D), of a transformer; the class token is the first position.
    if spec.output == "class":
        return last[:, 0]
    return last.mean(1)


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
    """Return (scale, shift) that normalise ImageNet-normalised pixels by this mean and std.

    Both have the shape (1, 3, 1, 1). Both are None if mean and std are those of ImageNet.
    """
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return None, None
    # pixels = x * std_imagenet + mean_imagenet; then (pixels - mean) / std.
    scale = _by_channel(IMAGENET_STD) / _by_channel(std)
    shift = (_by_channel(IMAGENET_MEAN) - _by_channel(mean)) / _by_channel(std)
    return scale.float(), shift.float()


def _by_channel(values: tuple[float, ...]) -> torch.Tensor:
    """Return one value for each channel, as float64 of the shape (1, 3, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


def _stages(model: nn.Module, required: str, got: object) -> list[nn.Module]:
    """Return the stages of the model.

    required, got: "NAME must be VALUE" and the present value of the option that needs
    stages, for the UserError if there are none.
    """
    try:
        return stages_of(model)
    except ValueError as error:
        raise UserError(
            f"{required} for a {type(model).__name__}, which has no list of stages, got {got}."
        ) from error
