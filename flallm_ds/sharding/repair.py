"""Mending a shard folder, for `shards/verify.py --repair`.

New files are written in a folder of their own and then moved to names that nothing refers to yet; index.json
changes last and at once. So a repair that is killed leaves the folder as it was, or mended.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flallm_ds.data.index import Shard, write_table
from flallm_ds.errors import UserError
from flallm_ds.files import move, sync, take_folder_lock
from flallm_ds.sharding import jobs, pool
from flallm_ds.sharding.rows import read_source
from flallm_ds.sharding.verify import Job, Report, check, check_clip, clip_span, read_only, tar_members
from flallm_ds.sharding.writer import ShardWriter, index_json

_DROPPED = "dropped by a repair"  # the kind, among what index.json says was skipped
_NUM_EXAMPLES = 3
SCRATCH = "repair.partial"


@dataclass(frozen=True)
class Salvage:
    """A broken tar, and the folder in which its whole clips are to be written anew."""

    job: Job
    scratch: Path


@dataclass
class Salvaged:
    """What could be saved of a tar. shard: its entry in the index, None where no clip is left."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    shard: Shard | None = None
    lost: list[str] = field(default_factory=list)  # one sentence a clip


def mend(folder: Path, report: Report, source: Path | None, workers: int) -> Report:
    """Mend what can be mended, say what was done, and return what is still wrong.

    source: the corpus, to rebuild broken tars from; without it their broken clips are dropped.
    Raises UserError if the disk or the source refuses, or if a split would be left without clips.
    """
    try:
        with _alone(folder), _scratch(folder) as scratch:
            _remove_replaced(folder, report.manifest)
            restored = [restore_table(folder, report, split, scratch) for split in report.lost_tables]
            if any(restored):
                report = check(folder, workers)
            broken = [job for job in report.jobs if job.shard.file in report.faults]
            if source is None:
                touched = drop(folder, report, broken, scratch, workers)
            else:
                touched = rebuild(report, broken, source, scratch, workers)
            return check(folder, workers, only=touched)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"a repair must write to {folder}, but {reason}. Nothing is lost; make that possible, and start "
            "it again."
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two repairs of one folder would undo each other."""
    handle = take_folder_lock(folder)
    if handle is None:
        raise UserError(
            f"one repair at a time must be at work, but another is at work on {folder}. Wait for it."
        )
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder on the same disk, gone in the end."""
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(manifest: Mapping[str, Any]) -> set[str]:
    """The tables and tars that an index.json names."""
    entries = manifest["splits"].values()
    return {entry["table"] for entry in entries} | {s["file"] for entry in entries for s in entry["shards"]}


