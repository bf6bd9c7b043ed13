"""Repair a shard folder, for `shards/verify.py --repair`.

New files are written to a temporary folder and moved to names that index.json does not use
yet. index.json is replaced last, in one step. So a repair that is killed leaves the folder
either as it was or repaired.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flallm_ds.data.index import Shard, write_table
from flallm_ds.errors import UserError
from flallm_ds.files import move, sync, take_folder_lock
from flallm_ds.sharding import jobs, pool
from flallm_ds.sharding.check import Report, TarCheck, check, read_only, tar_members
from flallm_ds.sharding.rows import read_source
from flallm_ds.sharding.salvage import Salvage, Salvaged, salvage
from flallm_ds.sharding.writer import index_json

# The kind of fault under which index.json counts dropped clips.
_DROPPED = "dropped by a repair"
_NUM_EXAMPLES = 3
# The folder of temporary files. If it exists, a repair was killed.
SCRATCH = "repair.partial"


def repair_folder(
    folder: Path, report: Report, source: Path | None, workers: int
) -> Report:
    """Repair the faults of a report, print what was done, and return the remaining faults.

    source: the corpus, to rebuild broken tars; None to drop broken clips. Raises UserError
    if the folder cannot be written, if the source is wrong, or if a split would have no
    clips left.
    """
    try:
        with _lock(folder), _scratch(folder) as scratch:
            _remove_replaced(folder, report.manifest)
            # Tables first: the tars of a split are checked against its table.
            restored = False
            for split in report.lost_tables:
                restored |= restore_table(folder, report, split, scratch)
            if restored:
                report = check(folder, workers)
            # With a restored table, the report is that of the second check.
            broken = [tar for tar in report.tars if tar.shard.file in report.faults]
            if source is None:
                touched = drop(folder, report, broken, scratch, workers)
            else:
                touched = rebuild(report, broken, source, scratch, workers)
            return check(folder, workers, only=touched)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"Cannot repair {folder}: {reason}. Nothing is lost. Fix the cause and run the "
            "same command again."
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock the folder. Raises UserError if another repair is running."""
    handle = take_folder_lock(folder)
    if handle is None:
        raise UserError(f"{folder} is in use by another repair. Wait for it, or stop it.")
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Create an empty folder on the same disk, and remove it at the end."""
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(manifest: Mapping[str, Any]) -> set[str]:
    """Return the file names of all tables and tars in an index.json."""
    names = set()
    for entry in manifest["splits"].values():
        names.add(entry["table"])
        for shard in entry["shards"]:
            names.add(shard["file"])
    return names


def _remove_replaced(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove the files that a repair has replaced. A killed repair may have left them."""
    for name in set(manifest.get("replaced", ())) - _files(manifest):
        # Use only the last part of the name, so that no file outside the folder is removed.
        (folder / Path(name).name).unlink(missing_ok=True)


