"""The index of a shard folder: every clip's place, length and text, known before a byte
of video is read.

A shard folder holds, beside its ordinary WebDataset tars,
    index.json           corpus, build options, and each split's tars with sizes and sha256
    {split}.safetensors  one row a clip, as columns (see `COLUMNS` and `STRING_COLUMNS`)
Both are plain data: nothing in them can execute. A million clips load in well under a second.

A folder of kind "features" (launch/features.py) has the rows of the video shards it was
made from, in their order and with their shard numbers. For each of those shards it holds
one tar a view.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flallm_ds.data.storage.store import (
    CacheOptions,
    LocalStore,
    Store,
    checked_name,
    is_count,
    open_store,
)
from flallm_ds.data.storage.store import Shard as Shard
from flallm_ds.data.table_check import check_table
from flallm_ds.errors import UserError
from flallm_ds.features.facts import FeatureFacts
from flallm_ds.files import file_sha256, open_regular

FORMAT = "flallm_ds shards 1"
MAX_MANIFEST_BYTES = 2**28  # of index.json; a tar takes 150: more than a million of them

COLUMNS: dict[str, Any] = {
    "shard": np.int32,  # row of the split's list of tars
    "offset": np.int64,  # of the clip's bytes (video, or features) within the tar
    "size": np.int64,  # of these, bytes
    "num_frames": np.int32,  # as decoded, never as the container's metadata says
    "height": np.int32,  # of a stored frame, pixels
    "width": np.int32,
    "fps": np.float32,
}
# id: the corpus's own; key: dot-free
STRING_COLUMNS = ("key", "id", "text", "signer", "video", "language")


class StringColumn(Sequence[str]):
    """Strings as one UTF-8 blob and their ends: a million texts cost no Python objects
    until one is read."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:
        begin = int(self._ends[row - 1]) if row > 0 else 0
        return self._blob[begin : int(self._ends[row])].tobytes().decode("utf-8")

    @staticmethod
    def columns(name: str, strings: Sequence[str]) -> dict[str, np.ndarray]:
        """The two arrays that hold `strings`, by their names in the file."""
        encoded = [string.encode("utf-8") for string in strings]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}_ends": ends}


