"""Backbones: any image encoder of transformers or timm, one frame at a time, behind one interface.

N frames, C H W of a frame, D width of its features.

No code per family. What a model gives for a frame is decided once, when it is built, and kept in `Recipe`:
its pooled output where it has one with weights of its own; else its class token where it has one; else the
mean over the places of its last layer. timm's models pool themselves.
"""

import inspect
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import _CACHED_NO_EXIST, file_exists, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, ResNetConfig
from transformers.image_processing_base import ImageProcessingMixin

from flallm_ds.command import nearest
from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError
from flallm_ds.models.checkpointing import checkpoint_stages, stages_of
from flallm_ds.models.llm.tuning import Tuning, tune
from flallm_ds.models.pretrained import (
    CHECKPOINT_FILES,
    HUB_ERRORS,
    check_backbone_source,
    check_weights,
    read_cache_alone_if_unreachable,
)

TIMM = "timm/"
# What a model says, in one way or another, when frames do not suit it.
_UNSUITED = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError)

# Of a classifier, which a backbone does without; names of timm.
_HEAD = re.compile(r"^(head|fc|classifier|pre_logits|fc_norm)[._]")
# What a checkpoint may hold or lack whatever the model: files from before 2018 lack BatchNorm's counter,
# which nothing reads; nobody masks patches here; the others are computed.
_NEEDLESS = re.compile(
    r"(num_batches_tracked|mask_token|position_ids|relative_position_index|attn_mask|inv_freq)$"
)
_UNREADABLE = (RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build a backbone again without a file: plain values for JSON.

    config: transformers' whole config, or timm's name and arguments. mean, std: of the pixels that its
    weights were trained on. output: which of transformers' outputs its features are.
    """

    library: Literal["transformers", "timm"]
    config: dict[str, Any]
    feature_width: int = 0
    output: Literal["pooled", "class", "mean"] = "pooled"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def build(self) -> Any:
        """The model with random weights, in fp32."""
        if self.library == "timm":
            return _timm().create_model(pretrained=False, **self.config)
        values = {name: value for name, value in self.config.items() if name != "model_type"}
        config = CONFIG_MAPPING[self.config["model_type"]].from_dict(values)
        model: Any = AutoModel.from_config(config, dtype=torch.float32)
        if self.output != "pooled" and isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None  # its weights would be random and have no gradient
        return model

    def features(self, outputs: Any) -> torch.Tensor:
        """features_ND of what such a model returned."""
        if self.library == "timm":
            features_ND: torch.Tensor = outputs
            return features_ND
        if self.output == "pooled":
            pooled: torch.Tensor = outputs.pooler_output
            return pooled.flatten(1)
        last: torch.Tensor = outputs.last_hidden_state  # (N, places, D) or, of convolutions, (N, D, H, W)
        if last.dim() == 4:
            return last.mean((2, 3))
        return last[:, 0] if self.output == "class" else last.mean(1)


class Backbone(nn.Module):
    """pixels_NCHW, normalised by ImageNet's mean and std -> frame-wise features_ND.

    A frame's features do not depend on the other frames in eval mode.
    """

    model: Any
    scale: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.frozen = self.freeze_batch_norm = False
        can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if can_interpolate else {}
        scale, shift = _renormalised(recipe.mean, recipe.std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # Channels last is 1.3x faster on one CPU thread, but below 16 channels the backward pass of oneDNN's
        # strided 1x1 convolution writes past its workspace (its issue 6035: "free(): invalid next size").
        convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        self._channels_last_on_cpu = min(convolutions, default=0) >= 16

    @property
    def feature_width(self) -> int:
        return self.recipe.feature_width

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return self.recipe.features(self.outputs(pixels_NCHW))

    def outputs(self, pixels_NCHW: torch.Tensor) -> Any:
        """What the model itself returns."""
        if pixels_NCHW.is_cuda or self._channels_last_on_cpu:
            pixels_NCHW = pixels_NCHW.contiguous(memory_format=torch.channels_last)
        if self.scale is not None and self.shift is not None:
            pixels_NCHW = pixels_NCHW * self.scale + self.shift
        return self.model(pixels_NCHW, **self._options)

    def train(self, mode: bool = True) -> "Backbone":
        """As ever, but frozen parts stay in eval mode.

        A micro-batch of few clips shows few signers: its BatchNorm statistics tell who signs, unlike
        evaluation's.
        """
        super().train(mode and not self.frozen)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze(self, stages: int | None = None) -> None:
        """Keep all weights and statistics, or only the weights of the stem and this many stages.

        Raises UserError where there are not that many.
        """
        if stages is None:
            self.frozen = True
            self.requires_grad_(False)
            self.train(self.training)
        elif stages > 0:
            for parameter in self._first_parameters(stages):
                parameter.requires_grad_(False)

    def _first_parameters(self, num_stages: int) -> list[nn.Parameter]:
        """Those of the stem and the first stages: in a model's order, all that precede the next stage."""
        stages = _stages(self.model, "frozen_stages must be 0")
        if num_stages > len(stages):
            raise UserError(
                f"visual.frozen_stages must be 0 to {len(stages)}, the stages of this backbone, but is "
                f"{num_stages}."
            )
        last = {id(p) for p in stages[num_stages - 1].parameters()}
        parameters = list(self.model.parameters())
        return parameters[: 1 + max(place for place, p in enumerate(parameters) if id(p) in last)]

    def tune(self, tuning: Tuning, seed: int = 0) -> None:
        """Train all of it, low-rank additions to its linear layers, or nothing. Raises UserError."""
        if tuning.low_rank and not any(isinstance(m, nn.Linear) for m in self.model.modules()):
            raise UserError(
                f"visual.tune must be full or frozen for a {type(self.model).__name__}, which has no linear "
                f"layers, but is {tuning.how}."
            )
        tune(self.model, tuning, seed)
        if tuning.how == "frozen":
            self.freeze()

    def checkpoint_activations(self) -> None:
        """Keep only the input of each stage for the backward pass. Raises UserError where there are none."""
        _stages(self.model, "checkpointing must be false")
        checkpoint_stages(self.model)

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs; plain values for a JSON file."""
        return asdict(self.recipe)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Backbone":
        """The same architecture with random weights; no file and no hub is read."""
        try:
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
            recipe = Recipe(**values)
            return cls(recipe.build(), recipe)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"the settings of a backbone must be those of this version's libraries, but {error!r}."
            ) from error


def resnet_18(width: int) -> Backbone:
    """ResNet-18 with random weights. width: channels of its first stage; 64 is the paper's."""
    return _random(_resnet_recipe(width, [2, 2, 2, 2], "basic"))


def build_backbone(
    weights: str = "none", width: int = 64, pretrained: bool = True, crop_size: int = 224
) -> Backbone:
    """The backbone that an option names, with its weights.

    weights: "none": a random ResNet-18; a .pth file: torchvision's ResNet-18 to 152; timm/NAME, or
    timm/NAME@FILE with its weights in a file; else a hub id or folder of transformers or timm. width: that
    a ResNet's first stage must have. pretrained: without, only the architecture is taken. crop_size: side
    of the frames, px.
    Raises UserError where they do not fit together; OSError where a hub is out of reach.
    """
    path = Path(weights)
    if weights == "none":
        return resnet_18(width)
    _check_source(weights, pretrained)
    if weights.startswith(TIMM):
        name, _, file = weights.removeprefix(TIMM).partition("@")
        return _build_timm(name, {"file": file} if file else {}, weights, pretrained, crop_size)
    if path.is_file() or weights.endswith(".pth"):
        return _build_torchvision(path, width, pretrained)
    config = _read_config(weights)
    if "architecture" in config:
        return _build_timm(f"local-dir:{weights}", {}, weights, pretrained, crop_size)
    return _build_transformers(weights, width, pretrained, crop_size)


def _check_source(weights: str, pretrained: bool) -> None:
    file = weights.removeprefix(TIMM).partition("@")[2] if weights.startswith(TIMM) else ""
    check_backbone_source(file or weights, pretrained)


def hub_id(weights: str) -> str:
    """The hub's model that `weights` names; where it names something else, that as it was given."""
    if not weights.startswith(TIMM) or "@" in weights:
        return weights
    try:
        known = _timm().models.get_pretrained_cfg(weights.removeprefix(TIMM))
    except RuntimeError:  # no model of timm, which is said where it is built
        known = None
    return getattr(known, "hf_hub_id", None) or weights


def check_reachable(weights: str) -> None:
    """Raise UserError where a hub's backbone is neither cached nor on a hub that answers.

    One request that is not repeated: the libraries would repeat each of theirs for half a minute.
    """
    _check_source(weights, pretrained=True)
    name = hub_id(weights)
    if weights == "none" or "@" in weights or weights.endswith(".pth") or Path(weights).exists():
        return
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in CHECKPOINT_FILES):
            read_cache_alone_if_unreachable(name)
            return
        if file_exists(name, "config.json"):
            return
        reason = "the hub has no such model with a config.json, or not for you"
    except HUB_ERRORS as error:
        reason = f"the hub cannot be reached ({_first_line(error)})"
    raise UserError(
        f"visual.weights must be within reach, but {weights} is no file or folder here and is not in the "
        f"hub's cache, and {reason}. Give a folder or file of this machine, or --visual.weights=none to "
        "train from random weights, which costs accuracy."
    )


