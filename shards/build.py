"""A sign corpus into shards: python shards/build.py CORPUS --source=DIR --out=DIR (each has its --help).

One process a core, each writing whole shards, so that frames never travel between processes. The same corpus
and options give the same bytes on any number of workers. `--out` appears whole at the end, or not at all.
"""

import hashlib
import inspect
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # run as a file: the project's root is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import simplejpeg

from flallm_ds import command
from flallm_ds.data.index import Shard
from flallm_ds.data.video import BrokenVideo, Video, image_paths
from flallm_ds.errors import UserError
from shards import pool, stats
from shards.corpora import (
    SPLITS,
    Corpus,
    Row,
    csl_daily,
    how2sign,
    manifest,
    openasl,
    phoenix14t,
    youtube_asl,
)
from shards.writer import SHARD_NAME, ShardWriter, check_free, new_folder, write_index

CORPORA: dict[str, Callable[..., Corpus]] = {
    "phoenix14t": phoenix14t.read,
    "csl_daily": csl_daily.read,
    "how2sign": how2sign.read,
    "openasl": openasl.read,
    "youtube_asl": youtube_asl.read,
    "youtube_sl25": youtube_asl.read_sl25,
    "manifest": manifest.read,
}
SHUFFLE_SEED = 0  # of the order in which a training split's clips are put into shards
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Options:
    """
    --short_side: pixels of a stored frame's shorter side; smaller frames are not enlarged.
    --quality: of the JPEG frames, 1 to 100.
    --clips_per_shard: at most; shards of a split differ by one clip.
    --splits: which to build, of train, dev, test.
    --limit: the first N rows of each split only, to try things out.
    --max_skipped: how many rows may lack a video, a text, or decodable frames. They are left out, counted and
        listed; one more ends the build. 0 by default, so nothing goes missing unsaid.
    --workers: processes, 0 for one a core.
    """

    short_side: int = 256
    quality: int = 90
    # 128 clips are 100 to 350 MB: few files, yet many shards to shuffle, to fetch and to give to workers.
    clips_per_shard: int = 128
    splits: tuple[str, ...] = SPLITS
    limit: int | None = None
    max_skipped: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("short_side", 16, 4096), ("quality", 1, 100), ("clips_per_shard", 1, 10**6),
            ("limit", 1, 10**9), ("max_skipped", 0, 10**9), ("workers", 0, 4096),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} must be from {low} to {high}, but is {value}.")
        if not self.splits or set(self.splits) - set(SPLITS) or len(set(self.splits)) < len(self.splits):
            raise UserError(
                f"--splits must name some of {', '.join(SPLITS)}, but is {','.join(self.splits)!r}."
            )


@dataclass(frozen=True)
class Fault:
    """A row that cannot become a clip: the kind, to count by, and one sentence."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Job:
    """One shard to write: where, and of which rows."""

    path: Path
    split: str
    number: int
    clips: list[tuple[str, Row]]  # key, row
    options: Options
    num_skippable: int  # of all jobs together; one job alone may not pass it either
    num_rows: int  # of the whole corpus


@dataclass
class Done:
    """What one job made: its index rows, its tar, and what was left out or cut short."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    shard: Shard | None = None
    faults: list[Fault] = field(default_factory=list)
    clamped: list[str] = field(default_factory=list)


def build(corpus_name: str, source: Path, out: Path, options: Options, **own: Any) -> None:
    """Read a corpus (own: its importer's options) and write its shards to `out`."""
    check_free(out.resolve())
    if not source.exists():
        raise UserError(f"--source must exist, but does not: {source}. Check the path.")
    corpus = CORPORA[corpus_name](source, options.splits, **own)
    rows = {split: table[: options.limit] for split, table in corpus.rows.items()}
    notes = corpus.notes + [f"{split}: has no rows, left out" for split, table in rows.items() if not table]
    numbered, faults = check_rows(rows)
    num_rows = sum(map(len, rows.values()))
    check_budget(faults, options.max_skipped, num_rows)

    with new_folder(out) as folder:
        jobs = plan(numbered, folder, options, options.max_skipped - len(faults), num_rows)
        if not jobs:
            raise UserError(f"a corpus must have rows, but {', '.join(rows)} of {source} have none.")
        done: dict[int, Done] = {}
        num_clips = sum(len(job.clips) for job in jobs)
        for position, result in pool.run(
            write_shard, jobs, num_workers=options.workers, num_clips=num_clips, title="build"
        ):
            done[position] = result
            faults += result.faults
            check_budget(faults, options.max_skipped, num_rows)
        results = [done[position] for position in range(len(jobs))]
        splits = collect(jobs, results)
        notes += clamp_notes(jobs, results)
        write_index(
            folder,
            corpus=corpus.name,
            language=corpus.language,
            options=recorded(options) | own,
            splits=splits,
            skipped=count_faults(sorted(faults, key=lambda fault: fault.sentence)),
            notes=notes + stats.overlap_notes(rows_of(splits)),
        )
    print_report(out, splits, count_faults(faults), notes + stats.overlap_notes(rows_of(splits)))


