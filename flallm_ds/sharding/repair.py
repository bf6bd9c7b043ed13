"""Mend a shard folder, for `shards/verify.py --repair`.

New files are written in a folder of their own and then moved to names that nothing refers
to yet; index.json changes last and at once. So a repair that is killed leaves the folder
as it was, or mended.
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

# The kind under which index.json counts dropped clips, among those that were skipped.
_DROPPED = "dropped by a repair"
_NUM_EXAMPLES = 3
# The folder of unfinished files. verify.py finds by it that a repair was killed.
SCRATCH = "repair.partial"


def mend(folder: Path, report: Report, source: Path | None, workers: int) -> Report:
    """Mend what can be mended, print what was done, and return what is still wrong.

    source: the corpus, to rebuild broken tars from; without it their broken clips are
    dropped. Raises UserError if the disk or the source refuses, or if a split would be
    left without clips.
    """
    try:
        with _alone(folder), _scratch(folder) as scratch:
            _remove_replaced(folder, report.manifest)
            # Tables first: without its table a split has no rows to check its tars against.
            restored = False
            for split in report.lost_tables:
                restored |= restore_table(folder, report, split, scratch)
            if restored:
                report = check(folder, workers)
            broken = [tar for tar in report.tars if tar.shard.file in report.faults]
            if source is None:
                touched = drop(folder, report, broken, scratch, workers)
            else:
                touched = rebuild(report, broken, source, scratch, workers)
            return check(folder, workers, only=touched)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"a repair must write to {folder}, but {reason}. Nothing is lost; make that "
            "possible, and start it again."
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two repairs of one folder would undo each other."""
    handle = take_folder_lock(folder)
    if handle is None:
        raise UserError(
            f"one repair at a time must be at work, but another is at work on {folder}. "
            "Wait for it."
        )
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make an empty folder on the same disk, and remove it at the end."""
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(manifest: Mapping[str, Any]) -> set[str]:
    """Return the names of the tables and tars that an index.json names."""
    names = set()
    for entry in manifest["splits"].values():
        names.add(entry["table"])
        for shard in entry["shards"]:
            names.add(shard["file"])
    return names


def _remove_replaced(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove the files that a repair has replaced, which a killed one may not have done."""
    for name in set(manifest.get("replaced", ())) - _files(manifest):
        # Only the last part of the name: nothing outside the folder may be removed.
        (folder / Path(name).name).unlink(missing_ok=True)


def restore_table(folder: Path, report: Report, split: str, scratch: Path) -> bool:
    """Make a split's lost table again from its tars; False if the result is another table."""
    entry = report.manifest["splits"][split]
    rows: list[dict[str, Any]] = []
    try:
        for number, shard in enumerate(entry["shards"]):
            rows += _rows_of_tar(folder / shard["file"], number)
        made = write_table(scratch / entry["table"], rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        made = {}
    # The checksum decides: a table that only looks right is not restored.
    if made.get("table_sha256") != entry["table_sha256"]:
        cause = "because its tars are not whole"
        print(f"the table of {split} cannot be restored, {cause}. Build it again.")
        return False
    _publish(scratch / entry["table"], folder / entry["table"])
    print(f"the table of {split} was restored from its tars")
    return True


def _rows_of_tar(path: Path, number: int) -> list[dict[str, Any]]:
    """Return the index rows of the clips of a tar: what their JSON says, and where they lie."""
    content = read_only(path)
    members = tar_members(content)
    rows = []
    # Clips are at even positions, each followed by its JSON.
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
    """Take the broken clips out of tars and index.

    Returns the names of the tars to check again.
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
    # In the order of the index, not in that in which the workers finished.
    for position, tar in enumerate(broken):
        made = results[position]
        name = tar.shard.file
        to_check.add(name)
        # Written again, the clips gave the checksum of the index: nothing was lost.
        if made.shard == tar.shard:
            _publish(scratch / name, tar.path)
            print(f"{name} was damaged beside its clips only, and is as it was built again")
            continue
        saved[name] = made
        lost += made.lost
        if made.shard is not None:
            to_check.add(made.shard.file)
        if made.shard is not None and not made.lost:
            print(
                f"{name} was changed where no check can tell: all its clips are kept, in "
                f"{made.shard.file}. Only a rebuild makes them as they were."
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
    """Move the new tars and tables to their places, then the index.json that names them.

    The old files are removed last. lost: one sentence for each clip that is lost.
    """
    manifest = copy.deepcopy(report.manifest)
    changed = set()
    for tar in report.tars:
        if tar.shard.file in saved:
            changed.add(tar.split)
    for split in sorted(changed):
        manifest["splits"][split] = _new_split(report, split, saved, scratch)
        # The split is no longer all that the source gives.
        manifest.get("source", {}).pop(split, None)
    if lost:
        entry = manifest["skipped"].setdefault(_DROPPED, {"count": 0, "examples": []})
        entry["count"] += len(lost)
        entry["examples"] = (entry["examples"] + lost)[:_NUM_EXAMPLES]
    # index.json lists the files that it replaces: a repair that is killed before it removes
    # them is finished by the next one.
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
    """Write a split's table without what is lost to `scratch`; return its entry of index.json."""
    rows: list[dict[str, Any]] = []
    shards: list[Shard] = []
    for tar in report.tars:
        if tar.split != split:
            continue
        # An undamaged tar keeps its clips and its file; a tar without clips is left out.
        made = saved.get(tar.shard.file, Salvaged(tar.rows, tar.shard))
        if made.shard is not None:
            for row in made.rows:
                rows.append(row | {"shard": len(shards)})
            shards.append(made.shard)
    if not rows:
        remedy = "Build the shards again."
        raise UserError(
            f"a split must keep a clip, but no clip of {split} is whole. {remedy}"
        )
    # Named after its content: the old table must stay until index.json names the new one.
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
    """Make broken tars again from the corpus, and keep those that have the checksum of the index.

    Returns the names of the tars that were broken.
    """
    if not broken:
        return set()
    options, clips = read_source(report.manifest, source)
    # Every tar is one job, however large it becomes. A clip that cannot be decoded now is
    # left out of the tar, which then has another checksum.
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
        # Replace the broken tar only by exactly the tar that the index describes.
        if record.shard is not None and record.shard["sha256"] == tar.shard.sha256:
            _publish(scratch / record.file, tar.path)
            print(f"{tar.shard.file} was rebuilt, byte by byte as it was")
        else:
            why = "the source, or a library that decodes or encodes, has changed"
            if faults:
                why = faults[0].sentence.rstrip(".")
            remedy = "--repair=drop keeps its whole clips."
            print(f"{tar.shard.file} cannot be rebuilt as it was: {why}. {remedy}")
    return {tar.shard.file for tar in broken}


def _publish(path: Path, target: Path) -> None:
    """Move a finished file to its place, readable by others, and safe on the disk."""
    path.chmod(0o644)
    sync(path)
    move(path, target)
