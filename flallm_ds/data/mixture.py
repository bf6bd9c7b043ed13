"""Join several shard folders into one split; each clip keeps its corpus and language."""

import hashlib
from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flallm_ds.data.index import (
    COLUMNS,
    STRING_COLUMNS,
    FeatureIndex,
    Index,
    Shard,
    StringColumn,
    load_index,
)
from flallm_ds.data.storage.store import CacheOptions, Store
from flallm_ds.data.text.languages import language_tag
from flallm_ds.errors import UserError
from flallm_ds.features.facts import FeatureFacts


def open_indexes(
    shards: str | Path | Sequence[str | Path], split: str, cache: CacheOptions | None = None
) -> Index:
    """Open the index of one split of one shard folder (or address), or of several joined.

    Languages become tags (de, zh-Hant), whatever names the folders use. Raises UserError
    as `load_index` does, or if a folder is given twice, if video is mixed with features,
    or if a language is unknown.
    """
    roots = [shards] if isinstance(shards, str | Path) else list(shards)
    if not roots:
        raise UserError(
            "data.shards must name a shard folder, got none. Give --data.shards=FOLDER."
        )
    names = list(map(str, roots))
    if len(set(names)) < len(names):
        raise UserError(
            f"data.shards must name each shard folder once, got {', '.join(names)}. Use "
            "--data.weights to give a corpus more weight."
        )
    indexes = []
    root_of_kind: dict[str, str] = {}
    for root in roots:
        index = with_language_tags(load_index(root, split, cache))
        if not len(index):
            raise UserError(
                f"Split {split} must contain a clip, got none in {index.root}. Build it "
                "with clips, or name another folder."
            )
        indexes.append(index)
        kind = "features" if isinstance(index, FeatureIndex) else "video"
        root_of_kind[kind] = index.root
    if len(root_of_kind) > 1:
        raise UserError(
            "data.shards must be all video or all cached features, got video in "
            f"{root_of_kind['video']} and features in {root_of_kind['features']}. Write "
            "features of all with launch/features.py."
        )
    return indexes[0] if len(indexes) == 1 else join(indexes)


def with_language_tags(index: Index) -> Index:
    """Return the index with the language of each clip as a tag.

    Older shards contain other names of languages. The order of the clips does not change,
    because it is drawn from the fingerprint. Raises UserError for an unknown language.
    """
    # A corpus has few distinct languages: look up each once, not once per clip.
    names, number_of_row = _distinct(
        index.arrays["language"], index.arrays["language_ends"]
    )
    what = f"the language of each {index.split} clip in {index.root}"
    tags = []
    for name in names:
        tags.append(language_tag(name, what) if name else "")
    if tags == names:
        return index
    tag_of_row = [tags[number] for number in number_of_row.tolist()]
    # The other columns stay lazy: ChainMap reads them from the table at their first use.
    columns = StringColumn.columns("language", tag_of_row)
    arrays = ChainMap(columns, index.arrays)  # type: ignore[arg-type]  # read alone
    return replace(index, arrays=arrays)


