"""The dominance probe: how large the gradients of the last visual and the last language layer are.

Trained jointly, an LLM's last layer keeps the larger gradient and the visual encoder hardly learns (FLa-LLM,
Figure 2).
"""

from typing import Any

from torch import nn


def last_layers(module: Any) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of the last layers of a SignTranslator: "visual" and "language".

    visual: the local temporal module, or the backbone's last stage where that is not trained; left out where
    the visual encoder is frozen. language: the decoder's last layer; left out where it is frozen.
    """
    found: dict[str, list[nn.Parameter]] = {"visual": [], "language": []}
    if module.visual is not None:
        encoder = module.visual.visual
        found["visual"] = _trained(encoder.temporal) or _trained(_last_layer(encoder.backbone))
    language_model = module.language_model
    decoder = language_model.get_decoder() if hasattr(language_model, "get_decoder") else language_model
    found["language"] = _trained(_last_layer(decoder))
    return {name: parameters for name, parameters in found.items() if parameters}


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _last_layer(module: nn.Module) -> nn.Module:
    """The last of its first list of layers, or all of it where there is no list."""
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m))
    return next((layers[-1] for layers in lists), module)
