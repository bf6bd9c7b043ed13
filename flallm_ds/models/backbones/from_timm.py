"""Build backbones with timm, an optional dependency: from a name, a file or a folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from flallm_ds.command import nearest
from flallm_ds.errors import UserError
from flallm_ds.models.backbones.checks import (
    UNSUITED,
    check_fit,
    check_patch,
    probe_output,
)
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.backbones.spec import BackboneSpec, import_timm
from flallm_ds.models.pretrained import UNREADABLE, first_line

TIMM = "timm/"  # what `visual.weights` begins with for a model of timm by name


def split_name(weights: str) -> tuple[str, str]:
    """Return (NAME, FILE) of timm/NAME@FILE; FILE is empty if none is given."""
    name, _, file = weights.removeprefix(TIMM).partition("@")
    return name, file


def build_timm(weights: str, pretrained: bool, crop_size: int) -> Backbone:
    """Build the backbone of timm/NAME, or of timm/NAME@FILE with the weights in a file.

    Raises UserError if the file or the name does not exist, with the nearest names.
    """
    timm = import_timm()
    name, file = split_name(weights)
    if file and not Path(file).is_file():
        raise UserError(
            f"visual.weights must be timm/NAME@FILE with an existing file, got {file}. Check "
            "the path."
        )
    # A name such as resnet18.a1_in1k has a tag that names its pretrained weights.
    architecture, _, tag = name.partition(".")
    tagged = timm.list_pretrained(f"{architecture}.*") if tag else []
    if not timm.is_model(architecture) or (tag and name not in tagged):
        raise UserError(
            f"visual.weights must name a model of timm, got {name}: "
            f"{nearest(name, tagged or timm.list_models())}"
        )
    # timm reads the weights from this file instead of the hub.
    overlay = {"file": file} if file else None
    # Without classes the model has no classifier and returns pooled features.
    arguments = {"num_classes": 0}
    return _build(name, architecture, arguments, overlay, weights, pretrained, crop_size)


def build_timm_folder(
    folder: str,
    config: dict[str, Any],
    pretrained: bool,
    crop_size: int,
) -> Backbone:
    """Build the backbone of a folder that timm wrote. config: of its config.json."""
    arguments = {**config.get("model_args", {}), "num_classes": 0}
    name = f"local-dir:{folder}"
    return _build(
        name, config["architecture"], arguments, None, folder, pretrained, crop_size
    )


def _build(
    name: str,
    architecture: str,
    arguments: dict[str, Any],
    overlay: dict[str, str] | None,
    weights: str,
    pretrained: bool,
    crop_size: int,
) -> Backbone:
    """Build the backbone that `timm.create_model(name, **arguments)` returns.

    overlay: values that replace those of timm's record of the pretrained weights.
    """
    timm = import_timm()

    def create(**size: int) -> nn.Module:
        with _lenient_loads() as loads:
            model: nn.Module = timm.create_model(
                name,
                pretrained=pretrained,
                pretrained_cfg_overlay=overlay,
                **arguments,
                **size,
            )
        # timm loads the weights once, or not at all if pretrained is false.
        for missing, unexpected in loads:
            check_fit(weights, model, missing, unexpected)
        return model

    model, size = _create_for_size(create, weights, crop_size)
    patch_embed = getattr(model, "patch_embed", None)
    check_patch(weights, getattr(patch_embed, "patch_size", None), crop_size)
    # timm stores the mean and std of the pixels with the record of the weights.
    norm = timm.data.resolve_model_data_config(model)
    spec = BackboneSpec(
        "timm",
        {"model_name": architecture, **arguments, **size},
        mean=tuple(norm["mean"]),
        std=tuple(norm["std"]),
    )
    spec = probe_output(model, spec, weights, crop_size)
    return Backbone(model, spec)


def _create_for_size(
    create: Callable[..., nn.Module], weights: str, crop_size: int
) -> tuple[nn.Module, dict[str, int]]:
    """Return a model for frames of this size, and the arguments that set the size.

    If the positions have weights, timm interpolates them to img_size while it loads them.
    Raises UserError if the model cannot be built or loaded, OSError if a hub is not
    available.
    """
    try:
        try:
            return create(img_size=crop_size), {"img_size": crop_size}
        except TypeError:  # a model for frames of any size has no such argument
            return create(), {}
    # The caller reports a hub that is not available.
    except OSError:
        raise
    except (*UNSUITED, *UNREADABLE) as error:
        raise UserError(
            f"Cannot load {weights} for frames of data.crop_size={crop_size} px: "
            f"{first_line(error).rstrip('.')}. Fetch the weights again, or give another "
            "--visual.weights."
        ) from error


@contextmanager
def _lenient_loads() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Make `load_state_dict` non-strict; yield a list of its (missing, unexpected) names.

    The list gets one entry for each call within the context. timm does not report these
    names.
    """
    found: list[tuple[list[str], list[str]]] = []
    load = nn.Module.load_state_dict

    # timm calls this method of the model, and discards its result.
    def recorded(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        options["strict"] = False
        result = load(module, *arguments, **options)
        found.append((list(result.missing_keys), list(result.unexpected_keys)))
        return result

    nn.Module.load_state_dict = recorded  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
