"""A sign corpus into shards: python shards/build.py CORPUS --source=DIR --out=DIR (each has its --help).

One process a core, each writing whole shards, so that frames never travel between processes. The same corpus
and options give the same bytes on any number of workers, also when the build was killed and started again.
`--out` appears whole at the end; until then the work lies in `<out>.partial`.
"""

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import av
import cv2
import simplejpeg

from flallm_ds.data.codecs.video import image_paths
from flallm_ds.data.index import FORMAT, Shard
from flallm_ds.errors import UserError
from flallm_ds.sharding import jobs, pool, stats
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    csl_daily,
    how2sign,
    is_blank,
    manifest,
    openasl,
    phoenix14t,
    signsim,
    youtube_asl,
)
from flallm_ds.sharding.jobs import Clip, Fault
from flallm_ds.sharding.options import Options
from flallm_ds.sharding.partial import Partial, differences, hold, partial_folder, plain
from flallm_ds.sharding.writer import earlier_build, write_index

CORPORA: dict[str, Callable[..., Corpus]] = {
    "phoenix14t": phoenix14t.read,
    "csl_daily": csl_daily.read,
    "how2sign": how2sign.read,
    "openasl": openasl.read,
    "youtube_asl": youtube_asl.read,
    "youtube_sl25": youtube_asl.read_sl25,
    "manifest": manifest.read,
    "signsim": signsim.read,
}
_NUM_EXAMPLES = 3
_IN_THE_INDEX = ("importer", "corpus", "options", "source")  # of a plan


def build(corpus_name: str, source: Path, out: Path, options: Options, **own: Any) -> None:
    """Read a corpus (own: its importer's options) and write its shards to `out`.

    Goes on where an earlier call with the same options and source was ended. Raises UserError if there is
    something else at `out`, or if rows are faulty beyond --max_skipped.
    """
    out = out.resolve()
    earlier_build(out)  # before a long look at the source
    corpus, rows = read_corpus(corpus_name, source, options, own)
    clips, faults = check_rows(rows, options)
    num_rows = sum(map(len, rows.values()))
    check_budget(faults, options.max_skipped, num_rows)
    if not any(clips.values()):
        why = f" ({'; '.join(corpus.notes)})" if corpus.notes else ""
        raise UserError(f"a corpus must have rows, but {', '.join(rows)} of {source} have none{why}.")
    plan = plan_of(corpus_name, corpus, clips, options.recorded() | own)
    if is_built(out, plan) and not partial_folder(out).exists():
        return
    with hold(out) as partial:
        if is_built(out, plan):  # while this build waited for its turn, or killed before it had tidied up
            partial.discard()
            return
        partial.begin({name: value for name, value in plan.items() if name != "source"}, options.restart)
        notes = corpus.notes + repeat_notes(rows)
        notes += [f"{split}: has no rows, left out" for split, table in rows.items() if not table]
        todo = plan_jobs(clips, options, partial, options.max_skipped - len(faults), num_rows)
        work(todo, options, faults, num_rows)
        done = jobs.collect(todo, partial.shards)
        faults = sorted(faults + done.faults, key=lambda fault: fault.sentence)
        check_budget(faults, options.max_skipped, num_rows)
        if not done.splits:
            raise UserError("shards must hold clips, but every row was skipped.")
        notes += clamp_notes(done.clamped) + stats.overlap_notes(rows_of(done.splits))
        write_index(
            partial.shards,
            corpus=corpus.name,
            language=corpus.language,
            options=plan["options"],
            splits=done.splits,
            skipped=count_faults(faults),
            notes=notes,
            importer=corpus_name,
            source=plan["source"],
        )
        partial.finish()
    print_report(out, done.splits, count_faults(faults), notes)


def read_corpus(
    importer: str, source: Path, options: Options, own: Mapping[str, Any]
) -> tuple[Corpus, dict[str, list[Row]]]:
    """What an importer reads of a source, and the rows of each split that --limit leaves.

    Raises UserError if there is no source.
    """
    if not source.exists():
        raise UserError(f"--source must exist, but does not: {source}. Check the path.")
    corpus = CORPORA[importer](source, options.splits, **own)
    return corpus, {split: table[: options.limit] for split, table in corpus.rows.items()}


def check_rows(rows: dict[str, list[Row]], options: Options) -> tuple[dict[str, list[Clip]], list[Fault]]:
    """Each split's usable rows in stored order, with their keys and stamps, and the faults of the others."""
    stamps: dict[Path, str] = {}
    faults: list[Fault] = []
    clips: dict[str, list[Clip]] = {}
    for split, table in rows.items():
        usable = []
        for number, row in enumerate(table):
            if row.path not in stamps:
                stamps[row.path] = stamp(row.path)
            box = jobs.common_box(row.bbox, options.crop) or (0, 0, 1, 1)
            if not stamps[row.path]:
                faults.append(Fault("without video", f"{split} {row.id} has no frames at {row.path}"))
            elif is_blank(row.text):
                shown = f"a text without visible characters: {row.text!a}" if row.text else "an empty text"
                faults.append(Fault("without text", f"{split} {row.id} has {shown}"))
            elif not is_unicode(row):
                faults.append(Fault("no Unicode", f"{split} {row.id!a} holds half a character: {row.text!a}"))
            elif box[0] >= box[2] or box[1] >= box[3]:
                faults.append(Fault("outside the crop", f"{split} {row.id} has a box outside --crop"))
            else:
                usable.append(Clip(f"{number:08d}", row, stamps[row.path]))
        clips[split] = jobs.stored_order(split, usable)
    return clips, faults


