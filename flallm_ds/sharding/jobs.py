"""The work of a build: jobs of clips, each written by one worker.

A job gives one tar or, at a size limit, several. A finished tar lies under its job's
name, next to a record that says what is in it and which clips are done. A job continues
behind its last record. Numbers within the split are given at the end (`collect`).
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

# Clips of a split that are measured to find how many fill a shard of --mb_per_shard.
_NUM_MEASURED = 32
# Share of a shard's limit that a job should fill: a job of larger clips than those
# measured then seldom becomes two tars.
_FILLED = 0.85


@dataclass(frozen=True)
class ShardJob:
    """Clips for one worker, and where their tars go."""

    name: str
    folder: Path
    split: str
    clips: list[Clip]
    options: Options
    # How many clips may be skipped by all jobs together, and so by one job alone.
    num_skippable: int
    # Rows of the whole corpus, for the error message.
    num_rows: int


@dataclass
class Record:
    """What one finished tar of a job holds, and what was left out or cut short on the way."""

    file: str
    # Rows of the index.
    rows: list[dict[str, Any]] = field(default_factory=list)
    # The tar's entry in index.json; None if every clip was skipped.
    shard: dict[str, Any] | None = None
    faults: list[Fault] = field(default_factory=list)
    # Ids of clips that end later than their video.
    clamped: list[str] = field(default_factory=list)
    # Stamps of all clips that are done, skipped ones included: their number says where
    # the job continues.
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
    """Divide each split's clips, in stored order, into jobs of nearly equal size."""
    jobs = []
    for split, some in clips.items():
        # Round up the number of jobs, then spread the clips: sizes differ by one at most,
        # and no split ends with a tiny shard.
        num_jobs = -(-len(some) // clips_per_job[split])
        for n in range(num_jobs):
            part = some[n * len(some) // num_jobs : (n + 1) * len(some) // num_jobs]
            name = f"{split}-{n:06d}"
            jobs.append(
                ShardJob(name, folder, split, part, options, num_skippable, num_rows)
            )
    return jobs


def clips_for_size(clips: dict[str, list[Clip]], options: Options) -> dict[str, int]:
    """Measure a few clips; return how many of each split go into a shard of --mb_per_shard."""
    assert options.mb_per_shard is not None
    # Pick clips that are evenly spaced over each split, each clip once.
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
    # A split without a measured clip is empty, or its clips do not decode: one clip a job.
    wanted = _FILLED * options.mb_per_shard * 1e6
    counts = dict.fromkeys(clips, 1)
    for split, measured in sizes.items():
        counts[split] = max(1, int(wanted / np.mean(measured)))
    return counts


def _measure(task: tuple[str, Row, Options]) -> int:
    """Return the bytes of a stored clip, 0 for one that does not decode."""
    _, row, options = task
    try:
        return len(encode_clip(row, options).member)
    except BrokenVideo:
        return 0
    finally:
        pool.tick()


def records(job: ShardJob) -> list[Record]:
    """Return what is finished of a job."""
    found: list[Record] = []
    while (path := job.folder / f"{job.name}-{len(found):03d}.json").is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        content["faults"] = [Fault(**fault) for fault in content["faults"]]
        found.append(Record(**content))
    return found


def check_stamps(job: ShardJob, done: Sequence[Record]) -> None:
    """Raise UserError if a clip was made from a video that has changed since."""
    stamps = chain.from_iterable(record.stamps for record in done)
    # Not strict: the clips after the last stamp are not done yet.
    for clip, stamp in zip(job.clips, stamps, strict=False):
        if clip.stamp != stamp:
            raise UserError(
                f"a source must stay as it is while it is built, but {clip.row.path} has "
                f"changed since clip {clip.row.id} of {job.split} was made. Put it back, "
                "or build anew with --restart=true."
            )


def write_job(job: ShardJob) -> list[Fault]:
    """Write what is missing of a job, in a worker process; return the faults that were met.

    Raises UserError once more clips are broken than the whole build may skip.
    """
    # Every core has a worker already.
    cv2.setNumThreads(1)
    done = records(job)
    begin = sum(len(record.stamps) for record in done)
    faults: list[Fault] = []
    tar = _Tar(job, len(done))
    try:
        for clip in job.clips[begin:]:
            made = _encode(job, clip)
            # A skipped clip is recorded with the current tar. A clip that would pass the
            # tar's size limit begins the next one.
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
        # Only an error leaves a tar that was not moved to its final name.
        tar.discard()
    return faults


class _Tar:
    """A tar on its way.

    Its temporary name has the process id: a worker of a killed build may still write the
    same tar.
    """

    def __init__(self, job: ShardJob, number: int) -> None:
        self.number = number
        self._job = job
        self._record = Record(f"{job.name}-{number:03d}.tar")
        self._path = job.folder / self._record.file
        self._temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._tar = ShardWriter(self._temporary, 0)

    def is_full(self, made: Encoded) -> bool:
        # A clip larger than the limit has a tar to itself.
        limit = self._job.options.mb_per_shard
        if limit is None or not self._record.rows:
            return False
        return self._tar.bytes_with(len(made.member)) > limit * 1e6

    def add(self, clip: Clip, made: Encoded | Fault) -> None:
        """Append a clip, or record why it is left out."""
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
        """First the tar, then its record: a record speaks of what is on the disk."""
        self._record.last = last
        # Without clips no tar is kept, but the record still says which clips are done.
        if self._record.rows:
            self._tar.close()
            self._record.shard = vars(self._tar.shard_entry) | {"file": self._record.file}
            move(self._temporary, self._path)
        write_json(self._path.with_suffix(".json"), asdict(self._record))

    def discard(self) -> None:
        """Remove what is not finished."""
        self._tar.abandon()
        self._temporary.unlink(missing_ok=True)


def _encode(job: ShardJob, clip: Clip) -> Encoded | Fault:
    try:
        return encode_clip(clip.row, job.options)
    except BrokenVideo as error:
        return Fault("cannot be decoded", f"{job.split} {clip.row.id}: {error}")
    # The containers have limits on size and length that few clips can reach.
    except ValueError as error:
        return Fault("cannot be stored", f"{job.split} {clip.row.id}: {error}")
    finally:
        pool.tick()


@dataclass
class Collected:
    """What all jobs made: each split's index rows and tars, and what was left out or cut
    short."""

    splits: dict[str, tuple[list[dict[str, Any]], list[Shard]]] = field(
        default_factory=dict
    )
    faults: list[Fault] = field(default_factory=list)
    clamped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Each split's rows, without its tars."""
        return {split: rows for split, (rows, _) in self.splits.items()}


def collect(jobs: Sequence[ShardJob], folder: Path) -> Collected:
    """Give the finished tars their numbers, in `folder`; a tar without clips leaves no gap.

    May be called again after it was interrupted. Raises UserError if a tar is missing.
    """
    collected = Collected()
    # Jobs in the order of `plan`, whatever worker finished first: numbers of tars are the
    # same in every build.
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
            # A worker does not know its tar's number: it wrote shard 0 into every row.
            for row in record.rows:
                rows.append(row | {"shard": number})
            shards.append(shard)
    return collected


def _take(path: Path, target: Path, size: int) -> None:
    """Move a finished tar to `target`, where it may be already."""
    # The file is at its target already if an earlier call was killed after this move.
    if path.exists():
        path.rename(target)
    found = target.stat().st_size if target.exists() else None
    if found != size:
        what = "is missing" if found is None else f"holds {found:,} bytes"
        raise UserError(
            f"a finished shard must hold {size:,} bytes, but {what}: {target}. It was "
            "changed since; build anew with --restart=true."
        )
