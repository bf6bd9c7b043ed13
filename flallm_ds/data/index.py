"""The index of a shard folder: offset, length and text of every clip, without reading video.

A shard folder contains ordinary WebDataset tars and
    index.json           corpus, build options, and the tars of each split with sizes and sha256
    {split}.safetensors  a table with one row per clip (see `COLUMNS` and `STRING_COLUMNS`)
Both are plain data: nothing in them can execute. A million clips load in well under a second.

A folder of cached features has the same rows as its video shards, and one tar per shard
and view. A view is one random choice of frames and augmentations.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    "shard": np.int32,  # position of the tar in the list of the split
    "offset": np.int64,  # of the bytes of the clip (video or features) within the tar
    "size": np.int64,  # number of those bytes
    "num_frames": np.int32,  # decoded frames; the metadata of a container may be wrong
    "height": np.int32,  # of a stored frame, pixels
    "width": np.int32,
    "fps": np.float32,
}
# id: as in the corpus; key: unique in the split and without dots
STRING_COLUMNS = ("key", "id", "text", "signer", "video", "language")


class StringColumn(Sequence[str]):
    """Store strings as one UTF-8 blob and the end of each: a Python object is created only
    for a string that is read."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:
        # Row n is between the end of row n - 1 and its own end.
        begin = int(self._ends[row - 1]) if row > 0 else 0
        return self._blob[begin : int(self._ends[row])].tobytes().decode("utf-8")

    @staticmethod
    def columns(name: str, strings: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the two arrays that store `strings`, by their names in the file."""
        encoded = [string.encode("utf-8") for string in strings]
        ends = np.cumsum(list(map(len, encoded)), dtype=np.int64)
        return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}_ends": ends}


class Table(Mapping[str, np.ndarray]):
    """The columns of a table, each read at its first use: training needs neither signers
    nor video names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = safe_open(path, framework="np")
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        # Memory-mapped by safetensors: a column costs memory only when it is read.
        if name not in self._read:
            self._read[name] = self.read(name)
        return self._read[name]

    def read(self, name: str) -> np.ndarray:
        """Read a column without keeping it.

        Raises KeyError if there is no such column, TypeError if numpy lacks its type.
        """
        if name not in self._file.keys():  # noqa: SIM118 - not a mapping
            raise KeyError(name)
        try:
            column: np.ndarray = self._file.get_tensor(name)
        except AttributeError as error:  # safetensors looks for float8 in numpy
            raise TypeError(
                f"column {name} must have a data type of numpy, got {error}"
            ) from error
        return column

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    # Pickled as its path: worker processes of a build open the file themselves.
    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self._path,)


@dataclass(frozen=True)
class Index:
    """One split of a folder of video shards, or of several joined folders.

    Columns are arrays of length `len(index)`, one entry per clip. fingerprint: changes
    with the clips; the order of an epoch is drawn from it. options: of the build. corpora:
    names of joined folders, which `arrays["corpus"]` numbers; empty for one folder.
    """

    store: Store
    corpus: str
    split: str
    fingerprint: str
    shards: tuple[Shard, ...]
    arrays: Mapping[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    corpora: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["num_frames"])

    @property
    def num_frames(self) -> np.ndarray:
        """Frames of each clip, int32 of shape (clips,)."""
        return self.arrays["num_frames"]

    @cached_property
    def frame_hw(self) -> tuple[int, int]:
        """(height, width) of the smallest canvas that fits the frames of all clips, pixels."""
        return int(self.arrays["height"].max()), int(self.arrays["width"].max())

    def corpus_of(self, row: int) -> str:
        """Return the name of the corpus of a clip."""
        if not self.corpora:
            return self.corpus
        return self.corpora[int(self.arrays["corpus"][row])]

    def own_row(self, row: int) -> int:
        """Return the row of a clip in its own folder.

        The random numbers of the clip are drawn from that row, so that they do not change
        when other folders are joined.
        """
        return int(self.arrays["own_row"][row]) if self.corpora else row

    @property
    def features_digest(self) -> str:
        """The digest of the cached features; empty for video."""
        return ""

    @property
    def num_shards(self) -> int:
        """Number of shards; cached features have several tars per shard."""
        return len(self.shards)

    def tars(self, rows: Any, passes: Any) -> Any:
        """Return the positions in `shards` of the tars of clips.

        rows, passes: int, or int arrays of one shape. passes: how often each clip came
        before; each pass reads the next view of cached features.
        """
        return self.arrays["shard"][rows]

    def tar(self, row: int, passes: int = 0) -> Shard:
        """Return the tar of one clip. passes: as in `tars`."""
        return self.shards[int(self.tars(row, passes))]

    def strings(self, name: str) -> StringColumn:
        """Return a string column (one of `STRING_COLUMNS`); a string is decoded when read."""
        return StringColumn(self.arrays[name], self.arrays[f"{name}_ends"])

    @property
    def root(self) -> str:
        """The folder or address, for messages."""
        return self.store.root

    def shard_path(self, row: int) -> Path:
        """Return the path of a tar of a local folder. Raises UserError for remote shards."""
        if not isinstance(self.store, LocalStore):
            raise UserError(f"The shards must be in a local folder, got {self.root}.")
        return self.store.file(self.shards[row].file)

    def check_files(self, checksums: bool = False) -> None:
        """Raise UserError if a tar is missing or differs from the recorded size.

        checksums: compare the sha256, too.
        """
        self.store.check(self.shards, checksums)