def is_unicode(row: Row) -> bool:
    """Whether all of a row's strings can be written: JSON may hold half of a surrogate pair."""
    try:
        "".join((row.id, row.text, row.language, row.signer, row.video, row.gloss)).encode()
    except UnicodeEncodeError:
        return False
    return True


def stamp(path: Path) -> str:
    """The sizes and, after a space, the times of a video file or a folder's images; empty if there are none.

    Whether they decode is not asked.
    """
    try:
        if path.is_file():
            found = path.stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        facts = [(image.name, image.stat()) for image in image_paths(path)]
    except (OSError, ValueError):  # ValueError: of a name that no file can have
        return ""
    if not facts:
        return ""
    sizes = digest((name, found.st_size) for name, found in facts)
    return f"{sizes} {digest(found.st_mtime_ns for _, found in facts)}"


def digest(parts: Iterable[Any]) -> str:
    """Sixteen hex digits of plain values, one after the other."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(json.dumps(part).encode() + b"\n")
    return sha256.hexdigest()[:16]


def _facts(clip: Clip) -> list[Any]:
    """What the tables say of a clip."""
    return [clip.key, vars(clip.row) | {"path": None}]


def plan_of(
    importer: str, corpus: Corpus, clips: dict[str, list[Clip]], options: dict[str, Any]
) -> dict[str, Any]:
    """What is built from what. Neither where the source lies nor its times say what will be in the shards."""
    plan = {
        "importer": importer,
        "corpus": corpus.name,
        "options": options,
        "rows": {split: digest(map(_facts, some)) for split, some in clips.items()},
        "source": {
            split: digest((_facts(clip), clip.stamp.split()[0]) for clip in some)
            for split, some in clips.items()
        },
        "made_by": {
            "shards": FORMAT,
            "av": av.__version__,
            "simplejpeg": simplejpeg.__version__,
            "opencv": cv2.__version__,
        },
    }
    found: dict[str, Any] = plain(plan)
    return found


def is_built(out: Path, plan: dict[str, Any]) -> bool:
    """Whether `out` holds the shards of this plan already, which is said.

    Raises UserError if it holds others, or if some are missing.
    """
    found = earlier_build(out)
    if found is None:
        return False
    changes = differences(found, {name: plan[name] for name in _IN_THE_INDEX})
    if changes:
        raise UserError(
            f"--out must be a new or empty folder, but {out} holds an earlier build: {'; '.join(changes)}. "
            "Remove it, or name another folder."
        )
    shards = [shard for entry in found["splits"].values() for shard in entry["shards"]]
    for shard in shards:
        path = out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"an earlier build must be whole, but {shard['file']} is missing or cut short in {out}. "
                "Run shards/verify.py, or remove the folder and build it again."
            )
    print(f"already built: {len(shards):,} shards of this source and these options are in {out}")
    return True


def check_budget(faults: Sequence[Fault], max_skipped: int, num_rows: int) -> None:
    """Raise UserError if more rows are faulty than may be skipped."""
    if len(faults) > max_skipped:
        raise jobs.over_budget(faults, max_skipped, num_rows)


def plan_jobs(
    clips: dict[str, list[Clip]], options: Options, partial: Partial, num_skippable: int, num_rows: int
) -> list[jobs.Job]:
    """One job for each shard, or for as many clips as a shard of --mb_per_shard should take."""
    if options.clips_per_shard:
        clips_per_job = dict.fromkeys(clips, options.clips_per_shard)
    else:
        clips_per_job = partial.kept("clips_per_job", lambda: jobs.clips_for_size(clips, options))
    return jobs.plan(clips, clips_per_job, partial.work, options, num_skippable, num_rows)


def work(todo: list[jobs.Job], options: Options, faults: list[Fault], num_rows: int) -> None:
    """Do what is not done yet of all jobs. faults: of rows that were left out before."""
    faults = list(faults)
    left = []
    num_clips = num_done = 0
    for job in todo:
        done = jobs.records(job)
        jobs.check_stamps(job, done)
        faults += [fault for record in done for fault in record.faults]
        num_clips += len(job.clips)
        num_done += sum(len(record.stamps) for record in done)
        if not done or not done[-1].last:
            left.append(job)
    if num_done:
        print(f"going on with an unfinished build: {num_done:,} of {num_clips:,} clips are done", flush=True)
    check_budget(faults, options.max_skipped, num_rows)
    results = pool.run(
        jobs.write_job, left, num_workers=options.workers, num_clips=num_clips - num_done, title="build"
    )
    with closing(results):  # else the workers do all that is left, whatever is raised here
        for _, met in results:
            faults += met
            check_budget(faults, options.max_skipped, num_rows)


def count_faults(faults: Sequence[Fault]) -> dict[str, Any]:
    """For each kind of fault its count and the first few sentences."""
    counts: dict[str, Any] = {}
    for fault in faults:
        entry = counts.setdefault(fault.kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= _NUM_EXAMPLES:
            entry["examples"].append(fault.sentence)
    return counts


def repeat_notes(rows: dict[str, list[Row]]) -> list[str]:
    """How many rows have the id of an earlier one; they are kept, as a corpus's own table has them."""
    counts = Counter(row.id for table in rows.values() for row in table)
    repeated = [name for name, count in counts.items() if count > 1]
    if not repeated:
        return []
    num_more = counts.total() - len(counts)
    return [f"{num_more:,} rows have the id of an earlier row and are kept ({_some(repeated)})"]


def clamp_notes(clamped: dict[str, list[str]]) -> list[str]:
    """For each split, how many clips end later than their video does."""
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


VERBS = {name: verb(name) for name in CORPORA}