def restore_table(folder: Path, report: Report, split: str, scratch: Path) -> bool:
    """Restore the table of a split from the tars.

    Returns False if that is not possible. Prints the result.
    """
    entry = report.manifest["splits"][split]
    rows: list[dict[str, Any]] = []
    try:
        for number, shard in enumerate(entry["shards"]):
            rows += _rows_of_tar(folder / shard["file"], number)
        made = write_table(scratch / entry["table"], rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        made = {}
    # Use the new table only if it has the checksum of the lost one.
    if made.get("table_sha256") != entry["table_sha256"]:
        cause = "the tars are damaged"
        print(f"Cannot restore the table of {split}: {cause}. Build the shards again.")
        return False
    _publish(scratch / entry["table"], folder / entry["table"])
    print(f"the table of {split} was restored from its tars")
    return True


def _rows_of_tar(path: Path, number: int) -> list[dict[str, Any]]:
    """Return the rows of the index for a tar, from the JSON and the place of each clip."""
    content = read_only(path)
    members = tar_members(content)
    rows = []
    # Clips are at even positions, and the JSON of a clip follows it.
    for clip, facts in zip(members[::2], members[1::2], strict=True):
        name, offset, size = clip
        _, facts_begin, facts_size = facts
        row = json.loads(bytes(content[facts_begin : facts_begin + facts_size]))
        place = {"key": Path(name).stem, "shard": number, "offset": offset, "size": size}
        rows.append(row | place)
    return rows


def drop(
    folder: Path,
    report: Report,
    broken: list[TarCheck],
    scratch: Path,
    workers: int,
) -> set[str]:
    """Remove the broken clips from the tars and from the index.

    Returns the file names of the tars to check again.
    """
    todo = [Salvage(tar, scratch) for tar in broken]
    num_clips = sum(len(tar.rows) for tar in broken)
    found = pool.run(
        salvage, todo, num_workers=workers, num_clips=num_clips, title="repair"
    )
    results = dict(found)
    saved: dict[str, Salvaged] = {}
    lost: list[str] = []
    to_check: set[str] = set()
    # In the order of the index, not of the workers.
    for position, tar in enumerate(broken):
        made = results[position]
        name = tar.shard.file
        to_check.add(name)
        # The new tar has the checksum of the index: no clip was damaged.
        if made.shard == tar.shard:
            _publish(scratch / name, tar.path)
            print(f"{name} was damaged outside its clips only, and is restored")
            continue
        saved[name] = made
        lost += made.lost
        if made.shard is not None:
            to_check.add(made.shard.file)
        if made.shard is not None and not made.lost:
            print(
                f"{name} has a change that no check can locate: all its clips are kept, in "
                f"{made.shard.file}. Only --repair=rebuild restores the original."
            )
    if saved:
        _commit(folder, report, saved, lost, scratch)
        print(f"dropped {len(lost):,} clips")
        for sentence in lost:
            print(f"  {sentence}")
    return to_check


def _commit(
    folder: Path,
    report: Report,
    saved: Mapping[str, Salvaged],
    lost: list[str],
    scratch: Path,
) -> None:
    """Publish the new tars and tables, then the new index.json, then remove the old files.

    lost: one sentence for each clip that is lost.
    """
    manifest = copy.deepcopy(report.manifest)
    changed = set()
    for tar in report.tars:
        if tar.shard.file in saved:
            changed.add(tar.split)
    for split in sorted(changed):
        manifest["splits"][split] = _new_split(report, split, saved, scratch)
        # The split no longer has all clips of the source, so its digest does not hold.
        manifest.get("source", {}).pop(split, None)
    # Add to the counts of the build and of earlier repairs.
    if lost:
        entry = manifest["skipped"].setdefault(_DROPPED, {"count": 0, "examples": []})
        entry["count"] += len(lost)
        entry["examples"] = (entry["examples"] + lost)[:_NUM_EXAMPLES]
    # index.json lists the files that were replaced. If this repair is killed before it
    # removes them, the next repair does.
    before, now = _files(report.manifest), _files(manifest)
    manifest["replaced"] = sorted(before - now)
    for name in now - before:
        _publish(scratch / name, folder / name)
    (scratch / "index.json").write_bytes(index_json(manifest))
    _publish(scratch / "index.json", folder / "index.json")
    _remove_replaced(folder, manifest)


def _new_split(
    report: Report,
    split: str,
    saved: Mapping[str, Salvaged],
    scratch: Path,
) -> dict[str, Any]:
    """Write the table of a split without the lost clips. Return the entry of index.json."""
    rows: list[dict[str, Any]] = []
    shards: list[Shard] = []
    for tar in report.tars:
        if tar.split != split:
            continue
        # An undamaged tar is kept as it is. A tar without clips is left out.
        made = saved.get(tar.shard.file, Salvaged(tar.rows, tar.shard))
        if made.shard is not None:
            for row in made.rows:
                rows.append(row | {"shard": len(shards)})
            shards.append(made.shard)
    if not rows:
        raise UserError(
            f"Cannot drop the broken clips of {split}: no clip would remain. Build the shards "
            "again."
        )
    # Name the table after its content: the old table is needed until index.json changes.
    table = scratch / f"{split}.safetensors"
    entry = write_table(table, rows)
    entry["table"] = f"{split}-{entry['table_sha256'][:8]}.safetensors"
    table.rename(table.with_name(entry["table"]))
    return entry | {"shards": [vars(shard) for shard in shards]}


def rebuild(
    report: Report,
    broken: list[TarCheck],
    source: Path,
    scratch: Path,
    workers: int,
) -> set[str]:
    """Build broken tars again from the corpus.

    A new tar is used only if it has the checksum of the index. Returns the file names of
    the broken tars.
    """
    if not broken:
        return set()
    options, clips = read_source(report.manifest, source)
    # Every tar is one job of any size. If a clip cannot be decoded now, it is missing in
    # the new tar, which then has another checksum.
    options = replace(options, mb_per_shard=None, clips_per_shard=1)
    todo = []
    for tar in broken:
        tar_clips = []
        for row in tar.rows:
            place = (tar.split, row["key"])
            if place in clips:
                tar_clips.append(clips[place])
        job = jobs.ShardJob(
            name=tar.path.stem,
            folder=scratch,
            split=tar.split,
            clips=tar_clips,
            options=options,
            num_skippable=len(tar.rows),
            num_rows=len(tar.rows),
        )
        todo.append(job)
    num_clips = sum(len(job.clips) for job in todo)
    results = pool.run(
        jobs.write_job,
        todo,
        num_workers=workers,
        num_clips=num_clips,
        title="rebuild",
    )
    for position, faults in results:
        tar, record = broken[position], jobs.records(todo[position])[0]
        # Never replace a tar with one that differs from the index.
        if record.shard is not None and record.shard["sha256"] == tar.shard.sha256:
            _publish(scratch / record.file, tar.path)
            print(f"{tar.shard.file} was rebuilt and is identical to the original")
        else:
            why = "the source, or a library that decodes or encodes, has changed"
            if faults:
                why = faults[0].sentence.rstrip(".")
            remedy = "Use --repair=drop to keep its undamaged clips."
            print(f"Cannot rebuild {tar.shard.file}: {why}. {remedy}")
    return {tar.shard.file for tar in broken}


def _publish(path: Path, target: Path) -> None:
    """Flush a finished file to the disk, make it readable for all users, and move it."""
    path.chmod(0o644)
    sync(path)
    move(path, target)
