"""Check every tar and table of a shard folder against index.json."""

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
# The facts that are in the index and in the JSON of a clip.
_FACTS = ({*STRING_COLUMNS} - {"key"}) | {"num_frames", "height", "width"}
# Frames decoded in one call, enough for a group of H.264, and the maximum memory for them.
_FRAMES_AT_ONCE = 64
_BYTES_AT_ONCE = 2**28


@dataclass(frozen=True)
class TarCheck:
    """Hold a tar to check and its rows of the index.

    features: facts of the cached features in the tar, None for video.
    """

    path: Path
    split: str
    shard: Shard
    rows: list[dict[str, Any]]
    features: FeatureFacts | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        """The file extensions that clips of the tar may have."""
        return tuple(EXTENSIONS) if self.features is None else ("npy",)


@dataclass
class Report:
    """Collect the faults of a shard folder.

    faults: sentences by file name of the tar, or by split for faults of a table.
    lost_tables: splits whose table is missing, changed or wrong.
    """

    manifest: dict[str, Any]
    tars: list[TarCheck] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    lost_tables: list[str] = field(default_factory=list)

    def add(self, place: str, *sentences: str) -> None:
        """Add the faults of a tar or of a split."""
        if sentences:
            self.faults.setdefault(place, []).extend(sentences)

    @property
    def sentences(self) -> list[str]:
        """All faults, sorted."""
        return sorted(chain.from_iterable(self.faults.values()))

    @property
    def splits(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each split with a valid table."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for tar in self.tars:
            rows.setdefault(tar.split, []).extend(tar.rows)
        return rows


def check(folder: Path, workers: int = 0, only: Collection[str] | None = None) -> Report:
    """Check a folder and return all faults.

    only: file names of the tars to read, by default all. Raises UserError if index.json is
    missing or cannot be read.
    """
    report = Report(read_manifest(folder))
    known: set[str] = set()
    for split, entry in report.manifest["splits"].items():
        for shard in entry["shards"]:
            known.add(shard["file"])
        _check_table(report, folder, split)
    # A WebDataset pattern such as *.tar would also read a tar that is not in the index.
    present = {path.name for path in folder.glob("*.tar")}
    for name in sorted(present - known):
        report.add("", f"{name} is not in index.json. Move it away: --repair ignores it.")
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
    """Load the table of a split, and add the tars and the faults to the report."""
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
    # A folder of cached features has one tar for each shard and view. The tars of one shard
    # are next to each other and have the same rows.
    facts = index.features[0] if isinstance(index, FeatureIndex) else None
    num_views = facts.views if facts else 1
    rows_of_tars = []
    for part in rows:
        rows_of_tars += [part] * num_views
    for shard, part in zip(index.shards, rows_of_tars, strict=True):
        report.tars.append(TarCheck(folder / shard.file, split, shard, part, facts))
    for what, count in (("clips", len(index)), ("frames", int(index.num_frames.sum()))):
        if count != entry[what]:
            wanted = f"The table of {split} must have {entry[what]:,} {what}"
            report.add(split, f"{wanted}, got {count:,}.")


def check_shard(tar: TarCheck) -> list[str]:
    """Return one sentence for each fault of a tar. Runs in a worker process."""
    name = tar.shard.file
    # If the size is wrong, report only that. Further checks would report it for every clip.
    try:
        size = tar.path.stat().st_size
        if size != tar.shard.bytes or not size:
            return [f"{name} must have {tar.shard.bytes:,} bytes, got {size:,}."]
        content = read_only(tar.path)
    except OSError as error:
        return [f"Cannot read {name}: {error.strerror}."]
    # Any changed byte changes the checksum. The later checks find the place of the change.
    faults = []
    if hashlib.sha256(content).hexdigest() != tar.shard.sha256:
        faults.append(f"{name} must have the checksum in index.json, got another one.")
    if len(tar.rows) != tar.shard.clips:
        wanted = f"{name} must have {tar.shard.clips:,} clips"
        faults.append(f"{wanted}, got {len(tar.rows):,} in the table.")
    try:
        members = [member for member, _, _ in tar_members(content)]
    except ValueError as error:
        faults.append(f"Cannot read {name} as a tar file: {error}.")
    else:
        if not _agree(members, tar):
            wanted = f"{name} must have the members of the table in the same order"
            faults.append(f"{wanted}, got others.")
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
    """Return whether a tar has a clip and a JSON for each row of the index, in order."""
    if len(members) != 2 * len(tar.rows):
        return False
    # Clips are at even positions, and the JSON of a clip follows it.
    for row, clip, facts in zip(tar.rows, members[::2], members[1::2], strict=True):
        path = Path(clip)
        if path.stem != row["key"] or path.suffix[1:] not in tar.extensions:
            return False
        if facts != f"{row['key']}.json":
            return False
    return True


def read_only(path: Path) -> memoryview:
    """Map a file into memory. Returns an empty view of an empty file. Raises OSError."""
    with open_regular(path) as file:
        if not file.seek(0, 2):
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def tar_members(content: memoryview) -> list[tuple[str, int, int]]:
    """Return (name, offset of the content, size) of every member, in order.

    Raises ValueError if the tar is truncated or a header is damaged.
    """
    # Each member has a header of one block, and content that is padded to whole blocks. Two
    # empty blocks end the tar.
    members = []
    position = 0
    while bytes(content[position : position + _BLOCK]).strip(b"\0"):
        name, size = _header(content, position)
        members.append((name, position + _BLOCK, size))
        position += _BLOCK + size + -size % _BLOCK
    if position + 2 * _BLOCK > len(content):
        raise ValueError("it is truncated")
    return members


def _header(content: memoryview, position: int) -> tuple[str, int]:
    """Return (name, size) of the member whose header is at `position`."""
    block = bytes(content[max(0, position) :][:_BLOCK])
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.TarError as error:
        raise ValueError(f"a header is damaged ({error})") from error
    return header.name, header.size


def clip_span(
    content: memoryview, row: dict[str, Any], extensions: Collection[str] = EXTENSIONS
) -> tuple[int, int, int, int]:
    """Find a clip and its JSON in a tar.

    Returns four offsets: of the header of the clip, of its bytes, of the JSON, and of the
    end of the JSON. Raises ValueError if the two are not where the index says. The text of
    the error continues a sentence that begins with the clip.
    """
    key, begin, end = row["key"], row["offset"], row["offset"] + row["size"]
    # The padding of the clip and a header are before the JSON.
    json_begin = end + -row["size"] % _BLOCK + _BLOCK
    try:
        name, size = _header(content, begin - _BLOCK)
        json_name, json_size = _header(content, json_begin - _BLOCK)
    except ValueError as error:
        raise ValueError(f"must be at offset {begin:,}, got no member there") from error
    names = [f"{key}.{extension}" for extension in extensions]
    if name not in names or size != row["size"]:
        raise ValueError(f"must be at offset {begin:,}, got another member there")
    if json_name != f"{key}.json":
        raise ValueError("must be followed by its JSON member, got another one")
    if json_begin + json_size > len(content):
        raise ValueError("must be complete, got a shard that ends before it")
    return begin - _BLOCK, begin, json_begin, json_begin + json_size


def check_clip(content: memoryview, row: dict[str, Any]) -> list[str]:
    """Return the faults of one clip, each as the end of a sentence about the clip."""
    try:
        header, begin, json_begin, json_end = clip_span(content, row)
        clip = content[begin : begin + row["size"]]
        # WebDataset chooses the decoder by the extension.
        if _header(content, header)[0] != f"{row['key']}.{extension_of(clip)}":
            raise ValueError("must have the format of its extension, got another one")
    except ValueError as error:
        return [str(error)]
    return _check_frames(clip, row) + _check_facts(bytes(content[json_begin:json_end]), row)


def check_features(
    content: memoryview, row: dict[str, Any], facts: FeatureFacts
) -> list[str]:
    """Return the faults of the cached features of one clip, as `check_clip` does."""
    # Frame sampling needs arrays of clips: here, arrays of length 1.
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
    """Decode every frame of a clip, several at a time, and return the first fault."""
    num_frames, height, width = row["num_frames"], row["height"], row["width"]
    # A pixel has three bytes. Decode at least one frame, even if it is too large.
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
    """Compare the JSON of a clip with its row of the index, and return the faults."""
    try:
        agree = _agree_on_facts(json.loads(content), row)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"must have a readable JSON member, got an error ({error})"]
    if not agree:
        return ["must have a JSON member that agrees with the index, got other values"]
    return []


def _agree_on_facts(facts: dict[str, Any], row: dict[str, Any]) -> bool:
    """Return whether the JSON of a clip agrees with the index.

    Raises KeyError or TypeError if the JSON is not a dictionary of these facts.
    """
    for column in _FACTS:
        if facts[column] != row[column]:
            return False
    # The index stores frame rates as float32.
    return bool(abs(facts["fps"] - row["fps"]) < 1e-3)
