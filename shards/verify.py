"""Every byte of a shard folder against its index: python shards/verify.py DIR.

One line for each fault and exit code 1, or one line that says that all is well.
"""

import hashlib
import json
import mmap
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # run as a file: the project's root is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import simplejpeg

from flallm_ds import command
from flallm_ds.data.clip_format import EXTENSION, frame_spans
from flallm_ds.data.index import STRING_COLUMNS, Shard, iter_rows, load_index, read_manifest
from flallm_ds.errors import UserError
from shards import pool

_BLOCK = 512
_FACTS = ({*STRING_COLUMNS} - {"key"}) | {"num_frames", "height", "width"}  # in the index and in the JSON


class ShardFault(UserError):
    """The shards are not what their index says."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """One tar to check, with its rows of the index."""

    path: Path
    shard: Shard
    rows: list[dict[str, Any]]


def verify(folder: Path, *, workers: int = 0) -> None:
    """Check tars' sizes and checksums, every row's member and JSON, and that every JPEG decodes.

    --workers: processes, 0 for one a core.
    """
    manifest = read_manifest(folder)
    faults: list[str] = []
    jobs: list[Job] = []
    known: set[str] = set()
    for split, entry in manifest["splits"].items():
        known |= {shard["file"] for shard in entry["shards"]}
        try:
            index = load_index(folder, split)
        except UserError as error:
            faults.append(str(error))
            continue
        rows: list[list[dict[str, Any]]] = [[] for _ in index.shards]
        for row in iter_rows(index):
            if 0 <= row["shard"] < len(rows):
                rows[row["shard"]].append(row)
            else:
                faults.append(
                    f"{split} {row['key']} must be in a shard of {len(rows)}, but is in {row['shard']}."
                )
        jobs += [Job(folder / s.file, s, r) for s, r in zip(index.shards, rows, strict=True)]
        for what, count in (("clips", len(index)), ("frames", int(index.num_frames.sum()))):
            if count != entry[what]:
                faults.append(f"{split} must hold {entry[what]:,} {what}, but its table holds {count:,}.")
        keys = index.strings("key")
        if len(set(keys)) != len(keys):
            faults.append(f"every key of {split} must be there once, but some are there twice.")
    strange = {path.name for path in folder.glob("*.tar")} - known
    faults += [f"{name} is no part of the index." for name in strange]
    num_clips = sum(len(job.rows) for job in jobs)
    for _, found in pool.run(check_shard, jobs, num_workers=workers, num_clips=num_clips, title="verify"):
        faults += found
    if faults:
        print("\n".join(sorted(faults)))
        raise ShardFault(
            f"shards must be as their index says, but {folder} has {len(faults):,} fault(s), the "
            f"first: {faults[0]}"
        )
    num_frames = sum(entry["frames"] for entry in manifest["splits"].values())
    size = sum(job.shard.bytes for job in jobs)
    print(
        f"all is well: {num_clips:,} clips, {num_frames:,} frames, {len(jobs):,} shards, {size / 1e6:,.1f} MB"
    )


def check_shard(job: Job) -> list[str]:
    """One sentence for each fault of one tar."""
    name = job.shard.file
    try:
        size = job.path.stat().st_size
        if size != job.shard.bytes or not size:
            return [f"{name} must hold {job.shard.bytes:,} bytes, but holds {size:,}."]
        with job.path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        return [f"{name} must be readable, but {error.strerror}."]
    faults = []
    if hashlib.sha256(content).hexdigest() != job.shard.sha256:
        faults.append(f"{name} must have the checksum that its index says, but was changed.")
    if len(job.rows) != job.shard.clips:
        faults.append(f"{name} must hold {job.shard.clips:,} clips, but its table has {len(job.rows):,}.")
    try:
        members = _members(content)
    except (tarfile.TarError, ValueError) as error:
        return [*faults, f"{name} must be a tar file, but {error}."]
    wanted = [f"{row['key']}.{extension}" for row in job.rows for extension in (EXTENSION, "json")]
    if [member for member, _, _ in members] != wanted:
        faults.append(f"{name} must hold the members that its index names, in order, but holds others.")
    places = {member: (offset, size) for member, offset, size in members}
    for row in job.rows:
        faults += [f"{name} {row['key']} {fault}." for fault in _check_clip(row, content, places)]
        pool.check_stop()
        pool.tick()
    return faults


def _members(content: mmap.mmap) -> list[tuple[str, int, int]]:
    """(name, offset of its bytes, size) of every member, in order."""
    members = []
    position = 0
    while content[position : position + _BLOCK].strip(b"\0"):
        header = tarfile.TarInfo.frombuf(content[position : position + _BLOCK], "utf-8", "strict")
        members.append((header.name, position + _BLOCK, header.size))
        position += _BLOCK + header.size + -header.size % _BLOCK
    if position + 2 * _BLOCK > len(content):
        raise ValueError("it ends too early")
    return members


def _check_clip(row: dict[str, Any], content: mmap.mmap, places: dict[str, tuple[int, int]]) -> list[str]:
    """What is wrong with one clip."""
    if places.get(f"{row['key']}.{EXTENSION}") != (row["offset"], row["size"]):
        return ["must lie where the index says, but does not"]
    clip = memoryview(content)[row["offset"] : row["offset"] + row["size"]]
    try:
        spans = frame_spans(clip)
    except ValueError as error:
        return [f"is broken: {str(error).rstrip('.')}"]
    faults = []
    if len(spans) != row["num_frames"]:
        faults.append(f"must hold {row['num_frames']} frames, but holds {len(spans)}")
    for number, (offset, size) in enumerate(spans.tolist()):
        try:
            shape = simplejpeg.decode_jpeg(clip[offset : offset + size]).shape[:2]
        except ValueError as error:
            faults.append(f"has a frame that does not decode: frame {number} ({error})")
            continue
        if shape != (row["height"], row["width"]):
            faults.append(f"must be {row['height']}x{row['width']}, but frame {number} is {shape}")
    offset, size = places.get(f"{row['key']}.json", (0, 0))
    try:
        facts = json.loads(content[offset : offset + size])
        agree = all(facts[column] == row[column] for column in _FACTS)
        agree = agree and abs(facts["fps"] - row["fps"]) < 1e-3
    except (ValueError, KeyError, TypeError) as error:
        return [*faults, f"must have a JSON member, but it cannot be read ({error})"]
    return faults if agree else [*faults, "must have a JSON member that agrees with the index, but does not"]


if __name__ == "__main__":
    command.main(verify)
