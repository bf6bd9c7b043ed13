"""What of an LLM depends on its vocabulary: tensors with a row a word, and the ids in its configs."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.models.llm.stored import StoredTensor

# Specials of text are absent where they were not kept; other ids (of pictures, sounds) must be some number.
_TEXT_SPECIALS = ("pad", "bos", "eos", "sep", "cls", "unk", "decoder_start", "forced_bos", "forced_eos")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def word_dims(skeleton: Any, smaller: Any) -> dict[str, int]:
    """{tensor: its dimension that counts words}: what differs in shape between two vocabularies."""
    shapes = {name: tensor.shape for name, tensor in smaller.state_dict().items()}
    found = {}
    for name, tensor in skeleton.state_dict().items():
        differing = [d for d, size in enumerate(tensor.shape) if size != shapes[name][d]]
        if differing:
            found[name] = differing[0]
    return found


def chosen_rows(tensor: torch.Tensor, rows: np.ndarray, dim: int) -> torch.Tensor:
    """`tensor.index_select(dim, rows)` for rising rows, without the whole tensor in memory where dim is 0."""
    if dim != 0 or not isinstance(tensor, StoredTensor):
        return tensor.index_select(dim, torch.from_numpy(rows))
    parts, start = [], 0
    for block in tensor.blocks():
        inside = rows[(rows >= start) & (rows < start + len(block))] - start
        parts.append(block[torch.from_numpy(inside)])
        start += len(block)
    return torch.cat(parts)


def trimmed_config(config: Any, codec: TextCodec, words: int, kept: int) -> Any:
    """A copy of a model's config with `kept` in place of `words` words, and trimmed ids."""
    trimmed = copy.deepcopy(config)
    for part in _with_parts(trimmed):
        of_words = getattr(part, "vocab_size", None) == words
        if of_words:
            part.vocab_size = kept
        if of_words or part is trimmed:
            renumber(part, codec)
    return trimmed


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)


def renumber(config: Any, codec: TextCodec) -> None:
    """Write trimmed ids into a config or generation config: nothing may point past the vocabulary."""
    for field, value in config.to_dict().items():
        if value is None or not (field.endswith(("_token_id", "_token_index")) or field in _ID_LISTS):
            continue
        trimmed = _renumbered(value, codec)
        if (
            trimmed is None
            and field.rpartition("_token_")[0] not in _TEXT_SPECIALS
            and field not in _ID_LISTS
        ):
            trimmed = codec.pad_id
        setattr(config, field, trimmed)
    ends = getattr(config, "eos_token_id", None)
    if not isinstance(ends, list):
        config.eos_token_id = codec.eos_id
    elif codec.eos_id not in ends:
        config.eos_token_id = [codec.eos_id, *ends]
    start = codec.wording().start if codec.language and not codec.instruction.decoder_only else ()
    if start:
        config.decoder_start_token_id = start[0]


def _renumbered(value: Any, codec: TextCodec) -> Any:
    """An id, or lists of ids; None for what was not kept."""
    if isinstance(value, int):
        known = 0 <= value < len(codec.tokenizer) and codec.trimmed_id(value) >= 0
        return codec.trimmed_id(value) if known else None
    trimmed = [_renumbered(one, codec) for one in value]
    if any(isinstance(one, list) for one in value):  # words of several pieces
        return [new for new, old in zip(trimmed, value, strict=True) if new and len(new) == len(old)] or None
    return [one for one in trimmed if one is not None] or None
