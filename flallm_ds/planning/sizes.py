"""Count the parameters and activations of an LLM on the meta device, without weights.

B clips, S input tokens of the LLM, L target tokens of a clip, E language width.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from flallm_ds.errors import UserError
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.llm.load import LlmOptions, llm_width, set_dropouts
from flallm_ds.models.llm.source import llm_config, skeleton_of
from flallm_ds.models.llm.tuning import Tuning, tune

# Typical shapes, for a size instead of a name: layers, width, feed-forward width, heads,
# key-value heads, vocabulary. They are assumptions, those of the models in the comments.
_SHAPES = {
    "0.5B": (24, 896, 4864, 14, 2, 151_936),  # Qwen2.5-0.5B
    "1B": (16, 2048, 8192, 32, 8, 128_256),  # Llama 3.2 1B
    "1.7B": (28, 2048, 6144, 16, 8, 151_936),  # Qwen3-1.7B, with other heads
    "3B": (28, 3072, 8192, 24, 8, 128_256),  # Llama 3.2 3B
    "7B": (32, 4096, 11_008, 32, 32, 32_000),  # Llama 2 7B
    "8B": (32, 4096, 14_336, 32, 8, 128_256),  # Llama 3.1 8B
    "13B": (40, 5120, 13_824, 40, 40, 32_000),  # Llama 2 13B
    "32B": (64, 5120, 27_648, 40, 8, 152_064),  # Qwen2.5-32B
    "70B": (80, 8192, 28_672, 64, 8, 128_256),  # Llama 3.1 70B
}
_TIED = ("0.5B", "1B", "1.7B", "3B")  # small models use one embedding for input and output
# mBART-large, the LLM of FLa-LLM, is the only encoder-decoder with a size of its own.
MBART_LARGE = "0.6B"
SIZES = (MBART_LARGE, *_SHAPES)
# Width of the features that the LLM-Adapter reads: ResNet-18 and the temporal module.
FEATURE_WIDTH = 512


@dataclass(frozen=True)
class ModelSize:
    """What the engine of stage llm holds: the LLM and the LLM-Adapter.

    trained, frozen: parameters. largest: parameters of the largest module that ZeRO-3
    gathers at once. largest_trained: of the largest single trained parameter. head:
    parameters of a trained output head, 0 if it is frozen. linear: frozen weights of linear
    layers without the head, which bitsandbytes can store in 8 or 4 bits. width: E. layers:
    modules that are gathered as one, such as a decoder layer.
    """

    trained: int
    frozen: int
    largest: int
    largest_trained: int
    head: int
    linear: int
    width: int
    vocab_size: int
    layers: int
    decoder_only: bool

    @property
    def total(self) -> int:
        return self.trained + self.frozen


def config_of(name: str, hub_code: bool = False) -> Any:
    """Return the config of an LLM: of a size of `SIZES`, a hub id, or a folder.

    Raises UserError if there is no config, or for an unknown size.
    """
    size = name.upper()
    if size == MBART_LARGE:
        return AutoConfig.for_model("mbart", vocab_size=250_027)
    if size in _SHAPES:
        layers, width, ffn, heads, kv_heads, vocabulary = _SHAPES[size]
        return AutoConfig.for_model(
            "llama",
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=ffn,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=size in _TIED,
        )
    is_number = size[:-1].replace(".", "", 1).isdigit()
    if is_number and size[-1] in "BM" and not Path(name).exists():
        raise UserError(
            f"--llm must be a hub id, a folder with a config.json or one of the sizes "
            f"{', '.join(SIZES)}, got {name!r}. Use the next larger size."
        )
    return llm_config(name, hub_code)


def trimmed(config: Any, vocab_size: int | None) -> Any:
    """Return a copy of a config, with this number of vocabulary entries if it is given."""
    config = copy.deepcopy(config)
    # Not decoder=True, which returns a copy of the config of an encoder-decoder.
    text = config.get_text_config()
    if vocab_size is not None:
        text.vocab_size = vocab_size
        # A padding id beyond the last row is an error of nn.Embedding.
        if text.pad_token_id is not None:
            text.pad_token_id = min(text.pad_token_id, vocab_size - 1)
    return config


def build_on_meta(
    config: Any, options: LlmOptions, tuning: Tuning, vocab_size: int | None = None
) -> tuple[Any, Adapter]:
    """Return (LLM, LLM-Adapter) on the meta device, in train mode, tuned as in a run.

    vocab_size: rows of a trimmed vocabulary; None keeps the vocabulary. The parameters
    have the type that the engine gives them: bf16 for options.bits below 32.
    """
    config = trimmed(config, vocab_size)
    set_dropouts(config, options)
    llm = skeleton_of(config, options.hub_code)
    llm.tie_weights()
    with torch.device("meta"):
        tune(llm, tuning)
        adapter = Adapter(FEATURE_WIDTH, llm_width(llm))
    dtype = torch.float32 if options.bits == 32 else torch.bfloat16
    return llm.to(dtype).train(), adapter.to(dtype).train()


def size_of(llm: Any, adapter: Adapter) -> ModelSize:
    """Count the parameters of `build_on_meta`; tied parameters count once."""
    parameters = [*llm.parameters(), *adapter.parameters()]
    trained = [p.numel() for p in parameters if p.requires_grad]
    total = sum(p.numel() for p in parameters)
    gathered = gathered_modules(llm)
    head = llm.get_output_embeddings().weight
    linear = 0
    for module in llm.modules():
        if isinstance(module, nn.Linear) and module.weight is not head:
            linear += 0 if module.weight.requires_grad else module.weight.numel()
    return ModelSize(
        trained=sum(trained),
        frozen=total - sum(trained),
        largest=max([_numel(m) for m in gathered] + [head.numel()]),
        largest_trained=max(trained),
        head=head.numel() if head.requires_grad else 0,
        linear=linear,
        width=llm_width(llm),
        vocab_size=int(llm.get_output_embeddings().out_features),
        layers=len(gathered),
        decoder_only=not llm.config.is_encoder_decoder,
    )


def gathered_modules(llm: Any) -> list[nn.Module]:
    """Return the layers that ZeRO-3 gathers as one: the outermost `_no_split_modules`."""
    kinds = set(getattr(llm, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in llm.modules():
        if type(module).__name__ in kinds and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(
    llm: Any,
    adapter: Adapter,
    num_clips: int,
    num_input: int,
    num_target: int,
    device: str = "meta",
) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without the loss.

    The pass runs on the meta device: autograd saves tensors that have sizes, but no memory.
    num_input: S, visual tokens and prompt. num_target: L. All clips have these lengths.
    device: that of the modules.
    """
    own = {p.untyped_storage()._cdata for p in [*llm.parameters(), *adapter.parameters()]}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor is kept, so that no later storage gets the same address.
            saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    dtype = next(adapter.parameters()).dtype
    with torch.device(device), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features = torch.zeros(num_clips, num_input, FEATURE_WIDTH, dtype=dtype)
        _states(llm, adapter(features), num_target)
    return sum(size for size, _ in saved.values())


