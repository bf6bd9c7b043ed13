"""Several shard folders as one split: their clips one after another, each with its corpus and language."""

import hashlib
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flallm_ds.data.index import COLUMNS, STRING_COLUMNS, Index, Shard, StringColumn, load_index
from flallm_ds.data.storage.store import CacheOptions, Store
from flallm_ds.data.text.languages import language_tag
from flallm_ds.errors import UserError


def open_indexes(
    shards: str | Path | Sequence[str | Path], split: str, cache: CacheOptions | None = None
) -> Index:
    """The index of one split of one shard folder (or address), or of several joined.

    Languages are tags, however the folders name them. Raises UserError as `load_index` does, or where a
    folder is named twice, video is mixed with features, or a language is unknown.
    """
    roots = [shards] if isinstance(shards, str | Path) else list(shards)
    if not roots:
        raise UserError("data.shards must name a shard folder, but is empty. Give --data.shards=FOLDER.")
    if len(set(map(str, roots))) < len(roots):
        raise UserError(
            f"data.shards must name each shard folder once, but is {', '.join(map(str, roots))}. "
            "Give a corpus more weight with --data.weights."
        )
    indexes = [with_language_tags(load_index(root, split, cache)) for root in roots]
    for index in indexes:
        if not len(index):
            raise UserError(
                f"split {split} must hold a clip, got none in {index.root}. Build it with clips, or name "
                "another folder."
            )
    kinds = {"features" if index.features else "video": index.root for index in indexes}
    if len(kinds) > 1:
        raise UserError(
            f"data.shards must all be video or all be features, but {kinds['video']} is video and "
            f"{kinds['features']} is features. Make features of all with launch/features.py."
        )
    return indexes[0] if len(indexes) == 1 else join(indexes)


def with_language_tags(index: Index) -> Index:
    """Return the index with the tag of each clip's language, which older shards name otherwise.

    The order of the clips does not change: it comes from the fingerprint.
    Raises UserError for an unknown language.
    """
    names, numbers = _distinct(index.arrays["language"], index.arrays["language_ends"])
    what = f"the language of each {index.split} clip in {index.root}"
    tags = [language_tag(name, what) if name else "" for name in names]
    if tags == names:
        return index
    column = StringColumn.columns("language", [tags[number] for number in numbers.tolist()])
    arrays = ChainMap(column, index.arrays)  # type: ignore[arg-type]  # read alone
    return replace(index, arrays=arrays)


def _distinct(blob: np.ndarray, ends: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(distinct strings of a column, the number of each row's string); 0.2 s for a million rows."""
    sizes = np.diff(ends, prepend=0)
    names: list[str] = []
    numbers = np.zeros(len(ends), np.int64)
    # Strings of one length are the rows of a matrix of bytes, which NumPy sorts as strings.
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        letters = blob[(ends[rows] - size)[:, None] + np.arange(size)]
        strings = letters.view(f"S{size}").ravel() if size else np.full(len(rows), b"")
        distinct, found = np.unique(strings, return_inverse=True)
        numbers[rows] = len(names) + found
        names += [string.decode("utf-8", errors="replace") for string in distinct.tolist()]
    return names, numbers


def join(indexes: Sequence[Index]) -> Index:
    """One index of all clips of several. Keys begin with their folder's place: folders number alike."""
    arrays = {name: np.concatenate([index.arrays[name] for index in indexes]) for name in COLUMNS}
    counts = [len(index) for index in indexes]
    num_shards = np.cumsum([0, *(index.num_shards for index in indexes)])
    arrays["shard"] = arrays["shard"] + np.repeat(num_shards[:-1], counts).astype(np.int32)
    arrays["corpus"] = np.repeat(np.arange(len(indexes), dtype=np.int32), counts)
    arrays["own_row"] = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    for name in STRING_COLUMNS:
        if name == "key":
            keys = (f"{n}_{key}" for n, index in enumerate(indexes) for key in index.strings(name))
            arrays |= StringColumn.columns(name, list(keys))
            continue
        blobs = [index.arrays[name] for index in indexes]
        begins = np.cumsum([0, *map(len, blobs)])
        ends = [index.arrays[f"{name}_ends"] + b for index, b in zip(indexes, begins, strict=False)]
        arrays |= {name: np.concatenate(blobs), f"{name}_ends": np.concatenate(ends)}
    content = "+".join(index.fingerprint for index in indexes)
    return Index(
        corpus="+".join(index.corpus for index in indexes),
        split=indexes[0].split,
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        shards=tuple(shard for index in indexes for shard in index.shards),
        arrays=arrays,
        store=JoinedStore({shard: index.store for index in reversed(indexes) for shard in index.shards}),
        corpora=tuple(index.corpus for index in indexes),
        features=tuple(facts for index in indexes for facts in index.features),
        views=np.concatenate([v for index in indexes if (v := index.views) is not None])
        if indexes[0].features
        else None,
    )


@dataclass(frozen=True)
class JoinedStore:
    """The stores of several folders: each shard is asked of its own."""

    store_of: dict[Shard, Store]

    @property
    def root(self) -> str:
        return ", ".join(dict.fromkeys(store.root for store in self.store_of.values()))

    def file(self, name: str, sha256: str | None = None) -> Path:
        raise UserError(f"{name} must be asked of one shard folder, but here are several: {self.root}.")

    def open(self, shard: Shard) -> BinaryIO:
        return self.store_of[shard].open(shard)

    def want(self, shards: Sequence[Shard]) -> None:
        for store, own in self._by_store(shards):
            store.want(own)

    def check(self, shards: Sequence[Shard], checksums: bool = False) -> None:
        for store, own in self._by_store(shards):
            store.check(own, checksums)

    def _by_store(self, shards: Sequence[Shard]) -> list[tuple[Store, list[Shard]]]:
        parts: dict[int, tuple[Store, list[Shard]]] = {}
        for shard in shards:
            store = self.store_of[shard]
            parts.setdefault(id(store), (store, []))[1].append(shard)
        return list(parts.values())
