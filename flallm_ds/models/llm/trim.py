"""An LLM's vocabulary trimmed to the training texts, and made whole again."""

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
    model_names,
    must_fit,
    own_tensors,
    unfilled,
    unplaced,
    untied_names,
)
from flallm_ds.models.llm.vocabulary import chosen_rows, renumber, trimmed_config, word_dims
from flallm_ds.models.llm.word_scale import probe_of, word_scale
from flallm_ds.models.weights import write_weights

_FILE_BYTES = 10**9  # of a trimmed LLM's files: what waits in memory while one is written


def trim_llm(name: str, codec: TextCodec, out: Path, hub_code: bool = False) -> None:
    """Write the LLM `name` to `out` with the rows of the codec's kept pieces alone, and
    the codec.

    Tensor by tensor, in the types they are stored in. Run on one rank. Ids that the LLM
    has no rows for stay without. Source: FLa-LLM, section 4.1 (2,215 pieces on
    PHOENIX14T).
    """
    try:
        source = open_source(name, hub_code)
        skeleton = source.skeleton()
        word_scale(probe_of(skeleton))  # refuses what cannot read visual tokens
        state = source.tensors(skeleton)
        names = _placed(source, skeleton, state)
        tied = skeleton.all_tied_weights_keys
        twins = tied.keys() - untied_names(skeleton, state)
    except LOAD_ERRORS as error:
        raise not_loaded(name, error) from error

    # Which rows are kept, and which tensors have rows (or columns) of words.
    words = skeleton.get_input_embeddings().num_embeddings
    kept = codec.kept_ids[codec.kept_ids < words]
    config = trimmed_config(skeleton.config, codec, words, len(kept))
    dims = word_dims(skeleton, skeleton_of(config, hub_code))

    # A tied tensor is left out where the one that it is tied to is written.
    left_out = {twin for twin in twins if tied[twin] in names.values()}

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
    """Write a trained, trimmed LLM into the folder `out` with all the words of its base LLM.

    trimmed: a folder that was written by `trim_llm` or trained since. Words that were not
    kept have the rows of `base_name`. Raises UserError where the two are not of one kind.
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
    dims = _same_but_for_words(small, whole, base_name)
    base_rows = _by_own_name(whole, base)
    kept = codec.kept_ids[codec.kept_ids < whole.get_input_embeddings().num_embeddings]
    places = torch.from_numpy(kept)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, own in names.items():
            tensor = state[key].detach()
            if own in dims:
                rows = base_rows.get(own)
                if rows is None:  # a bias that old checkpoints leave out
                    rows = torch.zeros(whole.state_dict()[own].shape)
                # The base's rows in the type of the trained ones, which then replace
                # theirs.
                rows = rows.to(tensor.dtype, copy=True)
                tensor = rows.index_copy_(dims[own], places, tensor)
            yield key, tensor

    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, tensors(), file_bytes=_FILE_BYTES)
    whole.config.dtype = small.config.dtype
    save_configs(whole, whole.config, generation_config(base_name, whole.config), out)
    codec.untrimmed().save(out)


def _placed(
    source: LlmSource, skeleton: Any, state: dict[str, torch.Tensor]
) -> dict[str, str]:
    """What `model_names` says of a checkpoint. Raises UserError where it is not the model's."""
    names = model_names(skeleton, list(state))
    must_fit(
        source.name, skeleton, unfilled(skeleton, names), unplaced(skeleton, names, state)
    )
    return names


def _same_but_for_words(small: Any, whole: Any, base_name: str) -> dict[str, int]:
    """The dimension of words of each tensor that has one. Raises UserError where more differs."""
    own = small.state_dict()
    same_names = own.keys() == whole.state_dict().keys()
    if small.config.model_type == whole.config.model_type and same_names:
        dims = word_dims(whole, small)
        words = small.get_input_embeddings().num_embeddings
        if all(own[name].shape[dim] == words for name, dim in dims.items()):
            return dims
    raise UserError(
        f"the base LLM must be the one that was trimmed, but {base_name} has other tensors."
    )


def _by_own_name(skeleton: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by every name that the model has for them, tied ones by each."""
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
