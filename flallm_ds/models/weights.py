"""Weights on disk: safetensors files, written and read tensor by tensor, without a second copy.

One file `model.safetensors`, or `model-00001-of-00003.safetensors` ... with
`model.safetensors.index.json`: the layout that transformers reads.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from flallm_ds.errors import UserError

FILE_BYTES = 2 * 10**9  # of one file at most, unless a single tensor is larger


class WeightsWriter:
    """Writes tensors as they come.

    `with WeightsWriter(folder) as writer: writer.add(name, tensor)`. At most file_bytes
    wait in memory. The files get their names at the end: nothing loads before.
    """

    def __init__(
        self, folder: Path, name: str = "model.safetensors", file_bytes: int = FILE_BYTES
    ) -> None:
        self.folder, self.name, self.file_bytes = folder, name, file_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor that nobody changes until the writer is closed."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.file_bytes:
            self._flush()
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._waiting_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        path = self.folder / f".partial-{len(self._files)}-{self.name}"
        save_file(self._waiting, path, metadata={"format": "pt"})
        self._files.append((path, list(self._waiting)))
        self._waiting, self._waiting_bytes = {}, 0

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            return
        if self._waiting or not self._files:
            self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self.folder / self.name)
            return
        stem, suffix = self.name.rsplit(".", 1)
        places: dict[str, str] = {}
        for number, (path, tensors) in enumerate(self._files, 1):
            final = f"{stem}-{number:05d}-of-{len(self._files):05d}.{suffix}"
            path.rename(self.folder / final)
            places |= dict.fromkeys(tensors, final)
        content = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        index = self.folder / f"{self.name}.index.json"
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    name: str = "model.safetensors",
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write all of an iterator of (name, tensor)."""
    with WeightsWriter(folder, name, file_bytes) as writer:
        for key, tensor in tensors:
            writer.add(key, tensor)


class Weights:
    """What `WeightsWriter` or transformers wrote: `names`, and each tensor when it is asked for.

    Raises UserError that names a file which is missing or not whole.
    """

    def __init__(self, folder: Path, name: str = "model.safetensors") -> None:
        self.path = folder / name
        index = folder / f"{name}.index.json"
        files = [name]
        if not self.path.is_file() and index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(places.values()))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{index} must be an index of safetensors files, but is not ({error})."
                ) from None
        self._files = [(folder / file, _open(folder / file)) for file in files]
        self._places: dict[str, int] = {}
        for number, (_, opened) in enumerate(self._files):
            self._places |= dict.fromkeys(opened.keys(), number)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, on the host. Raises KeyError where there is none."""
        path, file = self._files[self._places[name]]
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"{path} must be a whole safetensors file, but is not ({error})."
            ) from error
        return tensor

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._places:
            yield name, self[name]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} must be a whole safetensors file, but is not ({error})."
        ) from error


def named_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once by their first name, then the buffers that belong to the
    state."""
    yield from module.named_parameters()
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield name, buffer


def must_hold(weights: Weights, module: nn.Module) -> None:
    """Raise UserError if a parameter or a buffer of the state is not among the weights."""
    names = set(weights.names)
    for name, _ in named_state(module):
        if name not in names:
            raise UserError(
                f"{weights.path} must hold {name}, but does not: it is of another model or "
                "not whole."
            )


@torch.no_grad()
def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy the tensors into a module. Raises UserError where one is missing or of another
    shape."""
    must_hold(weights, module)
    for name, own in named_state(module):
        stored = weights[name]
        if stored.shape != own.shape:
            raise UserError(
                f"{weights.path} must fit its settings, but {name} is "
                f"{tuple(stored.shape)} where the model has {tuple(own.shape)}."
            )
        own.copy_(stored)
