"""The dominance probe: the last layers whose gradients train.probe_every logs."""

from typing import Any

from torch import nn


def last_layers(module: Any) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of the last layers of a SignTranslator: "visual" and "language".

    Trained jointly, an LLM's last layer keeps the larger gradient and the visual encoder
    hardly learns (FLa-LLM, Figure 2).

    visual: the local temporal module, or the backbone's last stage where that is not
    trained; left out where the visual encoder is frozen. language: the decoder's last
    layer; left out where it is frozen.
    """
    found: dict[str, list[nn.Parameter]] = {"visual": [], "language": []}
    if module.visual is not None:
        encoder = module.visual.visual
        found["visual"] = _trained(encoder.temporal) or _trained(
            _last_layer(encoder.backbone)
        )
    decoder = module.language_model
    if hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()
    found["language"] = _trained(_last_layer(decoder))
    return {name: parameters for name, parameters in found.items() if parameters}


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _last_layer(module: nn.Module) -> nn.Module:
    """The last of its first list of layers, or all of it where there is no list."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            return part[-1]
    return module
