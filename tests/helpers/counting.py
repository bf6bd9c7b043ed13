"""Counts the bytes that a rank reads from the tensors of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flallm_ds.training import fragment_files


class Counts:
    """`with Counts() as counts`. verified: bytes of whole tensors. restored: of slices.

    opened: the files from which slices were read.
    """

    def __init__(self) -> None:
        self.verified = self.restored = 0
        self.opened: set[str] = set()

    def __enter__(self) -> "Counts":
        fragment_files.safe_open = self._open
        return self

    def __exit__(self, *error: object) -> None:
        fragment_files.safe_open = safe_open

    def _open(self, path: Path, framework: str) -> "_File":
        return _File(safe_open(path, framework=framework), path.name, self)


class _File:
    """What `safe_open` returns, with counts."""

    def __init__(self, file: Any, name: str, counts: Counts) -> None:
        self._file, self._name, self._counts = file, name, counts
        self.keys, self.metadata = file.keys, file.metadata

    def __enter__(self) -> "_File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        self._counts.verified += tensor.nbytes
        return tensor

    def get_slice(self, name: str) -> "_Slice":
        self._counts.opened.add(self._name)
        return _Slice(self._file.get_slice(name), self._counts)


class _Slice:
    def __init__(self, part: Any, counts: Counts) -> None:
        self._part, self._counts = part, counts
        self.get_shape = part.get_shape

    def __getitem__(self, place: slice) -> torch.Tensor:
        values: torch.Tensor = self._part[place]
        self._counts.restored += values.nbytes
        return values
