"""What an LLM multiplies its word embeddings by, measured: visual tokens must be as large."""

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

_ROWS = 16  # of the probe's word embedding
_WORDS = 4  # that it reads
# numbers in one of its other tensors at most; a larger one repeats a single number
_DRAWN = 10**7


# Model types that only seem to read embeddings as words, and why.
_REFUSED = {
    "fsmt": "where it reads embeddings, its decoder sees the words that are to come",
    "prophetnet": "what its decoder says of a word depends on how many words are to come",
}


class _FirstLayer(Exception):  # no error: it ends a forward
    """The first layer is about to be called, with `inputs`."""

    def __init__(self, inputs: list[Any]) -> None:
        self.inputs = inputs


def probe_of(llm: Any) -> Any:
    """A model of the LLM's class and config on the meta device, for `word_scale`."""
    with set_zero3_state(), torch.device("meta"), no_init_weights():
        return type(llm)(copy.deepcopy(llm.config))


@torch.no_grad()
def word_scale(probe: Any) -> float:
    """What the model multiplies embedded words by, but not embeddings that it is given.

    Families do so in the embedding, beside it, or not at all, and some scale embeddings
    as well. So the model reads the same words in both ways, as far as its first layer. No
    weights are needed, and no other rank.

    probe: on the meta device; it is of no other use afterwards. Raises UserError for a
    model that reads embeddings in another way than words.
    """
    probe.eval()
    with torch.device("cpu"):  # whatever the caller's default device is
        return _measured(probe)


def _measured(probe: Any) -> float:
    table = _materialize(probe)
    padding = getattr(probe.config.get_text_config(), "pad_token_id", None)
    ids = [i for i in range(_ROWS) if i != padding]
    ids_BS = torch.tensor([ids[-_WORDS:]])
    try:
        if probe.config.model_type in _REFUSED:
            raise ValueError(_REFUSED[probe.config.model_type])
        words = _inputs_of_first_layer(probe, input_ids=ids_BS)
        _inputs_of_first_layer(probe, inputs_embeds=-table[ids_BS])  # of no word
        for scale in _candidates(probe):
            embeddings = _inputs_of_first_layer(probe, inputs_embeds=table[ids_BS] * scale)
            if _are_equal(embeddings, words):
                return scale
        reason = "its first layer is given something else"
    except Exception as error:  # noqa: BLE001  # whatever a model of the hub does with embeddings
        reason = (str(error) or type(error).__name__).splitlines()[0]
    name = probe.config.name_or_path or "this one"
    raise UserError(
        "llm.name must be an LLM that reads embeddings as it reads words, because visual "
        f"tokens are embeddings, got {name} ({probe.config.model_type}): {reason}. Choose "
        "another LLM."
    )


def own_scale(embedding: Any) -> float:
    """What a word embedding multiplies its rows by itself."""
    return float(getattr(embedding, "embed_scale", None) or 1.0)


def _materialize(probe: Any) -> torch.Tensor:
    """Give what runs ahead of the layers random weights on the host.

    Returns the word embedding's rows.
    """
    in_layers: set[nn.Module] = set()
    owners: dict[nn.Module, Any] = {}  # the model whose `_init_weights` knows a module
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
            # Also the embedding of an encoder or decoder, which is tied when it is
            # loaded.
            if type(module) is type(words) and parameter.shape == shape:
                numbers = table
                module.padding_idx = None  # it may be past the probe's rows
            setattr(module, name, nn.Parameter(numbers, requires_grad=False))
            # So that `_init_weights` below fills buffers alone.
            getattr(module, name)._is_hf_initialized = True
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
            owners[module]._init_weights(module)
    return table


def _layers(probe: Any) -> list[nn.Module]:
    """transformers' own layers; of a class without them (code of the hub), all in a list."""
    layers: list[nn.Module] = []
    in_lists: list[nn.Module] = []
    for module in probe.modules():
        if isinstance(module, GradientCheckpointingLayer):
            layers.append(module)
        elif isinstance(module, nn.ModuleList):
            in_lists.extend(module)
    return layers or in_lists


def _numbers(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.numel() > _DRAWN:
        return torch.full((), 0.5).expand(like.shape)
    return torch.randn(like.shape, generator=generator)


def _stop(layer: nn.Module, args: Any, kwargs: Any) -> None:
    raise _FirstLayer(tree_leaves((args, kwargs)))


def _inputs_of_first_layer(probe: Any, **inputs: torch.Tensor) -> list[Any]:
    mask_BS = torch.ones(1, _WORDS, dtype=torch.long)
    if probe.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    try:
        probe(**inputs, attention_mask=mask_BS, use_cache=False)
    except _FirstLayer as reached:
        return reached.inputs
    raise ValueError("it has no layers")


def _candidates(probe: Any) -> list[float]:
    """What the scale may be, likely ones first.

    That of the embedding, 1, each number that a part of the model or its config holds,
    sqrt(E).
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
    """Whether tensors are about equal, and all else is of the same types."""
    return len(found) == len(wanted) and all(map(_are_like, found, wanted))


def _are_like(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    return type(one) is type(other)