# --- transformers


def _build_transformers(weights: str, width: int, pretrained: bool, crop_size: int) -> Backbone:
    config = _image_config(weights)
    _check_patch(weights, getattr(config, "patch_size", None), crop_size)
    if config.model_type == "resnet" and config.embedding_size != width:
        raise UserError(
            f"visual.width must be {config.embedding_size}, as of {weights}, but is {width}. ImageNet "
            "weights are for --visual.width=64; use --visual.weights=none for other widths."
        )
    mean, std = _processor_norm(weights, config.model_type)
    recipe = Recipe("transformers", plain_config(config), mean=mean, std=std)
    model = recipe.build()  # drawn even where weights follow: what is drawn later must not depend on that
    if pretrained:
        recipe = _load_transformers(model, weights, config, recipe)
    return Backbone(model, _looked_at(model, recipe, weights, crop_size))


def _read_config(weights: str) -> dict[str, Any]:
    """config.json of a folder that is there; nothing for a hub id."""
    folder = Path(weights)
    if not folder.is_dir():
        return {}
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"visual.weights must be a folder with a config.json, but {weights} is not ({error})."
        ) from error


def _image_config(weights: str) -> Any:
    """Its config, or that of the part of it that sees. Raises UserError for a model without one."""
    try:
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"visual.weights must name a model that transformers knows, but {weights} is not: "
            f"{_first_line(error)}"
        ) from error
    config = getattr(config, "vision_config", config)
    kind = MODEL_MAPPING.get(type(config), None)
    if getattr(kind, "main_input_name", None) != "pixel_values":
        raise UserError(
            f"visual.weights must name an encoder of images, but {weights} is a {config.model_type} model, "
            "which reads something else."
        )
    return config


