"""Every byte of a shard folder against its index: python shards/verify.py FOLDER [--repair=drop|rebuild].

One line for each fault and exit code 1, or one line that says that all is well.
"""

import hashlib
import json
import mmap
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flallm_ds.data.codecs.decode import EXTENSIONS, decode_frames, extension_of
from flallm_ds.data.index import STRING_COLUMNS, Shard, check_video, iter_rows, load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.features.facts import FeatureFacts, from_npy
from flallm_ds.files import open_regular
from flallm_ds.sharding import pool, stats

BLOCK = 512  # of a tar
_FACTS = ({*STRING_COLUMNS} - {"key"}) | {"num_frames", "height", "width"}  # in the index and in the JSON
_FRAMES_AT_ONCE = 64  # decoded together: enough for a group of H.264
_BYTES_AT_ONCE = 2**28  # of these frames, so that large ones fit into any memory


class ShardFault(UserError):
    """The shards are not what their index says."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """One tar to check, with its rows of the index. features: what its clips are, none for video."""

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
    """What a check found. faults: sentences, those of a tar under its file name, others under their split."""

    manifest: dict[str, Any]
    jobs: list[Job] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    lost_tables: list[str] = field(default_factory=list)  # splits whose table is missing, changed or wrong

    def add(self, place: str, *sentences: str) -> None:
        if sentences:
            self.faults.setdefault(place, []).extend(sentences)

    @property
    def sentences(self) -> list[str]:
        return sorted(sentence for sentences in self.faults.values() for sentence in sentences)

    @property
    def splits(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of every split whose table is whole."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for job in self.jobs:
            rows.setdefault(job.split, []).extend(job.rows)
        return rows


def verify(
    folder: Path,
    *,
    workers: int = 0,
    repair: Literal["drop", "rebuild"] | None = None,
    source: Path | None = None,
) -> None:
    """Check tars' sizes and checksums, tables, every clip and its JSON, and that every frame decodes.

    Of a folder of features, that every clip's are whole. What splits share is said too: signers and texts in
    notes, source videos in warnings.

    --workers: processes, 0 for one a core.
    --repair: `rebuild` makes broken tars again from the corpus, byte by byte as they were; `drop` takes
        broken clips out of tars and index. Both restore a lost table from whole tars. Let nothing read the
        folder meanwhile. It may be killed at any moment and started again.
    --source: with --repair=rebuild, the corpus, as it was given to build.py.
    """
    if (repair == "rebuild") != (source is not None):
        raise UserError("--repair=rebuild and --source must be given together, but one is missing.")
    if repair is not None:
        again = "Remove broken tars and run launch/features.py as before; mend a broken source first"
        check_video(read_manifest(folder), folder, "--repair", again)
    report = check(folder, workers)
    if repair is not None:
        from flallm_ds.sharding.repair import SCRATCH, mend  # it needs this module

        if report.faults or (folder / SCRATCH).exists():
            print("".join(f"{sentence}\n" for sentence in report.sentences), end="")
            report = mend(folder, report, source, workers)
    if report.faults:
        sentences = report.sentences
        print("\n".join(sentences))
        _print_overlaps(report)
        raise ShardFault(
            f"shards must be as their index says, but {folder} has {len(sentences):,} fault(s), the "
            f"first: {sentences[0]} See --repair in docs/data.md."
        )
    _print_overlaps(report)
    entries = report.manifest["splits"].values()
    num_clips, num_frames = (sum(entry[what] for entry in entries) for what in ("clips", "frames"))
    size = sum(job.shard.bytes for job in report.jobs)
    print(
        f"all is well: {num_clips:,} clips, {num_frames:,} frames, {len(report.jobs):,} shards, "
        f"{size / 1e6:,.1f} MB"
    )


def check(folder: Path, workers: int = 0, only: Collection[str] | None = None) -> Report:
    """Check a folder; only: the file names of the tars to read, all of them by default.

    Raises UserError if the folder has no index.json that can be read.
    """
    report = Report(read_manifest(folder))
    known: set[str] = set()
    for split, entry in report.manifest["splits"].items():
        known |= {shard["file"] for shard in entry["shards"]}
        try:
            index = load_index(folder, split)
        except UserError as error:
            report.add(split, str(error))
            report.lost_tables.append(split)
            continue
        rows: list[list[dict[str, Any]]] = [[] for _ in range(index.num_shards)]
        for row in iter_rows(index):
            rows[row["shard"]].append(row)
        facts = index.features[0] if index.features else None
        views = [part for part in rows for _ in range(facts.views if facts else 1)]
        report.jobs += [
            Job(folder / s.file, split, s, r, facts) for s, r in zip(index.shards, views, strict=True)
        ]
        for what, count in (("clips", len(index)), ("frames", int(index.num_frames.sum()))):
            if count != entry[what]:
                report.add(split, f"{split} must hold {entry[what]:,} {what}, but its table holds {count:,}.")
    for name in sorted({path.name for path in folder.glob("*.tar")} - known):
        report.add("", f"{name} is no part of the index, and no repair touches it.")
    jobs = [job for job in report.jobs if only is None or job.shard.file in only]
    num_clips = sum(len(job.rows) for job in jobs)
    for position, found in pool.run(
        check_shard, jobs, num_workers=workers, num_clips=num_clips, title="verify"
    ):
        report.add(jobs[position].shard.file, *found)
    return report


def _print_overlaps(report: Report) -> None:
    leaks = stats.leakage_notes(report.splits)
    for note in stats.overlap_notes(report.splits):
        print(f"{'warning' if note in leaks else 'note'}: {note}")


def check_shard(job: Job) -> list[str]:
    """One sentence for each fault of one tar."""
    name = job.shard.file
    try:
        size = job.path.stat().st_size
        if size != job.shard.bytes or not size:
            return [f"{name} must hold {job.shard.bytes:,} bytes, but holds {size:,}."]
        content = read_only(job.path)
    except OSError as error:
        return [f"{name} must be readable, but {error.strerror}."]
    faults = []
    if hashlib.sha256(content).hexdigest() != job.shard.sha256:
        faults.append(f"{name} must have the checksum that its index says, but was changed.")
    if len(job.rows) != job.shard.clips:
        faults.append(f"{name} must hold {job.shard.clips:,} clips, but its table has {len(job.rows):,}.")
    try:
        members = [member for member, _, _ in tar_members(content)]
    except ValueError as error:
        faults.append(f"{name} must be a tar file, but {error}.")
    else:
        keys, extensions = [row["key"] for row in job.rows], {f".{extension}" for extension in job.extensions}
        clips, facts = [Path(member) for member in members[::2]], members[1::2]
        if (
            [clip.stem for clip in clips] != keys
            or {clip.suffix for clip in clips} - extensions
            or facts != [f"{key}.json" for key in keys]
        ):
            faults.append(f"{name} must hold the members that its index names, in order, but holds others.")
    for row in job.rows:
        check = (
            check_clip(content, row) if job.features is None else check_features(content, row, job.features)
        )
        faults += [f"{name} {row['key']} {fault}." for fault in check]
        pool.check_stop()
        pool.tick()
    return faults


def read_only(path: Path) -> memoryview:
    """A file's bytes, mapped. Raises OSError; an empty file has none."""
    with open_regular(path) as file:
        if not file.seek(0, 2):
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def tar_members(content: memoryview) -> list[tuple[str, int, int]]:
    """(name, offset of its bytes, size) of every member, in order. Raises ValueError for a tar not whole."""
    members = []
    position = 0
    while bytes(content[position : position + BLOCK]).strip(b"\0"):
        name, size = _header(content, position)
        members.append((name, position + BLOCK, size))
        position += BLOCK + size + -size % BLOCK
    if position + 2 * BLOCK > len(content):
        raise ValueError("it ends too early")
    return members