class Table(Mapping[str, np.ndarray]):
    """A table's columns, each read when it is first asked for: a run needs neither
    signers nor videos."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = safe_open(path, framework="np")
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._read:
            self._read[name] = self.read(name)
        return self._read[name]

    def read(self, name: str) -> np.ndarray:
        """Read a column without keeping it. Raises TypeError where numpy does not have
        its type."""
        if name not in self._file.keys():  # noqa: SIM118 - it is no mapping
            raise KeyError(name)
        try:
            column: np.ndarray = self._file.get_tensor(name)
        except AttributeError as error:  # of safetensors, which looks for float8 in numpy
            raise TypeError(
                f"column {name} must be of a type of numpy, but {error}"
            ) from error
        return column

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self._path,)


@dataclass(frozen=True)
class Index:
    """One split of a shard folder. Columns are arrays of length `len(index)`, one entry a clip.

    shards: all tars; of features, the views of a shard are next to each other, and
    `views` counts them. fingerprint: of the clips, which the order comes from; of
    features, that of the video they were made from. features: what they are, one entry a
    folder; empty for video.
    """

    store: Store
    corpus: str
    split: str
    fingerprint: str
    shards: tuple[Shard, ...]
    arrays: Mapping[str, np.ndarray]
    # of build.py, if one build made all
    options: dict[str, Any] = field(default_factory=dict)
    # of joined shard folders; `arrays["corpus"]` numbers them
    corpora: tuple[str, ...] = ()
    features: tuple[FeatureFacts, ...] = ()
    # read `views_of_shard`, which has ones where this is None
    views: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.arrays["num_frames"])

    @property
    def num_frames(self) -> np.ndarray:
        """Frames of each clip, int32 of shape (clips,)."""
        return self.arrays["num_frames"]

    @cached_property
    def frame_hw(self) -> tuple[int, int]:
        """(height, width) of the smallest canvas that holds a frame of any clip, pixels."""
        return int(self.arrays["height"].max()), int(self.arrays["width"].max())

    def corpus_of(self, row: int) -> str:
        """Return the corpus that a clip belongs to."""
        return (
            self.corpora[int(self.arrays["corpus"][row])] if self.corpora else self.corpus
        )

    def own_row(self, row: int) -> int:
        """Return the clip's row in its own folder.

        Its random numbers come from that row, whatever is joined to the folder.
        """
        return int(self.arrays["own_row"][row]) if self.corpora else row

    def features_of(self, row: int) -> FeatureFacts:
        """Return what the clip's features are."""
        return self.features[int(self.arrays["corpus"][row]) if self.corpora else 0]

    @property
    def features_digest(self) -> str:
        """Sixteen hex digits that differ whenever a byte of the features does; empty for
        video."""
        if not self.features:
            return ""
        digests = "+".join(facts.digest for facts in self.features)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    @cached_property
    def views_of_shard(self) -> np.ndarray:
        """Tars of each shard number, int (shards,): one of video, one for each view of
        features."""
        return np.ones(len(self.shards), np.int64) if self.views is None else self.views

    @property
    def num_shards(self) -> int:
        """How many shard numbers there are; of features there are more tars."""
        return len(self.views_of_shard)

    @cached_property
    def _first_tar(self) -> np.ndarray:
        """Place in `shards` of the first tar of each shard number."""
        first: np.ndarray = np.cumsum(self.views_of_shard) - self.views_of_shard
        return first

    def tars(self, rows: Any, passes: Any) -> Any:
        """Return the places in `shards` of clips that came so often before.

        rows, passes: int, or int arrays of one shape. Each pass reads the next view.
        """
        shard = self.arrays["shard"][rows]
        view = passes % self.views_of_shard[shard]
        return self._first_tar[shard] + view

    def tar(self, row: int, passes: int = 0) -> Shard:
        """Return the tar of a clip that came so often before."""
        return self.shards[int(self.tars(row, passes))]

    def strings(self, name: str) -> StringColumn:
        """A string column (one of `STRING_COLUMNS`), decoded row by row when read."""
        return StringColumn(self.arrays[name], self.arrays[f"{name}_ends"])

    @property
    def root(self) -> str:
        """The folder or address, for people."""
        return self.store.root

    def shard_path(self, row: int) -> Path:
        """Where a tar of a local folder lies. Raises UserError where the shards are remote."""
        if not isinstance(self.store, LocalStore):
            raise UserError(
                f"shards must lie in a folder to have paths, but lie in {self.root}."
            )
        return self.store.file(self.shards[row].file)

    def check_files(self, checksums: bool = False) -> None:
        """Raise UserError if a tar is missing or is not of the size (if asked: the
        sha256) recorded."""
        self.store.check(self.shards, checksums)