def _processor_norm(weights: str, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the model's image processor; ImageNet's where it comes without one."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(weights)
    except OSError as error:
        if model_type == "resnet" or not _may_have_processor(weights):  # a ResNet's is ImageNet's
            return IMAGENET_MEAN, IMAGENET_STD
        raise UserError(
            "visual.weights must be within reach with its preprocessor_config.json, but that of "
            f"{weights} is not: {_first_line(error)} Fetch it where there is a network, or give a folder."
        ) from error
    if processor.get("do_flip_channel_order"):
        raise UserError(f"visual.weights must name an encoder of RGB images, but {weights} reads BGR.")
    if not processor.get("do_normalize", "image_mean" in processor):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)


def _may_have_processor(weights: str) -> bool:
    """Whether a hub's model may have a processor that is only out of reach."""
    if Path(weights).is_dir():
        return False
    known = try_to_load_from_cache(weights, "preprocessor_config.json")
    try:
        return known is not _CACHED_NO_EXIST and file_exists(weights, "preprocessor_config.json")
    except HUB_ERRORS:
        return True


def plain_config(config: Any) -> dict[str, Any]:
    """All values of a config but those that do not make the model: see `without_origin`."""
    return dict(without_origin(json.loads(config.to_json_string(use_diff=False))))


def without_origin(values: Any) -> Any:
    """A config's values without the version that wrote it and the place that it came from."""
    if not isinstance(values, dict):
        return values
    origin = ("transformers_version", "_name_or_path")
    return {name: without_origin(value) for name, value in values.items() if name not in origin}


