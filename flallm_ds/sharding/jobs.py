"""The work of a build: jobs of clips, each written by one worker as one tar or, at a size limit, as several.

A finished tar lies under its job's name, with a record beside it that says what is in it and which clips are
done. A job goes on behind its last record. Numbers within the split are given at the end (`collect`).
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from flallm_ds.data.codecs import avi as clip_format
from flallm_ds.data.codecs import h264
from flallm_ds.data.codecs.video import Box, BrokenVideo, Video
from flallm_ds.data.index import Shard
from flallm_ds.errors import UserError
from flallm_ds.files import move, write_json
from flallm_ds.sharding import pool
from flallm_ds.sharding.corpora import Row
from flallm_ds.sharding.options import Options
from flallm_ds.sharding.writer import SHARD_NAME, ShardWriter

SHUFFLE_SEED = 0  # of the order in which a training split's clips are put into shards
_NUM_MEASURED = 32  # clips of a split whose size says how many go into a shard of so many megabytes
_FILLED = 0.85  # of a shard's limit, so that a job of larger clips than those measured is seldom cut in two


@dataclass(frozen=True)
class Fault:
    """A row that cannot become a clip: the kind, to count by, and one sentence."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Clip:
    """A usable row. key: its number in its table. stamp: sizes and times of its source files."""

    key: str
    row: Row
    stamp: str


@dataclass(frozen=True)
class Job:
    """Clips for one worker, and where their tars go."""

    name: str
    folder: Path
    split: str
    clips: list[Clip]
    options: Options
    num_skippable: int  # of all jobs together; one job alone may not pass it either
    num_rows: int  # of the whole corpus


@dataclass
class Record:
    """What one finished tar of a job holds, and what was left out or cut short on the way."""

    file: str
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the index
    shard: dict[str, Any] | None = None  # its entry in the index; None where no clip was left
    faults: list[Fault] = field(default_factory=list)
    clamped: list[str] = field(default_factory=list)  # ids of clips that end later than their video does
    stamps: list[str] = field(default_factory=list)  # of the clips that are done
    last: bool = False  # of its job


@dataclass(frozen=True)
class Encoded:
    """A clip as it is stored."""

    member: bytes
    num_frames: int
    fps: float
    height: int
    width: int
    past_end: bool  # its span ends more than a frame after its video


def stored_order(split: str, clips: Sequence[Clip]) -> list[Clip]:
    """Training clips in a fixed shuffled order, dev and test in that of their tables."""
    if split != "train":
        return list(clips)
    # Corpora are sorted by broadcast or video: neighbours would share every batch.
    return sorted(clips, key=lambda clip: hashlib.sha256(f"{SHUFFLE_SEED} {clip.key}".encode()).digest())