def _remove_replaced(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what an earlier repair has replaced, had it not been killed."""
    for name in set(manifest.get("replaced", ())) - _files(manifest):
        (folder / Path(name).name).unlink(missing_ok=True)


def restore_table(folder: Path, report: Report, split: str, scratch: Path) -> bool:
    """Make a split's lost table again from its tars; False where it comes out other than it was."""
    entry = report.manifest["splits"][split]
    rows: list[dict[str, Any]] = []
    try:
        for number, shard in enumerate(entry["shards"]):
            content = read_only(folder / shard["file"])
            members = tar_members(content)
            for (name, offset, size), (_, facts_offset, facts_size) in zip(
                members[::2], members[1::2], strict=True
            ):
                facts = json.loads(bytes(content[facts_offset : facts_offset + facts_size]))
                place = {"key": Path(name).stem, "shard": number, "offset": offset, "size": size}
                rows.append(facts | place)
        made = write_table(scratch / entry["table"], rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        made = {}
    if made.get("table_sha256") != entry["table_sha256"]:
        print(f"the table of {split} cannot be restored, because its tars are not whole. Build it again.")
        return False
    _publish(scratch / entry["table"], folder / entry["table"])
    print(f"the table of {split} was restored from its tars")
    return True


def drop(folder: Path, report: Report, broken: list[Job], scratch: Path, workers: int) -> set[str]:
    """Take the broken clips out of tars and index; the names of the tars to look at again."""
    todo = [Salvage(job, scratch) for job in broken]
    num_clips = sum(len(job.rows) for job in broken)
    results = dict(pool.run(salvage, todo, num_workers=workers, num_clips=num_clips, title="repair"))
    saved: dict[str, Salvaged] = {}
    for position, job in enumerate(broken):
        made = results[position]
        if made.shard == job.shard:
            _publish(scratch / job.shard.file, job.path)
            print(f"{job.shard.file} was damaged beside its clips only, and is as it was built again")
            continue
        saved[job.shard.file] = made
        if made.shard is not None and not made.lost:
            print(
                f"{job.shard.file} was changed where no check can tell: all its clips are kept, in "
                f"{made.shard.file}. Only a rebuild makes them as they were."
            )
    if saved:
        _commit(folder, report, saved, {job.split for job in broken if job.shard.file in saved}, scratch)
        lost = [sentence for made in saved.values() for sentence in made.lost]
        print(f"dropped {len(lost):,} clips" + "".join(f"\n  {sentence}" for sentence in lost))
    written = {made.shard.file for made in saved.values() if made.shard is not None}
    return written | {job.shard.file for job in broken}


def _commit(
    folder: Path, report: Report, saved: Mapping[str, Salvaged], splits: set[str], scratch: Path
) -> None:
    """Bring the new tars and tables to their places, then the index.json that names them; the old ones go."""
    manifest = json.loads(json.dumps(report.manifest))
    for split in splits:
        manifest["splits"][split] = _new_split(report, split, saved, scratch)
        manifest.get("source", {}).pop(split, None)  # it is no longer all that the source gives
    lost = [sentence for made in saved.values() for sentence in made.lost]
    if lost:
        entry = manifest["skipped"].setdefault(_DROPPED, {"count": 0, "examples": []})
        entry["count"] += len(lost)
        entry["examples"] = (entry["examples"] + lost)[:_NUM_EXAMPLES]
    manifest["replaced"] = sorted(_files(report.manifest) - _files(manifest))
    for name in _files(manifest) - _files(report.manifest):
        _publish(scratch / name, folder / name)
    (scratch / "index.json").write_bytes(index_json(manifest))
    _publish(scratch / "index.json", folder / "index.json")
    _remove_replaced(folder, manifest)


def _new_split(report: Report, split: str, saved: Mapping[str, Salvaged], scratch: Path) -> dict[str, Any]:
    """A split's entry of index.json without what is lost; its table is written to `scratch`."""
    rows: list[dict[str, Any]] = []
    shards: list[Shard] = []
    for job in report.jobs:
        if job.split != split:
            continue
        made = saved.get(job.shard.file, Salvaged(job.rows, job.shard))
        if made.shard is not None:
            rows += [row | {"shard": len(shards)} for row in made.rows]
            shards.append(made.shard)
    if not rows:
        raise UserError(f"a split must keep a clip, but no clip of {split} is whole. Build the shards again.")
    table = scratch / f"{split}.safetensors"
    entry = write_table(table, rows)
    entry["table"] = f"{split}-{entry['table_sha256'][:8]}.safetensors"
    table.rename(table.with_name(entry["table"]))
    return entry | {"shards": [vars(shard) for shard in shards]}


def salvage(job: Salvage) -> Salvaged:
    """Write a tar's whole clips into a new one, named after its content; in a worker process."""
    source, made = job.job, Salvaged()
    try:
        content = read_only(source.path)
    except OSError as error:
        why = f"was in a tar that must be readable, but {error.strerror}"
        made.lost = [f"{source.split} {row['id']} ({row['key']}) {why}" for row in source.rows]
        return made
    path = job.scratch / source.shard.file
    with ShardWriter(path, 0) as tar:
        for row in source.rows:
            faults = check_clip(content, row)
            if faults:
                made.lost.append(f"{source.split} {row['id']} ({row['key']}) {faults[0]}")
            else:
                made.rows.append(_copy(content, row, tar))
            pool.check_stop()
            pool.tick()
    if not made.rows:
        path.unlink()
        return made
    made.shard = tar.shard_entry
    if made.shard != source.shard:
        base = re.sub(r"-[0-9a-f]{8}$", "", path.stem)
        made.shard = Shard(**vars(made.shard) | {"file": f"{base}-{made.shard.sha256[:8]}.tar"})
        path.rename(path.with_name(made.shard.file))
    return made


def _copy(content: memoryview, row: dict[str, Any], tar: ShardWriter) -> dict[str, Any]:
    _, begin, json_begin, json_end = clip_span(content, row)
    clip = bytes(content[begin : begin + row["size"]])
    facts = json.loads(bytes(content[json_begin:json_end]))
    return tar.add_clip(row["key"], clip, **facts)


def rebuild(report: Report, broken: list[Job], source: Path, scratch: Path, workers: int) -> set[str]:
    """Make broken tars again from the corpus; only what has the checksum of the index takes its place.

    The names of the tars that were broken.
    """
    if not broken:
        return set()
    options, clips = read_source(report.manifest, source)
    # Every tar is one job, however large it becomes, and what cannot be decoded now is left out of it.
    options = replace(options, mb_per_shard=None, clips_per_shard=1)
    todo = [
        jobs.ShardJob(
            job.path.stem, scratch, job.split,
            [clips[job.split, row["key"]] for row in job.rows if (job.split, row["key"]) in clips],
            options, num_skippable=len(job.rows), num_rows=len(job.rows),
        )
        for job in broken
    ]  # fmt: skip
    num_clips = sum(len(job.clips) for job in todo)
    for position, faults in pool.run(
        jobs.write_job, todo, num_workers=workers, num_clips=num_clips, title="rebuild"
    ):
        job, (record, *_) = broken[position], jobs.records(todo[position])
        if record.shard is not None and record.shard["sha256"] == job.shard.sha256:
            _publish(scratch / record.file, job.path)
            print(f"{job.shard.file} was rebuilt, byte by byte as it was")
        else:
            changed = "the source, or a library that decodes or encodes, has changed"
            why = faults[0].sentence.rstrip(".") if faults else changed
            print(
                f"{job.shard.file} cannot be rebuilt as it was: {why}. --repair=drop keeps its whole clips."
            )
    return {job.shard.file for job in broken}


def _publish(path: Path, target: Path) -> None:
    """Move a finished file to its place, readable by others, and safe on the disk."""
    path.chmod(0o644)
    sync(path)
    move(path, target)
