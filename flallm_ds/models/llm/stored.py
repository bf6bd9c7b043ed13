"""An LLM's checkpoint as a state dict whose tensors stay in their files until they are needed."""

import ctypes
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_map_only
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.modeling_utils import load_state_dict, str_to_torch_dtype
from transformers.utils import cached_file

from flallm_ds.errors import UserError
from flallm_ds.models.pretrained import CHECKPOINT_FILES

# What a checkpoint may hold or lack whatever the model: tables that are computed
# (positions, causal masks), mBART's bias of zeros, fairseq's version, and heads of other
# tasks next to a whole LLM.
NEEDLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|final_logits_bias"
    r"|embed_positions\.weights|embed_positions\._float_tensor"
    r"|(encoder|decoder)\.version|(attn|attention)\.(bias|masked_bias|causal_mask))$"
    r"|^(classification_head|multiple_choice_head|score|classifier"
    r"|qa_outputs|v_head|value_head|pooler)\."
)
# Of the text model in LLaVA's layout (language_model.model.layers...) and its successors.
_OF_TEXT = re.compile(
    r"(?:model\.)?(?:language_model|text_model|llm)\."
    r"(?:model\.)?(lm_head\.)?(.+)",
)
_DTYPES = {**str_to_torch_dtype, "F8_E8M0": torch.float8_e8m0fnu}
# how much of a tensor is read at once where rows are chosen or compared
BLOCK_BYTES = 64 * 2**20


class StoredTensor(torch.Tensor):
    """A tensor of a safetensors file: shape and type, but no values.

    Every operation on it reads its values again. So transformers' own loading code,
    handed a dict of these, holds one tensor at a time instead of all.
    """

    path: Path
    key: str

    @staticmethod
    def __new__(
        cls, path: Path, key: str, shape: Sequence[int], dtype: torch.dtype
    ) -> "StoredTensor":
        wrap: Any = torch.Tensor._make_wrapper_subclass
        tensor: StoredTensor = wrap(cls, tuple(shape), dtype=dtype)
        tensor.path, tensor.key = path, key
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        given = (args, kwargs or {})
        args, kwargs = tree_map_only(StoredTensor, lambda stored: stored.read(), given)
        return func(*args, **kwargs)

    def read(self) -> torch.Tensor:
        """The values, from the file."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.key)
        return tensor

    def blocks(self) -> Iterator[torch.Tensor]:
        """The rows in order, a few at a time; at least one dimension."""
        step = self.rows_at_once
        with safe_open(self.path, framework="pt") as file:
            rows = file.get_slice(self.key)
            for start in range(0, self.shape[0], step):
                yield rows[start : start + step]

    @property
    def rows_at_once(self) -> int:
        """As many rows as BLOCK_BYTES hold, at least one."""
        return max(1, BLOCK_BYTES // (self.shape[1:].numel() * self.element_size()))


def checkpoint_files(name: str) -> list[Path]:
    """The weight files of a hub id, which are then downloaded, or of a folder.

    Raises OSError where there are none.
    """
    for candidate in CHECKPOINT_FILES:
        found = cached_file(name, candidate, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if not candidate.endswith(".json"):
            return [Path(found)]
        places = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"]
        return [Path(cached_file(name, file)) for file in sorted(set(places.values()))]
    raise OSError(f"no file named {', '.join(CHECKPOINT_FILES)} found in {name}.")


def open_checkpoint(name: str) -> dict[str, torch.Tensor]:
    """Every tensor of a hub id or folder by its name there.

    Pickled ones (.bin) are mapped from the file.
    """
    state: dict[str, torch.Tensor] = {}
    for path in checkpoint_files(name):
        if path.suffix != ".safetensors":
            state |= load_state_dict(path)  # unpickles tensors alone
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                described = file.get_slice(key)
                dtype = _DTYPES[described.get_dtype()]
                state[key] = StoredTensor(path, key, described.get_shape(), dtype)
    return state


def text_tensors(
    skeleton: Any, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a multimodal checkpoint's text model, by their names in the text model.

    skeleton: the text model on the meta device.
    """
    own = (name for name in skeleton.state_dict() if not name.startswith("lm_head."))
    body = next(own).split(".")[0]
    found = {}
    for key, tensor in state.items():
        match = _OF_TEXT.fullmatch(key)
        if match:
            prefix = match[1] or f"{body}."
            found[f"{prefix}{match[2]}"] = tensor
        elif key.startswith("lm_head."):
            found[key] = tensor
    return found


def model_names(skeleton: Any, stored: Sequence[str]) -> dict[str, str]:
    """{name in a checkpoint: the model's own name of what it becomes}, as transformers renames.

    skeleton: the model on the meta device. Names of no part of it are left out.
    """
    converters, renamings = [], []
    for transform in get_model_conversion_mapping(skeleton):
        if isinstance(transform, WeightConverter):
            converters.append(transform)
        else:
            renamings.append(transform)
    own = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    names = {}
    for key in stored:
        name, _ = rename_source_key(key, renamings, converters, prefix, own)
        if name in own:
            names[key] = name
    return names


