"""Open the checkpoint of an LLM as a state dict whose tensors stay in their files."""

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

# Tensors that a checkpoint of any model may hold or lack: computed tables (positions,
# causal masks), the zero bias of mBART, the version of fairseq, and heads for other tasks.
NEEDLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|final_logits_bias"
    r"|embed_positions\.weights|embed_positions\._float_tensor"
    r"|(encoder|decoder)\.version|(attn|attention)\.(bias|masked_bias|causal_mask))$"
    r"|^(classification_head|multiple_choice_head|score|classifier"
    r"|qa_outputs|v_head|value_head|pooler)\."
)
# Names of a text model's tensors in the layout of LLaVA (language_model.model.layers...)
# and in the later layouts of transformers.
_OF_TEXT = re.compile(
    r"(?:model\.)?(?:language_model|text_model|llm)\."
    r"(?:model\.)?(lm_head\.)?(.+)",
)
_DTYPES = {**str_to_torch_dtype, "F8_E8M0": torch.float8_e8m0fnu}
# How much of a tensor is read at once to select or compare rows.
BLOCK_BYTES = 64 * 2**20


class StoredTensor(torch.Tensor):
    """A tensor in a safetensors file: it has a shape and a type, but no values in memory.

    Every operation reads the values from the file. With a dict of such tensors, the loading
    code of transformers holds one tensor at a time in memory instead of all.
    """

    path: Path
    key: str

    @staticmethod
    def __new__(
        cls, path: Path, key: str, shape: Sequence[int], dtype: torch.dtype
    ) -> "StoredTensor":
        """Describe the tensor `key` of the file `path`."""
        # A wrapper subclass has no storage.
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
        """Run an operation of PyTorch on the values that its stored arguments have."""
        given = (args, kwargs or {})
        # Replace each stored tensor among the arguments by its values.
        args, kwargs = tree_map_only(StoredTensor, lambda stored: stored.read(), given)
        return func(*args, **kwargs)

    def read(self) -> torch.Tensor:
        """Return the values from the file."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.key)
        return tensor

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the rows in order, a few at a time. A scalar has no rows."""
        step = self.rows_at_once
        with safe_open(self.path, framework="pt") as file:
            rows = file.get_slice(self.key)
            for start in range(0, self.shape[0], step):
                yield rows[start : start + step]

    @property
    def rows_at_once(self) -> int:
        """Return how many rows fit into BLOCK_BYTES, at least one."""
        return max(1, BLOCK_BYTES // (self.shape[1:].numel() * self.element_size()))


def checkpoint_files(name: str) -> list[Path]:
    """Return the weight files of a folder, or of a hub id after a download.

    Raises OSError if there are none.
    """
    for candidate in CHECKPOINT_FILES:
        found = cached_file(name, candidate, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        if not candidate.endswith(".json"):
            return [Path(found)]
        # An index: the weights are in several files.
        places = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"]
        return [Path(cached_file(name, file)) for file in sorted(set(places.values()))]
    raise OSError(f"Cannot find weights in {name}: none of {', '.join(CHECKPOINT_FILES)}.")


def open_checkpoint(name: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a hub id or folder by their stored names.

    Pickled tensors (.bin) are memory-mapped.
    """
    state: dict[str, torch.Tensor] = {}
    for path in checkpoint_files(name):
        if path.suffix != ".safetensors":
            # This function unpickles only tensors, so no code in the file can run.
            state |= load_state_dict(path)
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                # A slice reads the header of the file alone.
                described = file.get_slice(key)
                dtype = _DTYPES[described.get_dtype()]
                state[key] = StoredTensor(path, key, described.get_shape(), dtype)
    return state


def text_tensors(
    skeleton: Any, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the text model's tensors of a multimodal checkpoint, by its own names.

    skeleton: the text model on the meta device.
    """
    # The text model's own prefix, such as "model", which the checkpoint may leave out.
    own = (name for name in skeleton.state_dict() if not name.startswith("lm_head."))
    body = next(own).split(".")[0]
    found = {}
    for key, tensor in state.items():
        # Tensors of other parts, such as a vision encoder, are left out.
        match = _OF_TEXT.fullmatch(key)
        if match:
            prefix = match[1] or f"{body}."
            found[f"{prefix}{match[2]}"] = tensor
        elif key.startswith("lm_head."):
            found[key] = tensor
    return found


def model_names(skeleton: Any, stored: Sequence[str]) -> dict[str, str]:
    """Return {name in a checkpoint: name in the model} by the rules of transformers.

    skeleton: the model on the meta device. Tensors that the model does not have are left
    out.
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
        # The same function renames the tensors when transformers loads a checkpoint.
        name, _ = rename_source_key(key, renamings, converters, prefix, own)
        if name in own:
            names[key] = name
    return names


def own_tensors(
    skeleton: Any, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by their names in the model; see `model_names`."""
    names = model_names(skeleton, list(state))
    return {name: state[key] for key, name in names.items()}


def unexpected_names(
    skeleton: Any, names: Mapping[str, str], stored: Iterable[str]
) -> list[str]:
    """Return the stored names that the model does not have, without optional tensors.

    names: the result of `model_names` for `stored`.
    """
    # A class of transformers may name tensors that old checkpoints hold.
    ignored = skeleton._keys_to_ignore_on_load_unexpected
    found = []
    for key in stored:
        if key not in names and not _is_needless(key, ignored):
            found.append(key)
    return found


def missing_names(skeleton: Any, names: Mapping[str, str]) -> list[str]:
    """Return the names of parameters and buffers that no stored or tied tensor fills.

    names: the result of `model_names` for a checkpoint.
    """
    filled = set(names.values())
    # A stored tensor also fills the tensor it is tied to, and all others tied to that one.
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
    """Return whether a tensor is optional for all models or by these patterns."""
    if NEEDLESS.search(name):
        return True
    return any(re.search(pattern, name) for pattern in ignored or ())


def _needed(names: Iterable[str]) -> list[str]:
    """Return the names without those of optional tensors, sorted."""
    return sorted(name for name in names if not NEEDLESS.search(name))


def check_fit(
    name: str, model: Any, missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Raise UserError for missing or unexpected tensors of an LLM.

    transformers would fill missing tensors with random numbers and ignore unexpected ones.
    """
    surplus = _needed(unexpected)
    if surplus:
        raise UserError(
            f"Cannot load the LLM {name}: {len(surplus)} of its tensors belong to no part of "
            f"a {type(model).__name__} ({surplus[0]} for example). Check --llm.name and its "
            "config.json."
        )
    lost = _needed(missing)
    if lost:
        raise UserError(
            f"Cannot load the LLM {name}: it lacks {len(lost)} of its tensors ({lost[0]} "
            "for example). Check --llm.name, or give --llm.pretrained=false for random "
            "weights."
        )


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same values.

    Stored tensors are compared a few rows at a time.
    """
    if one.shape != other.shape:
        return False
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        pairs = zip(one.blocks(), other.blocks(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def untied_names(skeleton: Any, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the model's names of tensors that the config ties but that have other values.

    The config of mT5, for example, says that the head is tied, but it is not.
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
    """Within the context, `from_pretrained` of this class ties parameters before loading.

    The parameters in `untied` are never tied. transformers ties after loading, so until
    then each tied copy of a large embedding takes memory. It also compares tied weights
    before it ties them; under ZeRO-3 it would compare partitioned tensors, which are empty.
    """
    ties, load = kind._tied_weights_keys, kind._load_pretrained_model

    def tie_and_load(model: Any, *arguments: Any, **more: Any) -> Any:
        """Tie the weights of the empty model, then load."""
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
    """Within the context, glibc returns freed blocks above 128 KB to the system at once.

    Otherwise glibc keeps freed blocks of up to 32 MB. Between the tensors of a model they
    add up to a third of its size.
    """
    # macOS and musl have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    # Larger blocks are mapped, and unmapped when they are freed.
    mallopt(mmap_threshold, 2**17)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 * 2**20)  # the maximum of glibc's own adjustment
        mallopt(trim_threshold, 64 * 2**20)
