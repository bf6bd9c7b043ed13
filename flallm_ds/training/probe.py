"""The dominance probe: the last layers, whose gradient norms train.probe_every logs."""

from typing import Any

from torch import nn


def last_layers(module: Any) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of the last layers of a SignTranslator by their name.

    "visual": the local temporal module, or the last stage of the backbone if the temporal
    module is frozen. "language": the last layer of the decoder. A frozen part is left out.

    In joint training, the last layer of the LLM has the larger gradient and the visual
    encoder hardly learns (FLa-LLM, Figure 2).
    """
    found = {}
    if module.visual is not None:
        encoder = module.visual.encoder
        visual = _trained(encoder.temporal) or _trained(_last_layer(encoder.backbone))
        if visual:
            found["visual"] = visual
    decoder = module.language_model
    if hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()
    language = _trained(_last_layer(decoder))
    if language:
        found["language"] = language
    return found


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _last_layer(module: nn.Module) -> nn.Module:
    """Return the last layer of the first ModuleList, or the module if it has none."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            return part[-1]
    return module