def _load_transformers(model: Any, weights: str, config: Any, recipe: Recipe) -> Recipe:
    """Load the weights into the model; without its pooler where they have none, as of a classifier's."""
    check_weights(weights, "visual")
    try:
        source, info = type(model).from_pretrained(
            weights,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and refused below, by name
        )
    except _UNREADABLE as error:
        raise _unreadable(weights, error) from error
    missing = sorted(name for name in info["missing_keys"] if not _NEEDLESS.search(name))
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    without_pooler = bool(missing) and all(name.startswith("pooler.") for name in missing)
    lost = mismatched if without_pooler else [*missing, *mismatched]
    _must_fit(weights, source, lost, info["unexpected_keys"])
    if without_pooler:
        for part in (source, model):
            part.pooler = None
        recipe = replace(recipe, output=_token_output(model))
    model.load_state_dict(source.state_dict())
    return recipe


def _unreadable(weights: str, error: Exception) -> UserError:
    reason = _first_line(error)
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in str(error):
        reason = (
            "pickled weights (.bin) are damaged, or hold more than tensors, which could run code. Fetch the "
            "safetensors files of the model."
        )
    return UserError(f"the weights {weights} must fit their config.json, but do not: {reason}")


def _must_fit(weights: str, model: nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise UserError for a part that no tensor fills, or a tensor of no part.

    Only where it lies within a part of the model, as of one more layer: a classifier, a text model or a
    decoder of patches next to it are left out.
    """
    lost = sorted(name for name in missing if not _NEEDLESS.search(name))
    if lost:
        raise UserError(
            f"the weights {weights} must hold {lost[0]}, but do not: they are of another model or not whole."
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {name.split(".")[0] for name in model.state_dict()}
    within = (name for name in unexpected if name.removeprefix(prefix).split(".")[0] in parts)
    _must_be_needless(weights, within)


def _must_be_needless(weights: str, unexpected: Iterable[str]) -> None:
    surplus = sorted(n for n in unexpected if not _HEAD.match(n) and not _NEEDLESS.search(n))
    if surplus:
        raise UserError(
            f"the weights {weights} must be of the model that is built for them, but {len(surplus)} of "
            f"their tensors belong to no part of it, {surplus[0]} being one: the config is of another "
            "model. Fetch both again."
        )


def _token_output(model: nn.Module) -> Literal["class", "mean"]:
    named = any(re.search(r"(^|\.)(cls_token|class_embedding)$", n) for n, _ in model.named_parameters())
    return "class" if named else "mean"


# --- timm


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(
            "timm must be installed for a backbone of its, but is not: pip install 'flallm_ds[backbones]'."
        ) from error
    return timm


def _build_timm(
    name: str, overlay: dict[str, str], weights: str, pretrained: bool, crop_size: int
) -> Backbone:
    """name: as `timm.create_model` takes it. overlay: of timm's record of the pretrained weights."""
    timm = _timm()
    if overlay and not Path(overlay["file"]).is_file():
        raise UserError(f"visual.weights must be timm/NAME@FILE, but there is no file {overlay['file']}.")
    arguments: dict[str, Any] = {"num_classes": 0}
    if name.startswith("local-dir:"):
        config = _read_config(weights)
        architecture, arguments = config["architecture"], {**config.get("model_args", {}), **arguments}
    else:
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture) or (tag and name not in timm.list_pretrained(f"{architecture}.*")):
            known = timm.list_pretrained(f"{architecture}.*") if tag else timm.list_models()
            raise UserError(
                f"visual.weights must name a model of timm, but {name} is none: "
                f"{nearest(name, known or timm.list_models())}"
            )

    def create(**more: Any) -> nn.Module:
        options = {"pretrained": pretrained, "pretrained_cfg_overlay": overlay or None}
        with _loads() as loads:
            model: nn.Module = timm.create_model(name, **options, **arguments, **more)
        for missing, unexpected in loads:
            _must_fit(weights, model, missing, unexpected)
        return model

    model, more = _of_size(create, weights, crop_size)
    _check_patch(weights, getattr(getattr(model, "patch_embed", None), "patch_size", None), crop_size)
    norm = timm.data.resolve_model_data_config(model)
    recipe = Recipe(
        "timm",
        {"model_name": architecture, **arguments, **more},
        mean=tuple(norm["mean"]),
        std=tuple(norm["std"]),
    )
    return Backbone(model, _looked_at(model, recipe, weights, crop_size))


