"""Check a shard folder: every byte of its tars against index.json and its tables."""

import hashlib
import json
import mmap
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flallm_ds.data.codecs.decode import EXTENSIONS, decode_frames, extension_of
from flallm_ds.data.index import (
    STRING_COLUMNS,
    FeatureIndex,
    Shard,
    iter_rows,
    load_index,
    read_manifest,
)
from flallm_ds.errors import UserError
from flallm_ds.features.facts import FeatureFacts, from_npy
from flallm_ds.files import open_regular
from flallm_ds.sharding import pool

_BLOCK = tarfile.BLOCKSIZE
# What the index and the JSON of a clip both say.
_FACTS = ({*STRING_COLUMNS} - {"key"}) | {"num_frames", "height", "width"}
_FRAMES_AT_ONCE = 64  # decoded together: enough for a group of H.264
_BYTES_AT_ONCE = 2**28  # of these frames, so that large ones fit into any memory


@dataclass(frozen=True)
class TarCheck:
    """One tar to check, with its rows of the index.

    features: what its clips are, None for video.
    """

    path: Path
    split: str
    shard: Shard
    rows: list[dict[str, Any]]
    features: FeatureFacts | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(EXTENSIONS) if self.features is None else ("npy",)


@dataclass
class Report:
    """What a check found.

    faults: sentences, those of a tar under its file name, others under their split.
    lost_tables: splits whose table is missing, changed or wrong.
    """

    manifest: dict[str, Any]
    tars: list[TarCheck] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    lost_tables: list[str] = field(default_factory=list)

    def add(self, place: str, *sentences: str) -> None:
        if sentences:
            self.faults.setdefault(place, []).extend(sentences)

    @property
    def sentences(self) -> list[str]:
        return sorted(
            sentence for sentences in self.faults.values() for sentence in sentences
        )

    @property
    def splits(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of every split whose table is whole."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for tar in self.tars:
            rows.setdefault(tar.split, []).extend(tar.rows)
        return rows


def check(folder: Path, workers: int = 0, only: Collection[str] | None = None) -> Report:
    """Check a folder. only: the file names of the tars to read, all of them by default.

    Raises UserError if the folder has no index.json that can be read.
    """
    report = Report(read_manifest(folder))
    known: set[str] = set()
    for split, entry in report.manifest["splits"].items():
        known |= {shard["file"] for shard in entry["shards"]}
        _check_table(report, folder, split)
    for name in sorted({path.name for path in folder.glob("*.tar")} - known):
        report.add("", f"{name} is no part of the index, and no repair touches it.")
    tars = [tar for tar in report.tars if only is None or tar.shard.file in only]
    num_clips = sum(len(tar.rows) for tar in tars)
    results = pool.run(
        check_shard, tars, num_workers=workers, num_clips=num_clips, title="verify"
    )
    for position, found in results:
        report.add(tars[position].shard.file, *found)
    return report


def _check_table(report: Report, folder: Path, split: str) -> None:
    """Load the table of a split, and add its faults and its tars to the report."""
    entry = report.manifest["splits"][split]
    try:
        index = load_index(folder, split)
    except UserError as error:
        report.add(split, str(error))
        report.lost_tables.append(split)
        return
    rows: list[list[dict[str, Any]]] = [[] for _ in range(index.num_shards)]
    for row in iter_rows(index):
        rows[row["shard"]].append(row)
    # A folder of features has one tar for each shard and view, those of a shard next to
    # each other.
    facts = index.features[0] if isinstance(index, FeatureIndex) else None
    num_views = facts.views if facts else 1
    rows_of_tars = [part for part in rows for _ in range(num_views)]
    for shard, part in zip(index.shards, rows_of_tars, strict=True):
        report.tars.append(TarCheck(folder / shard.file, split, shard, part, facts))
    for what, count in (("clips", len(index)), ("frames", int(index.num_frames.sum()))):
        if count != entry[what]:
            wanted = f"{split} must hold {entry[what]:,} {what}"
            report.add(split, f"{wanted}, but its table holds {count:,}.")


def check_shard(tar: TarCheck) -> list[str]:
    """Return one sentence for each fault of one tar; runs in a worker process."""
    name = tar.shard.file
    try:
        size = tar.path.stat().st_size
        if size != tar.shard.bytes or not size:
            return [f"{name} must hold {tar.shard.bytes:,} bytes, but holds {size:,}."]
        content = read_only(tar.path)
    except OSError as error:
        return [f"{name} must be readable, but {error.strerror}."]
    faults = []
    if hashlib.sha256(content).hexdigest() != tar.shard.sha256:
        faults.append(
            f"{name} must have the checksum that its index says, but was changed."
        )
    if len(tar.rows) != tar.shard.clips:
        wanted = f"{name} must hold {tar.shard.clips:,} clips"
        faults.append(f"{wanted}, but its table has {len(tar.rows):,}.")
    try:
        members = [member for member, _, _ in tar_members(content)]
    except ValueError as error:
        faults.append(f"{name} must be a tar file, but {error}.")
    else:
        if not _agree(members, tar):
            wanted = f"{name} must hold the members that its index names, in order"
            faults.append(f"{wanted}, but holds others.")
    for row in tar.rows:
        if tar.features is None:
            found = check_clip(content, row)
        else:
            found = check_features(content, row, tar.features)
        faults += [f"{name} {row['key']} {fault}." for fault in found]
        pool.check_stop()
        pool.tick()
    return faults


def _agree(members: list[str], tar: TarCheck) -> bool:
    """Whether the members are a clip and its JSON for each row of the index, in order."""
    clips = [Path(member) for member in members[::2]]
    suffixes = {clip.suffix for clip in clips}
    keys = [row["key"] for row in tar.rows]
    return (
        [clip.stem for clip in clips] == keys
        and suffixes <= {f".{extension}" for extension in tar.extensions}
        and members[1::2] == [f"{key}.json" for key in keys]
    )


def read_only(path: Path) -> memoryview:
    """Map a file into memory; an empty file gives an empty view. Raises OSError."""
    with open_regular(path) as file:
        if not file.seek(0, 2):
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def tar_members(content: memoryview) -> list[tuple[str, int, int]]:
    """Return (name, offset of its bytes, size) of every member, in order.

    Raises ValueError for a tar that is not whole.
    """
    members = []
    position = 0
    while bytes(content[position : position + _BLOCK]).strip(b"\0"):
        name, size = _header(content, position)
        members.append((name, position + _BLOCK, size))
        position += _BLOCK + size + -size % _BLOCK
    if position + 2 * _BLOCK > len(content):
        raise ValueError("it ends too early")
    return members


def _header(content: memoryview, position: int) -> tuple[str, int]:
    """Return (name, size) of the member whose header is at `position`."""
    block = bytes(content[max(0, position) :][:_BLOCK])
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.TarError as error:
        raise ValueError(f"a header in it is broken ({error})") from error
    return header.name, header.size


def clip_span(
    content: memoryview, row: dict[str, Any], extensions: Collection[str] = EXTENSIONS
) -> tuple[int, int, int, int]:
    """Find a clip's member and its JSON in a tar.

    Returns where the header of the member begins, where its bytes begin, where those of
    the JSON begin, and where they end. Raises ValueError, the rest of a sentence about
    the clip, if the two are not where the index says.
    """
    key, begin, end = row["key"], row["offset"], row["offset"] + row["size"]
    json_begin = end + -row["size"] % _BLOCK + _BLOCK
    try:
        name, size = _header(content, begin - _BLOCK)
        json_name, json_size = _header(content, json_begin - _BLOCK)
    except ValueError as error:
        raise ValueError("must lie where the index says, but does not") from error
    if (
        name not in [f"{key}.{extension}" for extension in extensions]
        or size != row["size"]
    ):
        raise ValueError("must lie where the index says, but does not")
    if json_name != f"{key}.json":
        raise ValueError("must have a JSON member behind it, but has none")
    if json_begin + json_size > len(content):
        raise ValueError("must be whole, but its shard ends before it")
    return begin - _BLOCK, begin, json_begin, json_begin + json_size


def check_clip(content: memoryview, row: dict[str, Any]) -> list[str]:
    """Return what is wrong with one clip of a tar, each the rest of a sentence."""
    try:
        header, begin, json_begin, json_end = clip_span(content, row)
        clip = content[begin : begin + row["size"]]
        if _header(content, header)[0] != f"{row['key']}.{extension_of(clip)}":
            raise ValueError("must be of the kind that its name says, but is not")
    except ValueError as error:
        return [str(error)]
    return _check_frames(clip, row) + _check_facts(bytes(content[json_begin:json_end]), row)


def check_features(
    content: memoryview, row: dict[str, Any], facts: FeatureFacts
) -> list[str]:
    """Return what is wrong with one clip's features, each the rest of a sentence."""
    num_kept = facts.sampling.num_kept(
        np.array([row["num_frames"]]), np.array([row["fps"]])
    )
    shape = (int(num_kept[0]), facts.width)
    try:
        _, begin, _, _ = clip_span(content, row, ["npy"])
        from_npy(content[begin : begin + row["size"]], shape, facts.dtype)
    except ValueError as error:
        return [f"is broken: {error}"]
    return []


def _check_frames(clip: memoryview, row: dict[str, Any]) -> list[str]:
    """Decode every frame of a clip, some at once."""
    num_frames, height, width = row["num_frames"], row["height"], row["width"]
    fit_into_memory = _BYTES_AT_ONCE // (3 * height * width)
    at_once = max(1, min(num_frames, _FRAMES_AT_ONCE, fit_into_memory))
    frames = np.empty((at_once, height, width, 3), np.uint8)
    for first in range(0, num_frames, at_once):
        picks = np.arange(first, min(first + at_once, num_frames))
        try:
            decode_frames(clip, picks, num_frames, frames[: len(picks)], (height, width))
        except ValueError as error:
            return [
                f"is broken in frames {picks[0]} to {picks[-1]}: {str(error).rstrip('.')}"
            ]
    return []


def _check_facts(content: bytes, row: dict[str, Any]) -> list[str]:
    try:
        facts = json.loads(content)
        agree = all(facts[column] == row[column] for column in _FACTS)
        agree = agree and abs(facts["fps"] - row["fps"]) < 1e-3
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"must have a JSON member, but it cannot be read ({error})"]
    if not agree:
        return ["must have a JSON member that agrees with the index, but does not"]
    return []
