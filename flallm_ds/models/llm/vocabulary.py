"""Trim the parts of an LLM that depend on its vocabulary: tensors and ids in configs."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.models.llm.stored import StoredTensor

# Special tokens of text get no id if they were not kept. Other ids (of images, of sounds)
# must be a number.
_TEXT_SPECIALS = (
    "pad",
    "bos",
    "eos",
    "sep",
    "cls",
    "unk",
    "decoder_start",
    "forced_bos",
    "forced_eos",
)
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def word_dims(skeleton: Any, smaller: Any) -> dict[str, int]:
    """Return {tensor: its vocabulary dimension}, which a smaller model shows."""
    others = smaller.state_dict()
    found = {}
    for name, tensor in skeleton.state_dict().items():
        sizes = zip(tensor.shape, others[name].shape, strict=True)
        for dim, (size, other) in enumerate(sizes):
            if size != other:
                found[name] = dim
                break
    return found


def chosen_rows(tensor: torch.Tensor, rows: np.ndarray, dim: int) -> torch.Tensor:
    """Return `tensor.index_select(dim, rows)` for ascending rows.

    If dim is 0, a stored tensor is never in memory as a whole.
    """
    if dim != 0 or not isinstance(tensor, StoredTensor):
        return tensor.index_select(dim, torch.from_numpy(rows))
    parts, start = [], 0
    for block in tensor.blocks():
        # The selected rows of this block, relative to its first row.
        inside = rows[(rows >= start) & (rows < start + len(block))] - start
        parts.append(block[torch.from_numpy(inside)])
        start += len(block)
    return torch.cat(parts)


def trimmed_config(config: Any, codec: TextCodec, words: int, kept: int) -> Any:
    """Return a copy of a config with `kept` vocabulary entries and trimmed ids.

    words: the number of entries before.
    """
    trimmed = copy.deepcopy(config)
    # Other parts, such as a vision encoder's, have other ids or none.
    for part in _with_parts(trimmed):
        of_words = getattr(part, "vocab_size", None) == words
        if of_words:
            part.vocab_size = kept
        if of_words or part is trimmed:
            renumber(part, codec)
    return trimmed


def _with_parts(config: Any) -> Iterator[Any]:
    """Yield a config and the configs of its parts, at any depth."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)


def renumber(config: Any, codec: TextCodec) -> None:
    """Replace the ids in a config or generation config by trimmed ones, in place."""
    for field, value in config.to_dict().items():
        is_list = field in _ID_LISTS
        # Configs have many other fields, such as sizes.
        is_id = is_list or field.endswith(("_token_id", "_token_index"))
        if value is None or not is_id:
            continue
        trimmed = _renumbered(value, codec)
        is_of_text = field.rpartition("_token_")[0] in _TEXT_SPECIALS
        if trimmed is None and not is_of_text and not is_list:
            trimmed = codec.pad_id
        setattr(config, field, trimmed)
    # The codec's end of sentence must end generation, first in a list of ends.
    ends = getattr(config, "eos_token_id", None)
    if not isinstance(ends, list):
        config.eos_token_id = codec.eos_id
    elif codec.eos_id not in ends:
        config.eos_token_id = [codec.eos_id, *ends]
    # The start of the decoder is the language token in some families.
    if codec.language and not codec.instruction.decoder_only:
        start = codec.wording().start
        if start:
            config.decoder_start_token_id = start[0]


def _renumbered(value: Any, codec: TextCodec) -> Any:
    """Return the trimmed id, or lists of ids; None for ids that were not kept."""
    if isinstance(value, int):
        # An id may be outside the tokenizer: -1, or a row that only fills up the embedding.
        known = 0 <= value < len(codec.tokenizer) and codec.trimmed_id(value) >= 0
        return codec.trimmed_id(value) if known else None
    kept = []
    for old in value:
        new = _renumbered(old, codec)
        # A word of several tokens is kept whole or not at all.
        is_part = isinstance(old, list) and new is not None and len(new) < len(old)
        if new is not None and not is_part:
            kept.append(new)
    return kept or None