@contextmanager
def _loads() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Within, `load_state_dict` takes what fits; the names that each call finds missing and unexpected."""
    found: list[tuple[list[str], list[str]]] = []
    load = nn.Module.load_state_dict

    def noted(module: nn.Module, *arguments: Any, **more: Any) -> Any:
        result = load(module, *arguments, **more | {"strict": False})
        found.append((list(result.missing_keys), list(result.unexpected_keys)))
        return result

    nn.Module.load_state_dict = noted  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _of_size(
    create: Callable[..., nn.Module], weights: str, crop_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A model for frames of this size, and the argument that made it so.

    Where positions have weights timm resamples them to img_size once, as it loads them; models that take
    any size refuse that argument.
    """
    try:
        for more in ({"img_size": crop_size}, {}):
            try:
                return create(**more), more
            except TypeError:
                if not more:
                    raise
    except OSError:
        raise
    except (*_UNSUITED, *_UNREADABLE) as error:
        raise UserError(
            f"{weights} must load for frames of data.crop_size={crop_size} px, but does not: "
            f"{_first_line(error)}"
        ) from error
    raise AssertionError("one of the two returned or raised")


# --- torchvision


def _resnet_recipe(width: int, depths: list[int], layer_type: str) -> Recipe:
    first = width if layer_type == "basic" else 4 * width
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[first, 2 * first, 4 * first, 8 * first],
        depths=depths,
        layer_type=layer_type,
    )
    return Recipe("transformers", plain_config(config), feature_width=8 * first)


def _random(recipe: Recipe) -> Backbone:
    return Backbone(recipe.build(), recipe)


