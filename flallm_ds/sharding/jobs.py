"""Divide the clips of a build into jobs, and write the tars of each job in one worker.

A job writes one tar, or several with a size limit. A finished tar is named after its job
and has a record next to it, with the rows of the tar and the clips that are done. A stopped
job continues after its last record. At the end, `collect` numbers the tars of each split.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flallm_ds.data.codecs.video import BrokenVideo
from flallm_ds.data.index import Shard
from flallm_ds.errors import UserError
from flallm_ds.files import move, write_json
from flallm_ds.sharding import pool
from flallm_ds.sharding.corpora import Row
from flallm_ds.sharding.encode import Encoded, encode_clip
from flallm_ds.sharding.faults import Fault, over_budget
from flallm_ds.sharding.options import Options
from flallm_ds.sharding.rows import Clip
from flallm_ds.sharding.writer import SHARD_NAME, ShardWriter

# Clips of each split that are encoded to find how many fill a shard of --mb_per_shard.
_NUM_MEASURED = 32
# Fraction of the size limit that a job should fill. With a margin, a job whose clips are
# larger than the measured ones seldom needs two tars.
_FILLED = 0.85


@dataclass(frozen=True)
class ShardJob:
    """Hold the clips that one worker writes, and the folder of the tars."""

    name: str
    folder: Path
    split: str
    clips: list[Clip]
    options: Options
    # Maximum number of clips that all jobs together may skip.
    num_skippable: int
    # Rows of the whole corpus, for the error message.
    num_rows: int


@dataclass
class Record:
    """Record the content of a finished tar, and its skipped and shortened clips."""

    file: str
    # Rows of the index.
    rows: list[dict[str, Any]] = field(default_factory=list)
    # The tar's entry in index.json; None if every clip was skipped.
    shard: dict[str, Any] | None = None
    faults: list[Fault] = field(default_factory=list)
    # Ids of clips that end after their video.
    clamped: list[str] = field(default_factory=list)
    # Stamps of all clips that are done, including skipped ones. A stopped job continues
    # after them.
    stamps: list[str] = field(default_factory=list)
    # Whether this is the last tar of its job.
    last: bool = False


def plan(
    clips: dict[str, list[Clip]],
    clips_per_job: dict[str, int],
    folder: Path,
    options: Options,
    num_skippable: int,
    num_rows: int,
) -> list[ShardJob]:
    """Divide the clips of each split, in stored order, into jobs of nearly equal size."""
    jobs = []
    for split, some in clips.items():
        # Round the number of jobs up, then distribute the clips evenly: sizes differ by at
        # most one, and no split ends with a tiny shard.
        num_jobs = -(-len(some) // clips_per_job[split])
        for n in range(num_jobs):
            part = some[n * len(some) // num_jobs : (n + 1) * len(some) // num_jobs]
            name = f"{split}-{n:06d}"
            jobs.append(
                ShardJob(name, folder, split, part, options, num_skippable, num_rows)
            )
    return jobs


def clips_for_size(clips: dict[str, list[Clip]], options: Options) -> dict[str, int]:
    """Return the number of clips per shard for each split, estimated from a few clips."""
    assert options.mb_per_shard is not None
    # Select clips that are evenly spaced over each split, each once.
    tasks: list[tuple[str, Row, Options]] = []
    for split, some in clips.items():
        if some:
            picks = np.unique(np.linspace(0, len(some) - 1, _NUM_MEASURED).astype(int))
            for n in picks:
                tasks.append((split, some[n].row, options))
    sizes: dict[str, list[int]] = {}
    results = pool.run(
        _measure,
        tasks,
        num_workers=options.workers,
        num_clips=len(tasks),
        title="measure",
    )
    for position, size in results:
        split = tasks[position][0]
        if size:
            sizes.setdefault(split, []).append(size)
    # A split without a measured clip is empty, or its clips do not decode. It gets one clip
    # per job.
    wanted = _FILLED * options.mb_per_shard * 1e6
    counts = dict.fromkeys(clips, 1)
    for split, measured in sizes.items():
        counts[split] = max(1, int(wanted / np.mean(measured)))
    return counts


def _measure(task: tuple[str, Row, Options]) -> int:
    """Return the size of a stored clip in bytes, 0 if the video does not decode."""
    _, row, options = task
    try:
        return len(encode_clip(row, options).member)
    except BrokenVideo:
        return 0
    finally:
        pool.tick()


def records(job: ShardJob) -> list[Record]:
    """Return the records of the finished tars of a job."""
    found: list[Record] = []
    while (path := job.folder / f"{job.name}-{len(found):03d}.json").is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        content["faults"] = [Fault(**fault) for fault in content["faults"]]
        found.append(Record(**content))
    return found


def check_stamps(job: ShardJob, done: Sequence[Record]) -> None:
    """Raise UserError if the video of a finished clip has changed since."""
    stamps = chain.from_iterable(record.stamps for record in done)
    # Not strict: the clips after the last stamp are not finished.
    for clip, stamp in zip(job.clips, stamps, strict=False):
        if clip.stamp != stamp:
            raise UserError(
                f"Cannot continue the build: {clip.row.path} has changed since clip "
                f"{clip.row.id} of {job.split} was made. Restore the file, or build again "
                "with --restart=true."
            )


def write_job(job: ShardJob) -> list[Fault]:
    """Write the missing tars of a job and return the faults. Runs in a worker process.

    Raises UserError if the job must skip more clips than the whole build may.
    """
    # One thread, because every core already has a worker.
    cv2.setNumThreads(1)
    # Continue after the clips that earlier calls have finished or skipped.
    done = records(job)
    begin = sum(len(record.stamps) for record in done)
    faults: list[Fault] = []
    tar = _Tar(job, len(done))
    try:
        for clip in job.clips[begin:]:
            made = _encode(job, clip)
            # A skipped clip is recorded with the current tar. A clip that would exceed the
            # size limit starts the next tar.
            if isinstance(made, Fault):
                faults.append(made)
                if len(faults) > job.num_skippable:
                    raise over_budget(faults, job.options.max_skipped, job.num_rows)
            elif tar.is_full(made):
                tar.finish(last=False)
                tar = _Tar(job, tar.number + 1)
            tar.add(clip, made)
        tar.finish(last=True)
    finally:
        # After an error, the current tar is unfinished.
        tar.discard()
    return faults


class _Tar:
    """Write one tar of a job.

    The temporary name has the process id, because a worker of a killed build may still
    write the same tar.
    """

    def __init__(self, job: ShardJob, number: int) -> None:
        self.number = number
        self._job = job
        self._record = Record(f"{job.name}-{number:03d}.tar")
        self._path = job.folder / self._record.file
        self._temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._tar = ShardWriter(self._temporary, 0)

    def is_full(self, made: Encoded) -> bool:
        """Return whether the tar would exceed the size limit with this clip."""
        # A clip larger than the limit gets a tar of its own.
        limit = self._job.options.mb_per_shard
        if limit is None or not self._record.rows:
            return False
        return self._tar.bytes_with(len(made.member)) > limit * 1e6

    def add(self, clip: Clip, made: Encoded | Fault) -> None:
        """Append a clip, or record the reason for skipping it."""
        record, row = self._record, clip.row
        record.stamps.append(clip.stamp)
        if isinstance(made, Fault):
            record.faults.append(made)
            return
        if made.past_end:
            record.clamped.append(row.id)
        facts = {"gloss": row.gloss} if row.gloss else {}
        stored = self._tar.add_clip(
            clip.key,
            made.member,
            num_frames=made.num_frames,
            fps=made.fps,
            height=made.height,
            width=made.width,
            id=row.id,
            text=row.text,
            signer=row.signer,
            video=row.video,
            language=row.language,
            **facts,
        )
        record.rows.append(stored)

    def finish(self, last: bool) -> None:
        """Write the tar to its final name, then its record."""
        self._record.last = last
        # A tar without clips is not kept, but its record is: it lists the clips that are
        # done.
        if self._record.rows:
            self._tar.close()
            self._record.shard = vars(self._tar.shard_entry) | {"file": self._record.file}
            move(self._temporary, self._path)
        write_json(self._path.with_suffix(".json"), asdict(self._record))

    def discard(self) -> None:
        """Remove the temporary file of an unfinished tar."""
        self._tar.abandon()
        self._temporary.unlink(missing_ok=True)


def _encode(job: ShardJob, clip: Clip) -> Encoded | Fault:
    """Encode a clip, or return the reason why it cannot be encoded."""
    try:
        return encode_clip(clip.row, job.options)
    except BrokenVideo as error:
        return Fault("cannot be decoded", f"{job.split} {clip.row.id}: {error}")
    # The clip is too large or too long for its container, which is rare.
    except ValueError as error:
        return Fault("cannot be stored", f"{job.split} {clip.row.id}: {error}")
    finally:
        pool.tick()


@dataclass
class Collected:
    """Hold the results of all jobs.

    splits: (rows of the index, tars) of each split. clamped: ids of clips of each split
    that end after their video.
    """

    splits: dict[str, tuple[list[dict[str, Any]], list[Shard]]] = field(
        default_factory=dict
    )
    faults: list[Fault] = field(default_factory=list)
    clamped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each split, without the tars."""
        return {split: rows for split, (rows, _) in self.splits.items()}