def own_tensors(
    skeleton: Any, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors by the model's own names, as `model_names` gives them."""
    names = model_names(skeleton, list(state))
    return {name: state[key] for key, name in names.items()}


def unplaced(skeleton: Any, names: Mapping[str, str], stored: Iterable[str]) -> list[str]:
    """Names in a checkpoint of what ends up in no part of the model, but for what no model needs.

    names: what `model_names` returned for `stored`.
    """
    ignored = skeleton._keys_to_ignore_on_load_unexpected
    found = []
    for key in stored:
        if key not in names and not _is_needless(key, ignored):
            found.append(key)
    return found


def unfilled(skeleton: Any, names: Mapping[str, str]) -> list[str]:
    """Names of the model's parameters and buffers that no stored tensor, and no tied one,
    fills."""
    filled = set(names.values())
    # A stored tensor also fills the source it is tied to, and all that is tied to that one.
    pairs = skeleton.all_tied_weights_keys.items()
    filled |= {source for target, source in pairs if target in filled}
    filled |= {target for target, source in pairs if source in filled}
    ignored = skeleton._keys_to_ignore_on_load_missing
    found = []
    for name in skeleton.state_dict():
        if name not in filled and not _is_needless(name, ignored):
            found.append(name)
    return found


def _is_needless(name: str, ignored: Iterable[str] | None) -> bool:
    """Whether no model needs this tensor, or the model's class ignores it, by these patterns."""
    if NEEDLESS.search(name):
        return True
    return any(re.search(pattern, name) for pattern in ignored or ())


def _needed(names: Iterable[str]) -> list[str]:
    """Return the names, sorted, without those of tensors that no model needs."""
    return sorted(name for name in names if not NEEDLESS.search(name))


def must_fit(
    name: str, model: Any, missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Raise UserError for parts of an LLM without a tensor, or tensors without a part.

    transformers would go on with random numbers for the first, and without the second.
    """
    surplus = _needed(unexpected)
    if surplus:
        raise UserError(
            f"the LLM {name} must be of the kind that its config.json says, but "
            f"{len(surplus)} of its tensors belong to no part of a {type(model).__name__}, "
            f"{surplus[0]} being one. Check --llm.name and its config.json."
        )
    lost = _needed(missing)
    if lost:
        raise UserError(
            f"the LLM {name} must hold all weights of its model, but lacks {len(lost)}, "
            f"{lost[0]} being one. Check --llm.name, or give --llm.pretrained=false for "
            "random weights."
        )


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; stored ones are compared a few rows at a time."""
    if one.shape != other.shape:
        return False
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        pairs = zip(one.blocks(), other.blocks(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def untied_names(skeleton: Any, state: Mapping[str, torch.Tensor]) -> set[str]:
    """The model's names of tensors that its config ties, but that have values of their own.

    mT5's head is not its embedding, although its config says so.
    """
    stored = own_tensors(skeleton, state)
    untied = set()
    for target, source in skeleton.all_tied_weights_keys.items():
        if target not in stored or source not in stored:
            continue
        if not are_equal(stored[target], stored[source]):
            untied.add(target)
    return untied


def remaining_ties(ties: Mapping[str, str], untied: set[str]) -> dict[str, str]:
    """Return {tied name: its source} without the names in `untied`."""
    return {name: source for name, source in ties.items() if name not in untied}


@contextmanager
def tied_before_loading(kind: Any, untied: set[str]) -> Iterator[None]:
    """Within, `from_pretrained` of this class ties parameters first, and never these names.

    transformers ties afterwards: until then every twin of a large embedding takes its
    part of the memory. And it compares twins before it ties them; under ZeRO-3 it
    compares what is left of them, nothing.
    """
    ties, load = kind._tied_weights_keys, kind._load_pretrained_model

    def tie_and_load(model: Any, *arguments: Any, **more: Any) -> Any:
        model.tie_weights(recompute_mapping=False)
        return load(model, *arguments, **more)

    kind._load_pretrained_model = staticmethod(tie_and_load)
    if untied:
        kind._tied_weights_keys = remaining_ties(ties, untied)
    try:
        yield
    finally:
        kind._tied_weights_keys, kind._load_pretrained_model = ties, staticmethod(load)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within, freed memory of more than 128 KB goes back to the system at once, under glibc.

    glibc would keep pieces of up to 32 MB; between parts of a model that stay, they add
    up to a third of them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    mallopt(mmap_threshold, 2**17)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 * 2**20)  # as high as glibc itself goes
        mallopt(trim_threshold, 64 * 2**20)
