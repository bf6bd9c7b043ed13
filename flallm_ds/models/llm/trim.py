"""Trim the vocabulary of an LLM to the training texts, and restore the full vocabulary."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.models.llm.source import (
    LOAD_ERRORS,
    LlmSource,
    generation_config,
    not_loaded,
    open_source,
    save_configs,
    skeleton_of,
)
from flallm_ds.models.llm.stored import (
    check_fit,
    missing_names,
    model_names,
    own_tensors,
    unexpected_names,
    untied_names,
)
from flallm_ds.models.llm.vocabulary import chosen_rows, renumber, trimmed_config, word_dims
from flallm_ds.models.llm.word_scale import probe_of, word_scale
from flallm_ds.models.weights import write_weights

# Largest file of a trimmed LLM. As much is held in memory while a file is written.
_FILE_BYTES = 10**9


def trim_llm(name: str, codec: TextCodec, out: Path, hub_code: bool = False) -> None:
    """Write the LLM `name` to `out` with the kept vocabulary entries alone, and the codec.

    Tensors are written one by one in their stored types. Run on one rank. Kept ids without
    a row in the LLM stay without one. Raises UserError if the LLM cannot be loaded. Source:
    FLa-LLM, section 4.1 (2,215 tokens on PHOENIX14T).
    """
    try:
        source = open_source(name, hub_code)
        skeleton = source.skeleton()
        word_scale(probe_of(skeleton))  # an error for an LLM that cannot read visual tokens
        state = source.tensors(skeleton)
        names = _placed(source, skeleton, state)
        tied = skeleton.all_tied_weights_keys
        really_tied = tied.keys() - untied_names(skeleton, state)
    except LOAD_ERRORS as error:
        raise not_loaded(name, error) from error

    # The kept rows, and the tensors with a row or column for each vocabulary entry.
    words = skeleton.get_input_embeddings().num_embeddings
    kept = codec.kept_ids[codec.kept_ids < words]
    config = trimmed_config(skeleton.config, codec, words, len(kept))
    dims = word_dims(skeleton, skeleton_of(config, hub_code))

    # A tied tensor is left out if the tensor that it is tied to is written.
    left_out = {name for name in really_tied if tied[name] in names.values()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, own in names.items():
            if own in left_out:
                continue
            tensor = state[key]
            if own in dims:
                tensor = chosen_rows(tensor, kept, dims[own])
            yield key, tensor

    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, tensors(), file_bytes=_FILE_BYTES)
    generation = generation_config(name, skeleton.config)
    renumber(generation, codec)
    save_configs(skeleton, config, generation, out)
    codec.save(out)


def untrim_llm(
    trimmed: Path, base_name: str, codec: TextCodec, out: Path, hub_code: bool = False
) -> None:
    """Write a trained, trimmed LLM to `out` with the full vocabulary of its base model.

    trimmed: a folder from `trim_llm`, or a trained LLM that was trimmed before. Vocabulary
    entries that were not kept get the rows of `base_name`. Raises UserError if the LLM was
    trimmed from another model.
    """
    small_source = open_source(str(trimmed), hub_code)
    base_source = open_source(base_name, hub_code)
    small, whole = small_source.skeleton(), base_source.skeleton()
    try:
        state, base = small_source.tensors(small), base_source.tensors(whole)
    except LOAD_ERRORS as error:
        raise not_loaded(f"{trimmed} or {base_name}", error) from error
    names = _placed(small_source, small, state)
    _placed(base_source, whole, base)
    dims = _dims_of_words(small, whole, base_name)
    # A base checkpoint may hold a tied tensor under another name.
    base_rows = _by_own_name(whole, base)
    kept = codec.kept_ids[codec.kept_ids < whole.get_input_embeddings().num_embeddings]
    places = torch.from_numpy(kept)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, own in names.items():
            tensor = state[key].detach()
            if own in dims:
                rows = base_rows.get(own)
                if rows is None:  # a bias of zeros that old checkpoints leave out
                    rows = torch.zeros(whole.state_dict()[own].shape)
                # Copy the rows of the base model, then put the trained rows in their
                # places.
                rows = rows.to(tensor.dtype, copy=True)
                tensor = rows.index_copy_(dims[own], places, tensor)
            yield key, tensor

    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, tensors(), file_bytes=_FILE_BYTES)
    # The tensors were written in the type of the trained LLM.
    whole.config.dtype = small.config.dtype
    save_configs(whole, whole.config, generation_config(base_name, whole.config), out)
    # The folder holds the full tokenizer again.
    codec.untrimmed().save(out)


def _placed(
    source: LlmSource, skeleton: Any, state: dict[str, torch.Tensor]
) -> dict[str, str]:
    """Return `model_names` of a checkpoint. Raises UserError if it does not fit."""
    names = model_names(skeleton, list(state))
    missing = missing_names(skeleton, names)
    check_fit(source.name, skeleton, missing, unexpected_names(skeleton, names, state))
    return names


def _dims_of_words(small: Any, whole: Any, base_name: str) -> dict[str, int]:
    """Return {tensor: its vocabulary dimension} of two skeletons.

    Raises UserError if they differ in more than the vocabulary.
    """
    own = small.state_dict()
    same_names = own.keys() == whole.state_dict().keys()
    # All sizes must agree, except the one that counts vocabulary entries.
    if small.config.model_type == whole.config.model_type and same_names:
        dims = word_dims(whole, small)
        words = small.get_input_embeddings().num_embeddings
        if all(own[name].shape[dim] == words for name, dim in dims.items()):
            return dims
    raise UserError(
        "The trimmed LLM was made from another base LLM (the tensors differ, got "
        f"{base_name}). Name the LLM that it was trimmed from."
    )


def _by_own_name(skeleton: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by all names in the model, also tied ones."""
    stored = own_tensors(skeleton, state)
    ties = skeleton.all_tied_weights_keys
    # A checkpoint may hold a tied tensor under either name: first fill the sources, then
    # the names that are tied to them.
    for target, source in ties.items():
        if target in stored:
            stored.setdefault(source, stored[target])
    tied = {}
    for target, source in ties.items():
        if target not in stored and source in stored:
            tied[target] = stored[source]
    return stored | tied
