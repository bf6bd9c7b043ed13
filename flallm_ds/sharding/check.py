"""Check a shard folder: every byte of its tars against index.json and its tables."""

import hashlib
import json
import mmap
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain
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
# Frames decoded together: enough for a group of H.264. Fewer where they would take more
# than _BYTES_AT_ONCE.
_FRAMES_AT_ONCE = 64
_BYTES_AT_ONCE = 2**28


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
        return sorted(chain.from_iterable(self.faults.values()))

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
        for shard in entry["shards"]:
            known.add(shard["file"])
        _check_table(report, folder, split)
    # A tar that no index names would be read by a plain WebDataset pattern such as *.tar.
    present = {path.name for path in folder.glob("*.tar")}
    for name in sorted(present - known):
        report.add("", f"{name} is no part of the index, and no repair touches it.")
    tars = report.tars
    if only is not None:
        tars = [tar for tar in tars if tar.shard.file in only]
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
    # Group the rows by shard number.
    rows: list[list[dict[str, Any]]] = [[] for _ in range(index.num_shards)]
    for row in iter_rows(index):
        rows[row["shard"]].append(row)
    # A folder of features has one tar for each shard and view. The tars of a shard are next
    # to each other, and all hold its rows.
    facts = index.features[0] if index.features else None
    num_views = facts.views if facts else 1
    rows_of_tars = []
    for part in rows:
        rows_of_tars += [part] * num_views
    for shard, part in zip(index.shards, rows_of_tars, strict=True):
        report.tars.append(TarCheck(folder / shard.file, split, shard, part, facts))
    for what, count in (("clips", len(index)), ("frames", int(index.num_frames.sum()))):
        if count != entry[what]:
            wanted = f"{split} must hold {entry[what]:,} {what}"
            report.add(split, f"{wanted}, but its table holds {count:,}.")


def check_shard(tar: TarCheck) -> list[str]:
    """Return one sentence for each fault of one tar; runs in a worker process."""
    name = tar.shard.file
    # A file of the wrong size is reported as that alone: what follows would repeat it for
    # every clip.
    try:
        size = tar.path.stat().st_size
        if size != tar.shard.bytes or not size:
            return [f"{name} must hold {tar.shard.bytes:,} bytes, but holds {size:,}."]
        content = read_only(tar.path)
    except OSError as error:
        return [f"{name} must be readable, but {error.strerror}."]
    # Any changed byte changes the checksum. The checks after it say where the change is.
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
        for fault in found:
            faults.append(f"{name} {row['key']} {fault}.")
        pool.check_stop()
        pool.tick()
    return faults


def _agree(members: list[str], tar: TarCheck) -> bool:
    """Whether the members are a clip and its JSON for each row of the index, in order."""
    if len(members) != 2 * len(tar.rows):
        return False
    # Clips are at even positions, each followed by its JSON.
    for row, clip, facts in zip(tar.rows, members[::2], members[1::2], strict=True):
        path = Path(clip)
        if path.stem != row["key"] or path.suffix[1:] not in tar.extensions:
            return False
        if facts != f"{row['key']}.json":
            return False
    return True


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
    # A tar is headers of one block, each followed by the bytes of its member, padded to
    # whole blocks. Two empty blocks end it.
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
    # The JSON follows the padding of the clip and one header.
    json_begin = end + -row["size"] % _BLOCK + _BLOCK
    try:
        name, size = _header(content, begin - _BLOCK)
        json_name, json_size = _header(content, json_begin - _BLOCK)
    except ValueError as error:
        raise ValueError("must lie where the index says, but does not") from error
    names = [f"{key}.{extension}" for extension in extensions]
    if name not in names or size != row["size"]:
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
        # An mp4 named .avi would be given to the wrong decoder by WebDataset.
        if _header(content, header)[0] != f"{row['key']}.{extension_of(clip)}":
            raise ValueError("must be of the kind that its name says, but is not")
    except ValueError as error:
        return [str(error)]
    return _check_frames(clip, row) + _check_facts(bytes(content[json_begin:json_end]), row)


def check_features(
    content: memoryview, row: dict[str, Any], facts: FeatureFacts
) -> list[str]:
    """Return what is wrong with one clip's features, each the rest of a sentence."""
    # Frame sampling works on arrays of clips: here, on arrays of one.
    num_frames, fps = np.array([row["num_frames"]]), np.array([row["fps"]])
    num_kept = facts.sampling.num_kept(num_frames, fps)
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
    # Three bytes for each pixel. At least one frame, however large it is.
    fit_into_memory = _BYTES_AT_ONCE // (3 * height * width)
    at_once = max(1, min(num_frames, _FRAMES_AT_ONCE, fit_into_memory))
    frames = np.empty((at_once, height, width, 3), np.uint8)
    for first in range(0, num_frames, at_once):
        picks = np.arange(first, min(first + at_once, num_frames))
        try:
            decode_frames(clip, picks, num_frames, frames[: len(picks)], (height, width))
        except ValueError as error:
            reason = str(error).rstrip(".")
            return [f"is broken in frames {picks[0]} to {picks[-1]}: {reason}"]
    return []


def _check_facts(content: bytes, row: dict[str, Any]) -> list[str]:
    try:
        agree = _agree_on_facts(json.loads(content), row)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"must have a JSON member, but it cannot be read ({error})"]
    if not agree:
        return ["must have a JSON member that agrees with the index, but does not"]
    return []


def _agree_on_facts(facts: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether the JSON of a clip says what the index says.

    Raises KeyError or TypeError for a JSON that is no such dictionary.
    """
    for column in _FACTS:
        if facts[column] != row[column]:
            return False
    # The index rounds frame rates to float32, JSON does not.
    return bool(abs(facts["fps"] - row["fps"]) < 1e-3)