def plan(
    clips: dict[str, list[Clip]],
    clips_per_job: dict[str, int],
    folder: Path,
    options: Options,
    num_skippable: int,
    num_rows: int,
) -> list[Job]:
    """Each split's clips, in stored order, as jobs of nearly equal size."""
    jobs = []
    for split, some in clips.items():
        num_jobs = -(-len(some) // clips_per_job[split])
        for n in range(num_jobs):
            part = some[n * len(some) // num_jobs : (n + 1) * len(some) // num_jobs]
            jobs.append(Job(f"{split}-{n:06d}", folder, split, part, options, num_skippable, num_rows))
    return jobs


def clips_for_size(clips: dict[str, list[Clip]], options: Options) -> dict[str, int]:
    """How many clips of each split go into a shard of --mb_per_shard, by the sizes of a few of them."""
    assert options.mb_per_shard is not None
    chosen = {
        split: [some[n] for n in np.unique(np.linspace(0, len(some) - 1, _NUM_MEASURED).astype(int))]
        for split, some in clips.items()
        if some
    }
    tasks = [(split, clip.row, options) for split, some in chosen.items() for clip in some]
    sizes: dict[str, list[int]] = {split: [] for split in clips}
    for position, size in pool.run(
        _measure, tasks, num_workers=options.workers, num_clips=len(tasks), title="measure"
    ):
        sizes[tasks[position][0]] += [size] if size else []
    wanted = _FILLED * options.mb_per_shard * 1e6
    return {split: max(1, int(wanted / np.mean(some))) if some else 1 for split, some in sizes.items()}


def _measure(task: tuple[str, Row, Options]) -> int:
    """Bytes of a stored clip, 0 for one that does not decode."""
    try:
        return len(encode_clip(*task[1:]).member)
    except BrokenVideo:
        return 0
    finally:
        pool.tick()


def records(job: Job) -> list[Record]:
    """What is finished of a job."""
    found: list[Record] = []
    while (path := job.folder / f"{job.name}-{len(found):03d}.json").is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        content["faults"] = [Fault(**fault) for fault in content["faults"]]
        found.append(Record(**content))
    return found


def check_stamps(job: Job, done: Sequence[Record]) -> None:
    """Raise UserError if a clip was made from a video that has changed since."""
    for clip, stamp in zip(job.clips, chain.from_iterable(record.stamps for record in done), strict=False):
        if clip.stamp != stamp:
            raise UserError(
                f"a source must stay as it is while it is built, but {clip.row.path} has changed since clip "
                f"{clip.row.id} of {job.split} was made. Put it back, or build anew with --restart=true."
            )


def write_job(job: Job) -> list[Fault]:
    """Write what is missing of a job, in a worker process; the faults that were met.

    Raises UserError once more clips are broken than the whole build may skip.
    """
    cv2.setNumThreads(1)
    done = records(job)
    begin = sum(len(record.stamps) for record in done)
    faults: list[Fault] = []
    tar = _Tar(job, len(done))
    try:
        for clip in job.clips[begin:]:
            made = _encode(job, clip)
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
        tar.discard()
    return faults


class _Tar:
    """A tar on its way; its name is this process's own, as a killed build's worker may be at the same one."""

    def __init__(self, job: Job, number: int) -> None:
        self.number = number
        self._job = job
        self._record = Record(f"{job.name}-{number:03d}.tar")
        self._path = job.folder / self._record.file
        self._temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._tar = ShardWriter(self._temporary, 0)

    def is_full(self, made: Encoded) -> bool:
        limit = self._job.options.mb_per_shard
        if limit is None or not self._record.rows:
            return False
        return self._tar.bytes_with(len(made.member)) > limit * 1e6

    def add(self, clip: Clip, made: Encoded | Fault) -> None:
        record, row = self._record, clip.row
        record.stamps.append(clip.stamp)
        if isinstance(made, Fault):
            record.faults.append(made)
            return
        if made.past_end:
            record.clamped.append(row.id)
        facts = {"gloss": row.gloss} if row.gloss else {}
        record.rows.append(
            self._tar.add_clip(
                clip.key, made.member, num_frames=made.num_frames, fps=made.fps,
                height=made.height, width=made.width, id=row.id, text=row.text, signer=row.signer,
                video=row.video, language=row.language, **facts,
            )
        )  # fmt: skip

    def finish(self, last: bool) -> None:
        """First the tar, then its record: a record speaks of what is on the disk."""
        self._record.last = last
        if self._record.rows:
            self._tar.close()
            self._record.shard = vars(self._tar.shard_entry) | {"file": self._record.file}
            move(self._temporary, self._path)
        write_json(self._path.with_suffix(".json"), asdict(self._record))

    def discard(self) -> None:
        """Remove what is not finished."""
        self._tar.abandon()
        self._temporary.unlink(missing_ok=True)


def _encode(job: Job, clip: Clip) -> Encoded | Fault:
    try:
        return encode_clip(clip.row, job.options)
    except BrokenVideo as error:
        return Fault("cannot be decoded", f"{job.split} {clip.row.id}: {error}")
    except ValueError as error:  # of the containers, whose bounds are far off
        return Fault("cannot be stored", f"{job.split} {clip.row.id}: {error}")
    finally:
        pool.tick()


def encode_clip(row: Row, options: Options) -> Encoded:
    """Decode, cut, scale and encode one clip. Raises BrokenVideo, or ValueError if it is too long."""
    if options.clip_format == "h264":
        return _encode_h264(row, options)
    frames = _Frames(row, options)
    jpegs: list[bytes] = []
    before: np.ndarray | None = None
    for frame in frames:
        if frame is not before:  # at a higher --fps the same comes again
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(frame), options.quality, "RGB", "420")
        jpegs.append(jpeg)
        before = frame
    height, width = frames.hw
    member = clip_format.pack_frames(jpegs, frames.video.fps, width, height)
    return frames.stored(member)


def _encode_h264(row: Row, options: Options) -> Encoded:
    assert options.gop is not None and options.crf is not None
    fps = options.fps
    while True:
        frames = _Frames(row, options)
        first = next(frames)
        rate = fps or frames.video.fps  # what the container says; what its frames say is known at their end
        member = h264.encode_h264(chain([first], frames), rate, options.gop, options.crf)
        fps = frames.video.fps
        if rate == fps:
            return frames.stored(member)


class _Frames(Iterator[np.ndarray]):
    """The frames of a row as the options want them; tells their number and size, and its video's rate."""

    def __init__(self, row: Row, options: Options) -> None:
        self.video = Video(row.path, image_fps=row.image_fps, num_threads=1)
        self.num_frames = 0
        self.hw = (0, 0)
        self._end_s = row.end_s
        self._frames = self.video.frames(
            row.start_s,
            row.end_s,
            short_side=options.short_side,
            box=common_box(row.bbox, options.crop),
            margin_px=None if options.margin is None else (*options.margin,),  # type: ignore[arg-type]
            stretch_hw=row.stretch_hw,
            fps=options.fps,
        )

    def __next__(self) -> np.ndarray:
        pool.check_stop()
        frame = next(self._frames)
        self.num_frames += 1
        self.hw = frame.shape[0], frame.shape[1]
        return frame

    def stored(self, member: bytes) -> Encoded:
        fps = self.video.fps
        past_end = self._end_s is not None and self.video.past_end_s > 1 / fps
        return Encoded(member, self.num_frames, fps, *self.hw, past_end)


def common_box(box: Box | None, crop: Sequence[float] | None) -> Box | None:
    """What a row's box and the crop of all rows have in common; it may be empty."""
    if box is None or crop is None:
        return box or (None if crop is None else (crop[0], crop[1], crop[2], crop[3]))
    return max(box[0], crop[0]), max(box[1], crop[1]), min(box[2], crop[2]), min(box[3], crop[3])


def over_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> UserError:
    """Too many faults, as one sentence that counts them by kind and names the first."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(fault.kind for fault in faults).items())
    return UserError(
        f"every row must give a clip, but of {num_rows:,} rows {kinds}: {faults[0].sentence.rstrip('.')}. "
        f"Mend them, let more than {max_skipped} be skipped with --max_skipped, or build other --splits."
    )


def collect(jobs: Sequence[Job], folder: Path) -> "Collected":
    """Give the finished tars their numbers, in `folder`; a tar without clips leaves no gap.

    May be called again after it was interrupted. Raises UserError if a tar is not there.
    """
    all_of_it = Collected()
    for job in jobs:
        for record in records(job):
            all_of_it.faults += record.faults
            all_of_it.clamped.setdefault(job.split, []).extend(record.clamped)
            if record.shard is None:
                continue
            rows, shards = all_of_it.splits.setdefault(job.split, ([], []))
            shard = Shard(**record.shard | {"file": SHARD_NAME.format(split=job.split, number=len(shards))})
            _take(job.folder / record.file, folder / shard.file, shard.bytes)
            rows += [row | {"shard": len(shards)} for row in record.rows]
            shards.append(shard)
    return all_of_it


@dataclass
class Collected:
    """What all jobs made: each split's index rows and tars, and what was left out or cut short."""

    splits: dict[str, tuple[list[dict[str, Any]], list[Shard]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    clamped: dict[str, list[str]] = field(default_factory=dict)


def _take(path: Path, target: Path, size: int) -> None:
    if path.exists():
        path.rename(target)
    found = target.stat().st_size if target.exists() else None
    if found != size:
        what = "is missing" if found is None else f"holds {found:,} bytes"
        raise UserError(
            f"a finished shard must hold {size:,} bytes, but {what}: {target}. It was changed since; build "
            "anew with --restart=true."
        )