@dataclass(frozen=True)
class FeatureIndex(Index):
    """One split of a folder of cached features, or of several joined folders.

    fingerprint: that of the video, so that the order of an epoch is the same. shards: the
    views of a shard are next to each other. features: one entry per folder. views: number
    of tars of each shard, int (shards,).
    """

    features: tuple[FeatureFacts, ...] = ()
    views: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def features_of(self, row: int) -> FeatureFacts:
        """Return the description of the features of a clip."""
        return self.features[int(self.arrays["corpus"][row]) if self.corpora else 0]

    @property
    def features_digest(self) -> str:
        """Sixteen hex digits that change with any byte of the features."""
        digests = "+".join(facts.digest for facts in self.features)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    @property
    def num_shards(self) -> int:
        return len(self.views)

    @cached_property
    def _first_tar(self) -> np.ndarray:
        """Position in `shards` of the first tar of each shard."""
        first: np.ndarray = np.cumsum(self.views) - self.views
        return first

    def tars(self, rows: Any, passes: Any) -> Any:
        shard = self.arrays["shard"][rows]
        view = passes % self.views[shard]
        return self._first_tar[shard] + view


def read_manifest(root: str | Path | Store) -> dict[str, Any]:
    """Read index.json of a shard folder. Raises UserError if it is missing or damaged."""
    store = open_store(root) if isinstance(root, str | Path) else root
    path = store.file("index.json")
    if not path.is_file():
        raise UserError(
            f"A shard folder must contain index.json, got {store.root}. Build shards with "
            "python shards/build.py, or name another folder."
        )
    try:
        # Limit the size before parsing: the folder may come from anybody.
        with open_regular(path) as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        if len(content) > MAX_MANIFEST_BYTES:
            raise ValueError(f"the file is larger than {MAX_MANIFEST_BYTES:,} bytes")
        manifest: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {path} as JSON: {error}. Build the shards again."
        ) from error
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}. Name another folder."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(
            f"index.json must have format {FORMAT!r}, got {found!r} in {path}. Build the "
            "shards again."
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot use {path}: a field is missing or has a wrong type ({error}). Build "
            "the shards again."
        ) from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, AttributeError or UserError for a missing or wrong field."""
    if not isinstance(manifest["corpus"], str):
        raise TypeError("corpus")
    for name, kind in (("language", str), ("options", dict), ("skipped", dict)):
        if not isinstance(manifest.get(name, kind()), kind):
            raise TypeError(name)
    for name in manifest.get("replaced", ()):
        checked_name(name)
    if not manifest["splits"]:
        raise KeyError("splits")
    # File names must be plain, so that no entry can point outside the folder.
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
    """Load the index of one split: an `Index`, or a `FeatureIndex` for cached features.

    root: a folder, or an address for `open_store`, whose shards are read through the
    cache. Raises UserError if this is not a shard folder, if it has no such split, or if
    the table of the split was changed or describes impossible clips.
    """
    # Every file is checked before its content is used.
    store = open_store(root, cache)
    manifest = read_manifest(store)
    if split not in manifest["splits"]:
        raise UserError(
            f"split must be one of {', '.join(manifest['splits'])} for the shards in "
            f"{store.root}, got {split!r}."
        )
    entry = manifest["splits"][split]
    path = store.file(entry["table"], entry["table_sha256"])
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    facts = None
    if manifest.get("kind") == FeatureFacts.KIND:
        facts = FeatureFacts.load(manifest, entry, store.root, fingerprint(entry))
    arrays = _open_table(path, split, entry["table_sha256"], shards, facts)
    if facts is None:
        return Index(
            store=store,
            corpus=manifest["corpus"],
            split=split,
            fingerprint=fingerprint(entry),
            shards=shards,
            arrays=arrays,
            options=manifest.get("options", {}),
        )
    return FeatureIndex(
        store=store,
        corpus=manifest["corpus"],
        split=split,
        fingerprint=entry["source_fingerprint"],
        shards=shards,
        arrays=arrays,
        options=manifest.get("options", {}),
        features=(facts,),
        views=np.full(len(shards) // facts.views, facts.views),
    )


def _open_table(
    path: Path, split: str, sha256: str, shards: Sequence[Shard], facts: FeatureFacts | None
) -> Table:
    """Open the table of a split and check it. Raises UserError if it was changed or
    describes impossible clips."""
    try:
        if not path.is_file() or file_sha256(path) != sha256:
            raise UserError(
                f"Cannot use the table of split {split}, {path}: it is missing or was "
                "changed after index.json was written. Build the shards again."
            )
        arrays = Table(path)
        wanted = (*COLUMNS, *STRING_COLUMNS, *(f"{name}_ends" for name in STRING_COLUMNS))
        # Read for the check only: most columns are not used again.
        columns = {}
        for name in wanted:
            if name in set(arrays):
                columns[name] = arrays.read(name)
        sizes = np.array([shard.bytes for shard in shards], np.int64)
        if facts is None:
            check_table(columns, COLUMNS, STRING_COLUMNS, sizes, is_video=True)
        else:
            # All views of a shard have the same offsets, so the smallest tar limits them.
            smallest = sizes.reshape(-1, facts.views).min(axis=1)
            check_table(columns, COLUMNS, STRING_COLUMNS, smallest, is_video=False)
            facts.check_sizes(columns["num_frames"], columns["fps"], columns["size"])
    except OSError as error:
        raise UserError(
            f"Cannot read the table of split {split}, {path}: {error.strerror}. Name "
            "another folder."
        ) from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(
            f"Cannot use the table of split {split}, {path}: {error}. Build the shards "
            "again."
        ) from error
    return arrays


def write_table(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the rows of a split, each a dict of all columns.

    Returns the entry of the table for index.json.
    """
    arrays = {}
    for name, dtype in COLUMNS.items():
        arrays[name] = np.asarray([row[name] for row in rows], dtype=dtype)
    for name in STRING_COLUMNS:
        arrays |= StringColumn.columns(name, [row[name] for row in rows])
    return write_arrays(path, arrays)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write columns, as `write_table` does rows."""
    # Not save_file: after a kill its temporary file (.tmpXXXXXX) would stay in the folder
    # and be published with it.
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
    """Raise UserError unless the clips of a folder are video. what: names the caller."""
    if manifest.get("kind") == FeatureFacts.KIND:
        raise UserError(
            f"{what} must be given video shards, got {root} with cached features of "
            f"{manifest['features']['source']}. {to_do}."
        )


def fingerprint(entry: dict[str, Any]) -> str:
    """Return 16 hex digits that change with the clips of a split, their order or bytes."""
    content = [entry["table_sha256"], [shard["sha256"] for shard in entry["shards"]]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def iter_rows(index: Index) -> Iterator[dict[str, Any]]:
    """Yield each clip of the split as a dict of plain values, in stored order."""
    strings = {name: index.strings(name) for name in STRING_COLUMNS}
    for row in range(len(index)):
        numbers = {name: index.arrays[name][row].item() for name in COLUMNS}
        yield numbers | {name: column[row] for name, column in strings.items()}