def _build_torchvision(path: Path, width: int, pretrained: bool) -> Backbone:
    if not path.is_file():
        raise UserError(f"visual.weights must be a file, but there is none at {path}.")
    state = _read_pth(path)
    blocks = [re.match(r"layer(\d)\.(\d+)\.conv(\d)\.weight", name) for name in state]
    found = [(int(m[1]), int(m[2]), int(m[3])) for m in blocks if m]
    depths = [1 + max((block for layer, block, _ in found if layer == n), default=-1) for n in (1, 2, 3, 4)]
    layer_type = "bottleneck" if any(conv == 3 for _, _, conv in found) else "basic"
    if min(depths) < 1:
        raise UserError(f"visual.weights must be torchvision's ResNet, but {path} holds no layer1 to layer4.")
    backbone = _random(_resnet_recipe(width, depths, layer_type))
    renamed = _from_torchvision(state)
    own = {n: t for n, t in backbone.model.state_dict().items() if not _NEEDLESS.search(n)}
    wrong = [n for n in own if n not in renamed or renamed[n].shape != own[n].shape]
    if wrong:
        raise UserError(
            f"the weights {path} must fit visual.width={width}, but {wrong[0]} does not. ImageNet weights "
            "are for --visual.width=64; use --visual.weights=none for other widths."
        )
    _must_be_needless(str(path), renamed.keys() - own.keys())
    if pretrained:
        backbone.model.load_state_dict({n: renamed[n] for n in own}, strict=False)
    return backbone


def _read_pth(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise UserError(
            f"visual.weights must be a torchvision state dict, but {path} cannot be read as one "
            f"({_first_line(error)})."
        ) from error


def _from_torchvision(state: dict[str, Any]) -> dict[str, Any]:
    """torchvision's ResNet parameter names as transformers' ones."""
    kinds = {"conv": "convolution", "bn": "normalization"}

    def rename(name: str) -> str:
        name = re.sub(r"^(conv|bn)1\.", lambda m: f"embedder.embedder.{kinds[m[1]]}.", name)
        block = r"^layer(\d)\.(\d+)\."
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


# --- what all have in common


def _looked_at(model: nn.Module, recipe: Recipe, weights: str, crop_size: int) -> Recipe:
    """The recipe with the output and the width that one frame has, seen twice.

    Raises UserError where the model does not take such frames, or sees other things at the second look.
    """
    draw = torch.Generator().manual_seed(0)
    pixels_NCHW = torch.rand(1, 3, crop_size, crop_size, generator=draw).repeat(2, 1, 1, 1)
    backbone = Backbone(model, recipe)
    was_training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = backbone.eval().outputs(pixels_NCHW)
        if recipe.library == "transformers" and getattr(outputs, "pooler_output", None) is None:
            recipe = replace(recipe, output=_token_output(model))
        features_ND = recipe.features(outputs)
        if features_ND.dim() != 2 or len(features_ND) != 2:
            raise ValueError(f"its features are of the shape {tuple(features_ND.shape)}")
    except _UNSUITED as error:
        raise UserError(
            f"visual.weights must name an encoder that takes frames of data.crop_size={crop_size} px, but "
            f"{weights} does not: {_first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    if not torch.allclose(features_ND[0], features_ND[1], atol=1e-4, rtol=1e-3):
        raise UserError(
            f"visual.weights must name an encoder that sees a frame the same way each time, but {weights} "
            "does not: it draws at random."
        )
    return replace(recipe, feature_width=features_ND.shape[1])


def _check_patch(weights: str, patch: Any, crop_size: int) -> None:
    """Frames that are not whole patches would lose their edge without a word."""
    sides = {p for p in (patch if isinstance(patch, list | tuple) else [patch]) if isinstance(p, int)}
    for side in sides:
        if crop_size % side:
            below = max(side, crop_size // side * side)
            raise UserError(
                f"data.crop_size must be a multiple of {side}, the patch of {weights}, but is {crop_size}. "
                f"Give --data.crop_size={below}, or {below + side}."
            )


def _renormalised(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(scale, shift) from pixels normalised as ImageNet's to those of this mean and std; None if the same."""
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return None, None
    ours, theirs = (
        torch.tensor(norm, dtype=torch.float64).view(2, 1, 3, 1, 1)
        for norm in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std))
    )
    return (ours[1] / theirs[1]).float(), ((ours[0] - theirs[0]) / theirs[1]).float()


def _stages(model: nn.Module, must: str) -> list[nn.Module]:
    try:
        return stages_of(model)
    except ValueError as error:
        raise UserError(f"visual.{must} for this backbone, because {error}.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