def _distinct(blob: np.ndarray, ends: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the distinct strings of a column, and for each row the position of its
    string, int64 (rows,).

    A million rows take 0.2 s.
    """
    sizes = np.diff(ends, prepend=0)
    names: list[str] = []
    number_of_row = np.zeros(len(ends), np.int64)
    for size in np.unique(sizes).tolist():
        # Strings of one length are the rows of a matrix of bytes.
        rows = np.flatnonzero(sizes == size)
        begins = ends[rows] - size
        letters = blob[begins[:, None] + np.arange(size)]

        # View each row as one string, for np.unique. NumPy has no strings of length 0.
        strings = letters.view(f"S{size}").ravel() if size else np.full(len(rows), b"")
        distinct, found = np.unique(strings, return_inverse=True)

        # Append the strings of this length to those of the lengths before.
        number_of_row[rows] = len(names) + found
        for string in distinct.tolist():
            names.append(string.decode("utf-8", errors="replace"))
    return names, number_of_row


def join(indexes: Sequence[Index]) -> Index:
    """Join several indexes, all of video or all of features, into one of all their clips.

    A key gets the position of its folder as a prefix, because two folders may contain the
    same key.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        arrays[name] = _concatenate(index.arrays[name] for index in indexes)
    for name in STRING_COLUMNS:
        arrays |= _joined_keys(indexes) if name == "key" else _joined_strings(indexes, name)

    # Number the shards of all folders in sequence.
    num_clips = list(map(len, indexes))
    num_shards = [index.num_shards for index in indexes]
    first_shard = np.cumsum([0, *num_shards[:-1]])
    arrays["shard"] = arrays["shard"] + np.repeat(first_shard, num_clips).astype(np.int32)

    # Record the folder of each clip, and its row in that folder.
    arrays["corpus"] = np.repeat(np.arange(len(indexes), dtype=np.int32), num_clips)
    arrays["own_row"] = _concatenate(np.arange(num, dtype=np.int32) for num in num_clips)

    shards: list[Shard] = []
    corpora: list[str] = []
    fingerprints: list[str] = []
    for index in indexes:
        shards += index.shards
        corpora.append(index.corpus)
        fingerprints.append(index.fingerprint)

    # Read each tar from the store of its folder; if two folders contain the same tar, from
    # the first.
    store_of: dict[Shard, Store] = {}
    for index in reversed(indexes):
        store_of |= dict.fromkeys(index.shards, index.store)

    joined = Index(
        corpus="+".join(corpora),
        split=indexes[0].split,
        fingerprint=hashlib.sha256("+".join(fingerprints).encode()).hexdigest()[:16],
        shards=tuple(shards),
        arrays=arrays,
        store=JoinedStore(store_of),
        corpora=tuple(corpora),
    )
    of_features = [index for index in indexes if isinstance(index, FeatureIndex)]
    if not of_features:
        return joined
    features: list[FeatureFacts] = []
    for index in of_features:
        features += index.features
    views = _concatenate(index.views for index in of_features)
    return FeatureIndex(**vars(joined), features=tuple(features), views=views)


def _concatenate(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(arrays))


def _joined_keys(indexes: Sequence[Index]) -> dict[str, np.ndarray]:
    """Return the two arrays of all keys, each with the position of its index as a prefix."""
    keys: list[str] = []
    for number, index in enumerate(indexes):
        for key in index.strings("key"):
            keys.append(f"{number}_{key}")
    return StringColumn.columns("key", keys)


def _joined_strings(indexes: Sequence[Index], name: str) -> dict[str, np.ndarray]:
    """Return the two arrays of a string column of all indexes."""
    blobs, ends = [], []
    begin = 0
    for index in indexes:
        blob = index.arrays[name]
        blobs.append(blob)
        ends.append(index.arrays[f"{name}_ends"] + begin)
        begin += len(blob)
    return {name: np.concatenate(blobs), f"{name}_ends": np.concatenate(ends)}


@dataclass(frozen=True)
class JoinedStore:
    """Reads each shard from the store of its folder."""

    store_of: dict[Shard, Store]

    @property
    def root(self) -> str:
        return ", ".join(dict.fromkeys(store.root for store in self.store_of.values()))

    def file(self, name: str, sha256: str | None = None) -> Path:
        raise UserError(
            f"{name} must be read from one shard folder, got several: {self.root}.",
        )

    def open(self, shard: Shard) -> BinaryIO:
        return self.store_of[shard].open(shard)

    def want(self, shards: Sequence[Shard]) -> None:
        for store, own in self._by_store(shards):
            store.want(own)

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        for store, own in self._by_store(shards):
            store.check(own, checksums)

    def _by_store(self, shards: Sequence[Shard]) -> list[tuple[Store, list[Shard]]]:
        """Group shards by their store; keep their order within a store."""
        shards_of: dict[int, tuple[Store, list[Shard]]] = {}
        for shard in shards:
            store = self.store_of[shard]
            _, own = shards_of.setdefault(id(store), (store, []))
            own.append(shard)
        return list(shards_of.values())