def read_manifest(root: str | Path | Store) -> dict[str, Any]:
    """The folder's index.json. Raises UserError where there is none, or where it is not
    as it was written."""
    store = open_store(root) if isinstance(root, str | Path) else root
    path = store.file("index.json")
    if not path.is_file():
        raise UserError(
            f"a shard folder must hold index.json, but there is none in {store.root}. "
            "Make shards with python shards/build.py, or name another folder."
        )
    try:
        with open_regular(path) as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        if len(content) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it is larger than {MAX_MANIFEST_BYTES:,} bytes")
        manifest: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"index.json must be JSON, but {error}: {path}. Build the shards again."
        ) from error
    except OSError as error:
        raise UserError(
            f"index.json must be readable, but {error.strerror}: {path}. Name another "
            "folder."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(
            f"index.json must have format {FORMAT!r}, but has {found!r}: {path}. Build the "
            "shards again."
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"index.json must be as it was written, but is not ({error}): {path}. Build "
            "the shards again."
        ) from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, AttributeError or UserError unless every field is of its
    type."""
    if not isinstance(manifest["corpus"], str):
        raise TypeError("corpus")
    for name, kind in (("language", str), ("options", dict), ("skipped", dict)):
        if not isinstance(manifest.get(name, kind()), kind):
            raise TypeError(name)
    for name in manifest.get("replaced", ()):
        checked_name(name)
    if not manifest["splits"]:
        raise KeyError("splits")
    tars: set[str] = set()
    for split, entry in manifest["splits"].items():
        checked_name(split)
        checked_name(entry["table"])
        if not all(is_count(entry[name]) for name in ("clips", "frames")):
            raise TypeError(f"clips and frames of {split}")
        if not isinstance(entry["table_sha256"], str):
            raise TypeError(f"table_sha256 of {split}")
        if not isinstance(entry["shards"], list):
            raise TypeError(f"shards of {split}")
        for shard in entry["shards"]:
            file = Shard(**shard).file
            if file in tars:
                raise TypeError(f"{file} twice")
            tars.add(file)


def load_index(root: str | Path, split: str, cache: CacheOptions | None = None) -> Index:
    """The index of one split.

    root: a folder, or an address of `open_store`, whose shards pass through the cache.
    Raises UserError if the folder is no shard folder, has no such split, or its table was
    changed since or holds what no clip can be.
    """
    store = open_store(root, cache)
    manifest = read_manifest(store)
    if split not in manifest["splits"]:
        raise UserError(
            f"split must be one of {', '.join(manifest['splits'])}, but is {split!r} "
            f"for shards in {store.root}."
        )
    entry = manifest["splits"][split]
    path = store.file(entry["table"], entry["table_sha256"])
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    facts = None
    if manifest.get("kind") == FeatureFacts.KIND:
        facts = FeatureFacts.load(manifest, entry, store.root, fingerprint(entry))
    arrays = _open_table(path, split, entry["table_sha256"], shards, facts)
    index = Index(
        store=store,
        corpus=manifest["corpus"],
        split=split,
        fingerprint=fingerprint(entry),
        shards=shards,
        arrays=arrays,
        options=manifest.get("options", {}),
    )
    if facts is None:
        return index
    views = np.full(len(shards) // facts.views, facts.views)
    return replace(
        index, fingerprint=entry["source_fingerprint"], features=(facts,), views=views
    )


def _open_table(
    path: Path, split: str, sha256: str, shards: Sequence[Shard], facts: FeatureFacts | None
) -> Table:
    """A split's table, checked. Raises UserError where it is another one, or says what
    cannot be."""
    try:
        if not path.is_file() or file_sha256(path) != sha256:
            raise UserError(
                f"the table of split {split} must be the one that index.json names, but it "
                f"is missing or was changed: {path}. Build the shards again."
            )
        arrays = Table(path)
        wanted = (*COLUMNS, *STRING_COLUMNS, *(f"{name}_ends" for name in STRING_COLUMNS))
        # not kept
        columns = {name: arrays.read(name) for name in wanted if name in set(arrays)}
        sizes = np.array([shard.bytes for shard in shards], np.int64)
        if facts is None:
            check_table(columns, COLUMNS, STRING_COLUMNS, sizes, is_video=True)
        else:
            smallest = sizes.reshape(-1, facts.views).min(axis=1)
            check_table(columns, COLUMNS, STRING_COLUMNS, smallest, is_video=False)
            facts.check_sizes(columns["num_frames"], columns["fps"], columns["size"])
    except OSError as error:
        raise UserError(
            f"the table of split {split} must be readable, but {error.strerror}: {path}. "
            "Name another folder."
        ) from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(
            f"the table of split {split} must describe clips: {error}, in {path}. Do not "
            "use these shards, or build them again."
        ) from error
    return arrays


def write_table(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write one split's rows (a dict of every column each) and return what index.json
    must say of it."""
    arrays = {}
    for name, dtype in COLUMNS.items():
        arrays[name] = np.asarray([row[name] for row in rows], dtype=dtype)
    for name in STRING_COLUMNS:
        arrays |= StringColumn.columns(name, [row[name] for row in rows])
    return write_arrays(path, arrays)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`write_table` of columns that are there already."""
    # Not save_file: a kill leaves its temporary file (.tmpXXXXXX) in the folder, and in
    # what is published.
    path.write_bytes(save(dict(arrays)))
    return {
        "table": path.name,
        "table_sha256": file_sha256(path),
        "clips": len(arrays["num_frames"]),
        "frames": int(arrays["num_frames"].sum()),
    }


def check_video(
    manifest: Mapping[str, Any],
    root: str | Path,
    what: str,
    to_do: str = "Name those shards",
) -> None:
    """Raise UserError unless a folder's clips are video. what: that which needs it."""
    if manifest.get("kind") == FeatureFacts.KIND:
        raise UserError(
            f"{what} needs shards of video, but {root} holds features of "
            f"{manifest['features']['source']}. {to_do}."
        )


def fingerprint(entry: dict[str, Any]) -> str:
    """Sixteen hex digits that differ whenever a split's clips, order or bytes do."""
    content = [entry["table_sha256"], [shard["sha256"] for shard in entry["shards"]]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def iter_rows(index: Index) -> Iterator[dict[str, Any]]:
    """Every clip of the split as a dict of plain values, in stored order."""
    strings = {name: index.strings(name) for name in STRING_COLUMNS}
    for row in range(len(index)):
        numbers = {name: index.arrays[name][row].item() for name in COLUMNS}
        yield numbers | {name: column[row] for name, column in strings.items()}