def _states(llm: Any, embeddings_BSE: torch.Tensor, num_target: int) -> torch.Tensor:
    """Run the LLM as `SignTranslator` does, and return its last hidden states."""
    num_clips, num_input, _ = embeddings_BSE.shape

    def mask(queries: int, keys: int) -> torch.Tensor:
        # Complete masks: transformers would read the values of a mask of tokens.
        return torch.ones(num_clips, 1, queries, keys, dtype=torch.bool)

    if not llm.config.is_encoder_decoder:
        words = embeddings_BSE.new_empty(num_clips, num_target, embeddings_BSE.shape[2])
        read_BSE = torch.cat([embeddings_BSE, words], 1)
        length = read_BSE.shape[1]
        out = llm.get_decoder()(
            inputs_embeds=read_BSE, attention_mask=mask(length, length), use_cache=False
        )
    else:
        memory = llm.get_encoder()(
            inputs_embeds=embeddings_BSE, attention_mask=mask(num_input, num_input)
        )
        out = llm.get_decoder()(
            input_ids=torch.zeros(num_clips, num_target, dtype=torch.long),
            attention_mask=mask(num_target, num_target),
            encoder_hidden_states=memory.last_hidden_state,
            encoder_attention_mask=mask(num_target, num_input),
            use_cache=False,
        )
    states: torch.Tensor = out.last_hidden_state
    return states
