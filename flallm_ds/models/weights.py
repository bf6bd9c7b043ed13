"""Write and read weights as safetensors files, tensor by tensor, without a second copy.

There is one file `model.safetensors`, or several files `model-00001-of-00003.safetensors`
... with `model.safetensors.index.json`: the layout that transformers reads.
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

# Largest size of a file, unless a single tensor is larger.
FILE_BYTES = 2 * 10**9


class WeightsWriter:
    """Write tensors one by one: `with WeightsWriter(folder) as writer: writer.add(...)`.

    At most file_bytes are held in memory. The files get their final names at the end, so
    that an unfinished folder cannot be loaded.
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
        """Add a tensor, which must not change until the writer is closed."""
        size = tensor.numel() * tensor.element_size()
        # A single tensor may be larger than a file, and then gets its own.
        if self._waiting and self._waiting_bytes + size > self.file_bytes:
            self._flush()
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._waiting_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        """Write the waiting tensors to a file with a temporary name."""
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
        # After an error the files keep their temporary names.
        if error is not None:
            return
        if self._waiting or not self._files:
            self._flush()
        # One file has no number and no index.
        if len(self._files) == 1:
            self._files[0][0].rename(self.folder / self.name)
            return
        # Several files: number them, and write an index of the tensor names.
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
    """Write all tensors of an iterable of (name, tensor)."""
    with WeightsWriter(folder, name, file_bytes) as writer:
        for key, tensor in tensors:
            writer.add(key, tensor)


class Weights:
    """Read weights that `WeightsWriter` or transformers wrote, each tensor on request.

    Raises UserError with the file's name for a file that is missing, truncated or damaged.
    """

    def __init__(self, folder: Path, name: str = "model.safetensors") -> None:
        self.path = folder / name
        index = folder / f"{name}.index.json"
        # Without an index the tensors are in one file.
        files = [name]
        if not self.path.is_file() and index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(places.values()))
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise UserError(
                    f"Cannot read {index}: it is not an index of safetensors files ({error}). "
                    "Fetch or export the weights again."
                ) from None
        self._files = [(folder / file, _open(folder / file)) for file in files]
        # The number of the file that holds each tensor.
        self._places: dict[str, int] = {}
        for number, (_, opened) in enumerate(self._files):
            self._places |= dict.fromkeys(opened.keys(), number)

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor on the host. Raises KeyError for an unknown name."""
        path, file = self._files[self._places[name]]
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise _unreadable(path, error) from error
        return tensor

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), one tensor in memory at a time."""
        for name in self._places:
            yield name, self[name]


def _open(path: Path) -> Any:
    """Open a safetensors file. Raises UserError if it is missing, truncated or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a safetensors file that cannot be read."""
    return UserError(
        f"Cannot read {path}: it is not a complete safetensors file ({error}). Fetch or "
        "export the weights again."
    )


def named_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters (tied ones by their first name), then persistent buffers."""
    yield from module.named_parameters()
    # Other buffers are computed and not stored.
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield name, buffer


def must_hold(weights: Weights, module: nn.Module) -> None:
    """Raise UserError if a parameter or a persistent buffer is missing in the weights."""
    names = set(weights.names)
    for name, _ in named_state(module):
        if name not in names:
            raise UserError(
                f"Cannot load {weights.path}: {name} is missing, so the file is incomplete "
                "or of another model. Fetch or export the weights again."
            )


@torch.no_grad()
def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy the weights into a module.

    Raises UserError if a tensor is missing or has another shape.
    """
    must_hold(weights, module)
    for name, own in named_state(module):
        stored = weights[name]
        if stored.shape != own.shape:
            raise UserError(
                f"Cannot load {weights.path}: {name} has the shape {tuple(stored.shape)}, and "
                f"{tuple(own.shape)} by the settings of the model. Fetch or export both again."
            )
        own.copy_(stored)
