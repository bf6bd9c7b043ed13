"""Measure the factor of an LLM's word embeddings: visual tokens must be as large.

B clips, S tokens.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import set_zero3_state

from flallm_ds.errors import UserError

# Rows of the word embedding that the probe has, and how many of them it reads.
_ROWS = 16
_WORDS = 4
# Most numbers that are drawn for a tensor. A larger tensor repeats a single number.
_DRAWN = 10**7


# Model types that fail in a way that cannot be measured, and why.
_REFUSED = {
    "fsmt": "with embeddings as input, its decoder attends to later tokens",
    "prophetnet": "its predictions depend on the number of later tokens",
}


class _FirstLayer(Exception):
    """Ends a forward pass at the first layer. inputs: the arguments of that layer."""

    def __init__(self, inputs: list[Any]) -> None:
        self.inputs = inputs


def probe_of(llm: Any) -> Any:
    """Return a model of the same class and config on the meta device, for `word_scale`."""
    with set_zero3_state(), torch.device("meta"), no_init_weights():
        return type(llm)(copy.deepcopy(llm.config))


@torch.no_grad()
def word_scale(probe: Any) -> float:
    """Return the factor that a model applies to embedded words but not to given embeddings.

    Models scale words inside the embedding module, outside it, or not at all, and some also
    scale given embeddings. Therefore the model reads the same words in both ways, up to its
    first layer. This needs no weights and no other rank.

    probe: a model on the meta device, which cannot be used afterwards. Raises UserError for
    a model that reads embeddings in another way than words.
    """
    probe.eval()
    # The default device of the caller may be another one.
    with torch.device("cpu"):
        return _measured(probe)


def _measured(probe: Any) -> float:
    """Return the scale; see `word_scale`."""
    table = _materialize(probe)
    padding = getattr(probe.config.get_text_config(), "pad_token_id", None)
    # Some models embed the padding id as zeros, so it is not read.
    ids = [i for i in range(_ROWS) if i != padding]
    ids_BS = torch.tensor([ids[-_WORDS:]])
    try:
        if probe.config.model_type in _REFUSED:
            raise ValueError(_REFUSED[probe.config.model_type])
        words = _inputs_of_first_layer(probe, input_ids=ids_BS)
        # Embeddings of no word: a model that looks up their words raises an error.
        _inputs_of_first_layer(probe, inputs_embeds=-table[ids_BS])
        # The scale is right if the first layer gets the same inputs as from words.
        for scale in _candidates(probe):
            embeddings = _inputs_of_first_layer(probe, inputs_embeds=table[ids_BS] * scale)
            if _are_equal(embeddings, words):
                return scale
        reason = "its first layer gets other inputs"
    # A model of the hub may raise any exception.
    except Exception as error:  # noqa: BLE001
        reason = (str(error) or type(error).__name__).splitlines()[0]
    name = probe.config.name_or_path or "a model"
    raise UserError(
        "llm.name must be an LLM that reads embeddings as it reads words, because visual "
        f"tokens are embeddings, got {name} ({probe.config.model_type}): "
        f"{reason.rstrip('.')}. Choose another LLM."
    )


def own_scale(embedding: Any) -> float:
    """Return the factor that a word embedding module applies to its rows."""
    return float(getattr(embedding, "embed_scale", None) or 1.0)


def _materialize(probe: Any) -> torch.Tensor:
    """Give all modules outside the layers random weights on the host.

    Returns the rows of the word embedding. All layers raise `_FirstLayer` when called.
    """
    in_layers: set[nn.Module] = set()
    # The innermost model of transformers that contains a module: it initialises the
    # buffers.
    owners: dict[nn.Module, Any] = {}
    # The layers keep no weights: the forward pass ends before them.
    for layer in _layers(probe):
        in_layers.update(layer.modules())
        layer.register_forward_pre_hook(_stop, with_kwargs=True)
    for module in probe.modules():
        if isinstance(module, PreTrainedModel):
            owners.update(dict.fromkeys(module.modules(), module))
    generator = torch.Generator().manual_seed(0)
    words: nn.Embedding = probe.get_input_embeddings()
    shape = words.weight.shape
    table = torch.randn(_ROWS, shape[1], generator=generator)
    for module in owners.keys() - in_layers:
        for name, parameter in module.named_parameters(recurse=False):
            numbers = _numbers(parameter, generator)
            # This includes the embeddings of encoder and decoder, which loading would tie.
            if type(module) is type(words) and parameter.shape == shape:
                numbers = table
                module.padding_idx = None  # it may be past the probe's rows
            setattr(module, name, nn.Parameter(numbers, requires_grad=False))
            # With this mark `_init_weights` below fills only buffers.
            getattr(module, name)._is_hf_initialized = True
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
            owners[module]._init_weights(module)
    return table


def _layers(probe: Any) -> list[nn.Module]:
    """Return the layers: those of transformers' layer class, else the modules in all lists.

    Code of the hub may not use that class.
    """
    layers: list[nn.Module] = []
    in_lists: list[nn.Module] = []
    for module in probe.modules():
        if isinstance(module, GradientCheckpointingLayer):
            layers.append(module)
        elif isinstance(module, nn.ModuleList):
            in_lists.extend(module)
    return layers or in_lists


def _numbers(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers of the same shape; one repeated number for a large tensor."""
    if like.numel() > _DRAWN:
        return torch.full((), 0.5).expand(like.shape)
    return torch.randn(like.shape, generator=generator)


def _stop(layer: nn.Module, args: Any, kwargs: Any) -> None:
    """End the forward pass: a pre-hook of the layers."""
    raise _FirstLayer(tree_leaves((args, kwargs)))


def _inputs_of_first_layer(probe: Any, **inputs: torch.Tensor) -> list[Any]:
    """Return the arguments of the first layer. Raises ValueError if there is none."""
    mask_BS = torch.ones(1, _WORDS, dtype=torch.long)
    # The decoder needs an input as well, which is the same in both ways.
    if probe.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    try:
        probe(**inputs, attention_mask=mask_BS, use_cache=False)
    except _FirstLayer as reached:
        return reached.inputs
    raise ValueError("it has no layers")


def _candidates(probe: Any) -> list[float]:
    """Return the possible scales, likely ones first.

    They are the factor of the embedding module, 1, all positive numbers among the
    attributes of the models and their configs, and sqrt(E).
    """
    embedding = probe.get_input_embeddings()
    found = [own_scale(embedding), 1.0]
    for model in probe.modules():
        if not isinstance(model, PreTrainedModel):
            continue
        for value in (*vars(model).values(), *vars(model.config).values()):
            if isinstance(value, float) and value > 0:
                found.append(value)
    found.append(embedding.weight.shape[1] ** 0.5)
    return list(dict.fromkeys(found))


def _are_equal(found: list[Any], wanted: list[Any]) -> bool:
    """Return whether tensors are close, and all other values have the same types."""
    return len(found) == len(wanted) and all(map(_are_like, found, wanted))


def _are_like(one: Any, other: Any) -> bool:
    """Return whether two tensors are close, or two other values have the same type."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    return type(one) is type(other)
