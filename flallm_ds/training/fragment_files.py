"""Files of fragments: safetensors with a checksum for each MiB, read in parts.

A rank writes `rank-00003.000.safetensors`, and further files `.001` ... if it owns more
than FILE_BYTES. The tensors are one-dimensional and named `kind|parameter|begin`. The
metadata hold the checksums, and the manifest of the checkpoint holds a checksum of each
header. So every byte can be verified, by any rank.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flallm_ds.files import sync
from flallm_ds.training.fragments import MASTER, Key

FILE_BYTES = 2**30  # of one file, so that the copy for its writing stays small
CHUNK_BYTES = 2**20  # of one checksum
SUMS = "sha256_per_mib"  # in the metadata: {tensor: [checksum of each chunk]}


@dataclass(frozen=True)
class FragmentFile:
    """A file in the manifest of a checkpoint.

    sha256: of its header. spans: (first, last + 1) element of each parameter in it.
    """

    name: str
    bytes: int
    sha256: str
    kinds: tuple[str, ...]
    spans: dict[str, tuple[int, int]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "FragmentFile":
        """Read what `as_json` returned. Raises KeyError, TypeError or ValueError."""
        spans = {}
        for parameter, (begin, end) in entry["spans"].items():
            spans[parameter] = (int(begin), int(end))
        name = str(entry["name"])
        if Path(name).name != name:
            raise ValueError(name)
        return cls(
            name, int(entry["bytes"]), str(entry["sha256"]), tuple(entry["kinds"]), spans
        )


def write_fragments(
    folder: Path, rank: int, fragments: Iterable[tuple[Key, torch.Tensor]]
) -> list[FragmentFile]:
    """Write the fragments of a rank; return its files. Raises OSError or RuntimeError."""
    files: list[FragmentFile] = []
    waiting: dict[Key, torch.Tensor] = {}
    waiting_bytes = 0
    for key, tensor in fragments:
        if waiting and waiting_bytes + tensor.nbytes > FILE_BYTES:
            files.append(_write(folder, f"rank-{rank:05d}.{len(files):03d}", waiting))
            waiting, waiting_bytes = {}, 0
        waiting[key] = tensor
        waiting_bytes += tensor.nbytes
    if waiting:
        files.append(_write(folder, f"rank-{rank:05d}.{len(files):03d}", waiting))
    return files


def _write(folder: Path, stem: str, tensors: dict[Key, torch.Tensor]) -> FragmentFile:
    path = folder / f"{stem}.safetensors"
    named: dict[str, torch.Tensor] = {}
    sums: dict[str, list[str]] = {}
    spans: dict[str, tuple[int, int]] = {}
    for key, tensor in tensors.items():
        name = _name(key.kind, key.parameter, key.begin)
        named[name] = tensor
        sums[name] = _checksums(tensor)
        begin, end = spans.get(key.parameter, (key.begin, key.end))
        spans[key.parameter] = min(begin, key.begin), max(end, key.end)
    save_file(named, path, metadata={SUMS: json.dumps(sums)})
    sync(path)
    kinds = tuple(sorted({key.kind for key in tensors}))
    return FragmentFile(path.name, path.stat().st_size, _header_sha256(path), kinds, spans)


def _name(kind: str, parameter: str, begin: int) -> str:
    return f"{kind}|{parameter}|{begin}"


def _checksums(tensor: torch.Tensor) -> list[str]:
    """Return the checksum of each chunk of a tensor; 16 hex digits are enough for faults."""
    content = tensor.contiguous().view(torch.uint8).numpy().data
    sums = []
    for begin in range(0, len(content), CHUNK_BYTES):
        chunk = content[begin : begin + CHUNK_BYTES]
        sums.append(hashlib.sha256(chunk).hexdigest()[:16])
    return sums


def _header_sha256(path: Path) -> str:
    """Return the sha256 of the header of a safetensors file. Raises OSError, ValueError."""
    with path.open("rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        return hashlib.sha256(length + file.read(size)).hexdigest()


class FragmentReader:
    """Reads fragments from the files of a checkpoint, and no more than their bytes."""

    def __init__(self, folder: Path, files: Sequence[FragmentFile]) -> None:
        self.folder, self.files = folder, files
        self._opened: dict[str, Any] = {}

    @property
    def kinds(self) -> list[str]:
        kinds: set[str] = set()
        for file in self.files:
            kinds.update(file.kinds)
        return sorted(kinds)

    def read(self, key: Key, out: torch.Tensor) -> None:
        """Copy the elements of a key into `out`, which keeps its data type.

        Optimizer state that was not saved stays unchanged: the optimizer had none. Raises
        ValueError if the checkpoint lacks an element of a parameter.
        """
        found = 0
        for file in self.files:
            begin, end = file.spans.get(key.parameter, (0, 0))
            if key.kind in file.kinds and begin < key.end and key.begin < end:
                found += self._read_from(file, key, out)
        if found != key.end - key.begin and (found or key.kind == MASTER):
            raise ValueError(
                f"{key.parameter} must have {key.end - key.begin:,} saved elements of "
                f"{key.kind} from {key.begin:,}, got {found:,}"
            )

    def _read_from(self, file: FragmentFile, key: Key, out: torch.Tensor) -> int:
        """Copy the elements of a key that one file holds; return their number."""
        opened = self._open(file)
        found = 0
        for name in opened.names[key.kind, key.parameter]:
            first = int(name.rsplit("|", 1)[1])
            part = opened.file.get_slice(name)
            (length,) = part.get_shape()
            begin, end = max(key.begin, first), min(key.end, first + length)
            if begin >= end:
                continue
            values = part[begin - first : end - first]
            out.narrow(0, begin - key.begin, end - begin).copy_(values)
            found += end - begin
        return found

    def _open(self, file: FragmentFile) -> "_Opened":
        if file.name not in self._opened:
            self._opened[file.name] = _Opened(self.folder / file.name)
        opened: _Opened = self._opened[file.name]
        return opened

    def close(self) -> None:
        """Close all files."""
        self._opened.clear()

    def verify(self, file: FragmentFile) -> str | None:
        """Check every byte of a file. Returns what is wrong, or None."""
        path = self.folder / file.name
        try:
            if not path.is_file():
                return "is missing"
            if path.stat().st_size != file.bytes or _header_sha256(path) != file.sha256:
                return "was changed"
            opened: Any
            with safe_open(path, framework="pt") as opened:
                sums = json.loads(opened.metadata()[SUMS])
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensor = opened.get_tensor(name)
                    if _checksums(tensor) != sums[name]:
                        return "was changed"
        except (OSError, ValueError, RecursionError, KeyError, SafetensorError) as error:
            return f"cannot be read ({error})"
        return None


class _Opened:
    """An open file, and its tensors by kind and parameter."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self.file = file
        self.names: dict[tuple[str, str], list[str]] = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            kind, parameter, _ = name.split("|")
            self.names.setdefault((kind, parameter), []).append(name)
