"""Several shard folders as one split. Each of the clips knows its corpus and its language."""

import hashlib
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flallm_ds.data.index import (
    COLUMNS,
    STRING_COLUMNS,
    Index,
    Shard,
    StringColumn,
    load_index,
)
from flallm_ds.data.storage.store import CacheOptions, Store
from flallm_ds.data.text.languages import language_tag
from flallm_ds.errors import UserError


def open_indexes(
    shards: str | Path | Sequence[str | Path], split: str, cache: CacheOptions | None = None
) -> Index:
    """Open the index of one split of one shard folder (or address), or of several joined.

    Languages are tags, however the folders name them. Raises UserError as `load_index`
    does, or where a folder is named twice, video is mixed with features, or a language is
    unknown.
    """
    roots = [shards] if isinstance(shards, str | Path) else list(shards)
    if not roots:
        raise UserError(
            "data.shards must name a shard folder, but is empty. Give "
            "--data.shards=FOLDER.",
        )
    names = [str(root) for root in roots]
    if len(set(names)) < len(names):
        raise UserError(
            f"data.shards must name each shard folder once, but is {', '.join(names)}. "
            "Give a corpus more weight with --data.weights."
        )
    indexes = [with_language_tags(load_index(root, split, cache)) for root in roots]
    for index in indexes:
        if not len(index):
            raise UserError(
                f"split {split} must hold a clip, got none in {index.root}. Build it with "
                "clips, or name another folder."
            )
    kinds = {"features" if index.features else "video": index.root for index in indexes}
    if len(kinds) > 1:
        raise UserError(
            f"data.shards must all be video or all be features, but {kinds['video']} is "
            f"video and {kinds['features']} is features. Make features of all with "
            "launch/features.py."
        )
    return indexes[0] if len(indexes) == 1 else join(indexes)


def with_language_tags(index: Index) -> Index:
    """Return the index with the tag of each clip's language, which older shards name otherwise.

    The order of the clips does not change: it comes from the fingerprint.
    Raises UserError for an unknown language.
    """
    names, number_of_row = _distinct(
        index.arrays["language"], index.arrays["language_ends"]
    )
    what = f"the language of each {index.split} clip in {index.root}"
    tags = [language_tag(name, what) if name else "" for name in names]
    if tags == names:
        return index
    tag_of_row = [tags[number] for number in number_of_row.tolist()]
    columns = StringColumn.columns("language", tag_of_row)
    arrays = ChainMap(columns, index.arrays)  # type: ignore[arg-type]  # read alone
    return replace(index, arrays=arrays)


def _distinct(blob: np.ndarray, ends: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the distinct strings of a column, and the number of each row's string, int64
    (rows,).

    It takes 0.2 s for a million rows.
    """
    sizes = np.diff(ends, prepend=0)
    names: list[str] = []
    number_of_row = np.zeros(len(ends), np.int64)
    for size in np.unique(sizes).tolist():
        # Strings of one length are the rows of a matrix of bytes.
        rows = np.flatnonzero(sizes == size)
        begins = ends[rows] - size
        letters = blob[begins[:, None] + np.arange(size)]

        # NumPy sorts each row as one string; it has none of length 0.
        strings = letters.view(f"S{size}").ravel() if size else np.full(len(rows), b"")
        distinct, found = np.unique(strings, return_inverse=True)

        # The new strings are numbered behind those of other lengths.
        number_of_row[rows] = len(names) + found
        names += [string.decode("utf-8", errors="replace") for string in distinct.tolist()]
    return names, number_of_row


def join(indexes: Sequence[Index]) -> Index:
    """Join several indexes to one of all their clips.

    Keys begin with the place of their folder: keys of two folders may be the same.
    """
    num_clips = [len(index) for index in indexes]
    arrays: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        arrays[name] = np.concatenate([index.arrays[name] for index in indexes])
    for name in STRING_COLUMNS:
        arrays |= _joined_keys(indexes) if name == "key" else _joined_strings(indexes, name)

    # Shard numbers of a folder follow those of the folders before it.
    num_shards = [index.num_shards for index in indexes]
    first_shard = np.cumsum([0, *num_shards[:-1]])
    arrays["shard"] = arrays["shard"] + np.repeat(first_shard, num_clips).astype(np.int32)

    # Each clip knows its folder, and its row there.
    arrays["corpus"] = np.repeat(np.arange(len(indexes), dtype=np.int32), num_clips)
    arrays["own_row"] = np.concatenate(
        [np.arange(num, dtype=np.int32) for num in num_clips]
    )

    # Each tar is read from the store of its folder, the first one where two hold the same
    # tar.
    store_of: dict[Shard, Store] = {}
    for index in reversed(indexes):
        store_of |= dict.fromkeys(index.shards, index.store)

    fingerprints = "+".join(index.fingerprint for index in indexes)
    return Index(
        corpus="+".join(index.corpus for index in indexes),
        split=indexes[0].split,
        fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest()[:16],
        shards=tuple(shard for index in indexes for shard in index.shards),
        arrays=arrays,
        store=JoinedStore(store_of),
        corpora=tuple(index.corpus for index in indexes),
        features=tuple(facts for index in indexes for facts in index.features),
        views=np.concatenate([index.views_of_shard for index in indexes]),
    )


def _joined_keys(indexes: Sequence[Index]) -> dict[str, np.ndarray]:
    """Return the two arrays of all keys, each key with the place of its index before it."""
    keys: list[str] = []
    for number, index in enumerate(indexes):
        keys += [f"{number}_{key}" for key in index.strings("key")]
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
    """The stores of several folders: each shard is read from the store of its folder."""

    store_of: dict[Shard, Store]

    @property
    def root(self) -> str:
        return ", ".join(dict.fromkeys(store.root for store in self.store_of.values()))

    def file(self, name: str, sha256: str | None = None) -> Path:
        raise UserError(
            f"{name} must be asked of one shard folder, but here are several: {self.root}.",
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
        """Return each store with the shards that are its own, in their order."""
        shards_of: dict[int, tuple[Store, list[Shard]]] = {}
        for shard in shards:
            store = self.store_of[shard]
            _, own = shards_of.setdefault(id(store), (store, []))
            own.append(shard)
        return list(shards_of.values())