def _header(content: memoryview, position: int) -> tuple[str, int]:
    """(name, size) of the member whose header is at `position`."""
    try:
        header = tarfile.TarInfo.frombuf(bytes(content[max(0, position) :][:BLOCK]), "utf-8", "strict")
    except tarfile.TarError as error:
        raise ValueError(f"a header in it is broken ({error})") from error
    return header.name, header.size


def clip_span(
    content: memoryview, row: dict[str, Any], extensions: Collection[str] = EXTENSIONS
) -> tuple[int, int, int, int]:
    """Where a clip's member and its JSON lie: begin of the first header, of the clip, of the JSON, its end.

    Raises ValueError, the rest of a sentence about the clip, if the two are not where the index says.
    """
    key, begin, end = row["key"], row["offset"], row["offset"] + row["size"]
    json_begin = end + -row["size"] % BLOCK + BLOCK
    try:
        name, size = _header(content, begin - BLOCK)
        json_name, json_size = _header(content, json_begin - BLOCK)
    except ValueError as error:
        raise ValueError("must lie where the index says, but does not") from error
    if name not in [f"{key}.{extension}" for extension in extensions] or size != row["size"]:
        raise ValueError("must lie where the index says, but does not")
    if json_name != f"{key}.json":
        raise ValueError("must have a JSON member behind it, but has none")
    if json_begin + json_size > len(content):
        raise ValueError("must be whole, but its shard ends before it")
    return begin - BLOCK, begin, json_begin, json_begin + json_size