def check_rows(rows: dict[str, list[Row]]) -> tuple[dict[str, list[tuple[str, Row]]], list[Fault]]:
    """Each split's usable rows with their keys (the row's number in its table), and the faults of others."""
    present: dict[Path, bool] = {}
    faults: list[Fault] = []
    numbered: dict[str, list[tuple[str, Row]]] = {}
    for split, table in rows.items():
        numbered[split] = []
        for number, row in enumerate(table):
            if row.path not in present:
                present[row.path] = has_frames(row.path)
            if not present[row.path]:
                faults.append(Fault("without video", f"{split} {row.id} has no frames at {row.path}"))
            elif not row.text:
                faults.append(Fault("without text", f"{split} {row.id} has an empty text"))
            else:
                numbered[split].append((f"{number:08d}", row))
    return numbered, faults


def has_frames(path: Path) -> bool:
    """Whether there is a file, or a folder with images; whether they decode is not asked."""
    try:
        return bool(image_paths(path)) if path.is_dir() else path.is_file()
    except OSError:
        return False


def check_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> None:
    """Raise UserError if more rows are faulty than may be skipped."""
    if len(faults) > max_skipped:
        raise over_budget(faults, max_skipped, num_rows)


def over_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> UserError:
    """Too many faults, as one sentence that counts them by kind and names the first."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(fault.kind for fault in faults).items())
    return UserError(
        f"every row must give a clip, but of {num_rows:,} rows {kinds}: {faults[0].sentence.rstrip('.')}. "
        f"Mend them, let more than {max_skipped} be skipped with --max_skipped, or build other --splits."
    )


def plan(
    numbered: dict[str, list[tuple[str, Row]]],
    folder: Path,
    options: Options,
    num_skippable: int,
    num_rows: int,
) -> list[Job]:
    """One job for each shard: training clips in a fixed shuffled order, dev and test in the table's."""
    jobs = []
    for split, clips in numbered.items():
        if split == "train":  # corpora are sorted by broadcast or video: neighbours would share every batch
            clips = sorted(clips, key=_shuffled)
        num_shards = -(-len(clips) // options.clips_per_shard)
        for n in range(num_shards):
            some = clips[n * len(clips) // num_shards : (n + 1) * len(clips) // num_shards]
            path = folder / SHARD_NAME.format(split=split, number=n)
            jobs.append(Job(path, split, n, some, options, num_skippable, num_rows))
    return jobs


def _shuffled(clip: tuple[str, Row]) -> bytes:
    return hashlib.sha256(f"{SHUFFLE_SEED} {clip[0]}".encode()).digest()


def write_shard(job: Job) -> Done:
    """Decode, scale, encode and write the clips of one shard, in a worker process.

    Raises UserError once more clips are broken than the whole build may skip.
    """
    cv2.setNumThreads(1)
    done = Done()
    with ShardWriter(job.path, job.number) as tar:
        for key, row in job.clips:
            try:
                jpegs, video, (height, width) = encode_clip(row, job.options)
            except BrokenVideo as error:
                done.faults.append(Fault("cannot be decoded", f"{job.split} {row.id}: {error}"))
                if len(done.faults) > job.num_skippable:
                    raise over_budget(done.faults, job.options.max_skipped, job.num_rows) from error
                continue
            finally:
                pool.tick()
            if row.end_s is not None and video.past_end_s > 1 / video.fps:
                done.clamped.append(row.id)
            facts = {"gloss": row.gloss} if row.gloss else {}
            done.rows.append(
                tar.add(
                    key, jpegs, fps=video.fps, height=height, width=width, id=row.id, text=row.text,
                    signer=row.signer, video=row.video, language=row.language, **facts,
                )
            )  # fmt: skip
    done.shard = tar.shard_entry
    return done


def encode_clip(row: Row, options: Options) -> tuple[list[bytes], Video, tuple[int, int]]:
    """(JPEG frames, the video that was read, height and width of a frame)."""
    video = Video(row.path, image_fps=row.image_fps, num_threads=1)
    jpegs = []
    for frame in video.frames(row.start_s, row.end_s, short_side=options.short_side, box=row.bbox):
        pool.check_stop()
        jpegs.append(simplejpeg.encode_jpeg(np.ascontiguousarray(frame), options.quality, "RGB", "420"))
    return jpegs, video, frame.shape[:2]


def collect(jobs: list[Job], results: list[Done]) -> dict[str, tuple[list[dict[str, Any]], list[Shard]]]:
    """Each split's index rows and tars, in order; a tar without clips is dropped and leaves no gap."""
    splits: dict[str, tuple[list[dict[str, Any]], list[Shard]]] = {}
    for job, done in zip(jobs, results, strict=True):
        assert done.shard is not None
        if not done.rows:
            job.path.unlink()
            continue
        rows, tars = splits.setdefault(job.split, ([], []))
        number = len(tars)
        path = job.path.with_name(SHARD_NAME.format(split=job.split, number=number))
        if path != job.path:
            job.path.rename(path)
        tars.append(Shard(path.name, done.shard.bytes, done.shard.sha256, done.shard.clips))
        rows += [row | {"shard": number} for row in done.rows]
    if not splits:
        raise UserError("shards must hold clips, but every row was skipped.")
    return splits


def recorded(options: Options) -> dict[str, Any]:
    """The options that decide the bytes."""
    return {name: value for name, value in asdict(options).items() if name != "workers"}


def count_faults(faults: Sequence[Fault]) -> dict[str, Any]:
    """For each kind of fault its count and the first few sentences."""
    counts: dict[str, Any] = {}
    for fault in faults:
        entry = counts.setdefault(fault.kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= _NUM_EXAMPLES:
            entry["examples"].append(fault.sentence)
    return counts


def clamp_notes(jobs: list[Job], results: list[Done]) -> list[str]:
    """For each split, how many clips end later than their video does."""
    clamped: dict[str, list[str]] = {}
    for job, done in zip(jobs, results, strict=True):
        clamped.setdefault(job.split, []).extend(done.clamped)
    return [
        f"{split}: {len(ids):,} clips end past their video's end and were cut there ({_some(ids)})"
        for split, ids in clamped.items()
        if ids
    ]


def rows_of(splits: dict[str, tuple[list[dict[str, Any]], list[Shard]]]) -> dict[str, list[dict[str, Any]]]:
    """Each split's rows, without its tars."""
    return {split: rows for split, (rows, _) in splits.items()}


def print_report(
    out: Path,
    splits: dict[str, tuple[list[dict[str, Any]], list[Shard]]],
    skipped: dict[str, Any],
    notes: list[str],
) -> None:
    print(stats.summarise(rows_of(splits)))
    for kind, entry in skipped.items():
        print(f"skipped, {kind}: {entry['count']:,}")
        print("".join(f"  {example}\n" for example in entry["examples"]), end="")
    for note in notes:
        print(f"note: {note}")
    print(f"shards are in {out}")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NUM_EXAMPLES]) + (", ..." if len(ids) > _NUM_EXAMPLES else "")


def verb(corpus_name: str) -> Callable[..., None]:
    """The command of one corpus: --source, --out, every field of Options, and the importer's own options."""
    read = CORPORA[corpus_name]
    common = [f.name for f in fields(Options)]
    own = [p for name, p in inspect.signature(read).parameters.items() if p.kind == p.KEYWORD_ONLY]

    def run(source: Path, out: Path, **given: Any) -> None:
        options = Options(**{name: given.pop(name) for name in common if name in given})
        build(corpus_name, source, out, options, **{p.name: p.default for p in own} | given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    source_and_out = [inspect.Parameter(name, keyword, annotation=Path) for name in ("source", "out")]
    parameters = [*source_and_out, *inspect.signature(Options).parameters.values(), *own]
    run.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = f"{inspect.getdoc(read)}\n{inspect.getdoc(Options)}"
    return run


if __name__ == "__main__":
    # So that nothing half-written stays when the build is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    command.main({name: verb(name) for name in CORPORA})