def collect(jobs: Sequence[ShardJob], folder: Path) -> Collected:
    """Move the finished tars to `folder` and number them.

    A job without clips leaves no gap. May be called again after an interruption. Raises
    UserError if a tar is missing.
    """
    collected = Collected()
    # In the order of `plan`, not of the workers: every build gives a tar the same number.
    for job in jobs:
        for record in records(job):
            collected.faults += record.faults
            collected.clamped.setdefault(job.split, []).extend(record.clamped)
            if record.shard is None:
                continue
            rows, shards = collected.splits.setdefault(job.split, ([], []))
            number = len(shards)
            name = SHARD_NAME.format(split=job.split, number=number)
            shard = Shard(**record.shard | {"file": name})
            _take(job.folder / record.file, folder / name, shard.bytes)
            # Workers do not have the number of the tar and write shard 0 into every row.
            for row in record.rows:
                rows.append(row | {"shard": number})
            shards.append(shard)
    return collected


def _take(path: Path, target: Path, size: int) -> None:
    """Move a finished tar of `size` bytes to `target`."""
    # If an earlier call was killed after this move, the file is already at its target.
    if path.exists():
        path.rename(target)
    found = target.stat().st_size if target.exists() else None
    if found != size:
        got = "no file" if found is None else f"{found:,} bytes"
        raise UserError(
            f"Finished shard {target} must have {size:,} bytes, got {got}. It was changed "
            "or removed: build again with --restart=true."
        )