def check_clip(content: memoryview, row: dict[str, Any]) -> list[str]:
    """What is wrong with one clip of a tar, each the rest of a sentence."""
    try:
        header, begin, json_begin, json_end = clip_span(content, row)
        clip = content[begin : begin + row["size"]]
        if _header(content, header)[0] != f"{row['key']}.{extension_of(clip)}":
            raise ValueError("must be of the kind that its name says, but is not")
    except ValueError as error:
        return [str(error)]
    return _check_frames(clip, row) + _check_facts(bytes(content[json_begin:json_end]), row)


def check_features(content: memoryview, row: dict[str, Any], facts: FeatureFacts) -> list[str]:
    """What is wrong with one clip's features, each the rest of a sentence."""
    kept = facts.sampling.num_kept(np.array([row["num_frames"]]), np.array([row["fps"]]))
    try:
        _, begin, _, _ = clip_span(content, row, ["npy"])
        from_npy(content[begin : begin + row["size"]], (int(kept[0]), facts.width), facts.dtype)
    except ValueError as error:
        return [f"is broken: {error}"]
    return []


def _check_frames(clip: memoryview, row: dict[str, Any]) -> list[str]:
    num_frames, hw = row["num_frames"], (row["height"], row["width"])
    at_once = max(1, min(num_frames, _FRAMES_AT_ONCE, _BYTES_AT_ONCE // (3 * hw[0] * hw[1])))
    frames = np.empty((at_once, *hw, 3), np.uint8)
    for first in range(0, num_frames, at_once):
        picks = np.arange(first, min(first + at_once, num_frames))
        try:
            decode_frames(clip, picks, num_frames, frames[: len(picks)], hw)
        except ValueError as error:
            return [f"is broken in frames {picks[0]} to {picks[-1]}: {str(error).rstrip('.')}"]
    return []


def _check_facts(content: bytes, row: dict[str, Any]) -> list[str]:
    try:
        facts = json.loads(content)
        agree = all(facts[column] == row[column] for column in _FACTS)
        agree = agree and abs(facts["fps"] - row["fps"]) < 1e-3
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"must have a JSON member, but it cannot be read ({error})"]
    return [] if agree else ["must have a JSON member that agrees with the index, but does not"]
