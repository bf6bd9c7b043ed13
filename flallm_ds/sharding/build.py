"""A sign corpus into shards: python shards/build.py CORPUS --source=DIR --out=DIR (see
its --help).

One process a core, each writing whole shards, so that frames never travel between
processes. The same corpus and options give the same bytes on any number of workers, also
when the build was killed and started again. `--out` appears whole at the end; until then
the work lies in `<out>.partial`.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flallm_ds.errors import UserError
from flallm_ds.sharding import jobs, pool, stats
from flallm_ds.sharding.build_plan import is_built, plan_of
from flallm_ds.sharding.corpora import Row
from flallm_ds.sharding.faults import Fault, check_budget, count_faults
from flallm_ds.sharding.options import Options
from flallm_ds.sharding.partial import Partial, hold, partial_folder
from flallm_ds.sharding.rows import CORPORA, Clip, check_rows, read_corpus
from flallm_ds.sharding.writer import earlier_build, write_index

# Ids named in a note.
_NUM_EXAMPLES = 3


def build(corpus_name: str, source: Path, out: Path, options: Options, **own: Any) -> None:
    """Read a corpus (own: its importer's options) and write its shards to `out`.

    Continues where an earlier call with the same options and source was ended. Raises
    UserError if there is something else at `out`, or if rows are faulty beyond
    --max_skipped.
    """
    out = out.resolve()
    # Refuse a wrong --out now: reading the source can take minutes.
    earlier_build(out)
    corpus, rows = read_corpus(corpus_name, source, options, own)
    clips, faults = check_rows(rows, options)
    num_rows = sum(map(len, rows.values()))
    check_budget(faults, options.max_skipped, num_rows)
    if not any(clips.values()):
        why = f" ({'; '.join(corpus.notes)})" if corpus.notes else ""
        names = ", ".join(rows)
        raise UserError(f"a corpus must have rows, but {names} of {source} have none{why}.")
    plan = plan_of(corpus_name, corpus, clips, options.recorded() | own)
    if is_built(out, plan) and not partial_folder(out).exists():
        return
    with hold(out) as partial:
        # Another process may have finished this build just before the lock was taken, or
        # may have been killed between publishing the shards and removing its work.
        if is_built(out, plan):
            partial.discard()
            return
        # Without the source: a video whose clip is not made yet may still change. `work`
        # compares the videos of finished clips one by one.
        compared = dict(plan)
        del compared["source"]
        partial.begin(compared, options.restart)
        notes = corpus.notes + repeat_notes(rows) + empty_notes(rows)
        num_skippable = options.max_skipped - len(faults)
        todo = plan_jobs(clips, options, partial, num_skippable, num_rows)
        work(todo, options, faults, num_rows)
        done = jobs.collect(todo, partial.shards)
        # Workers finish in any order: sorted faults give the same index.json every time.
        faults = sorted(faults + done.faults, key=lambda fault: fault.sentence)
        check_budget(faults, options.max_skipped, num_rows)
        if not done.splits:
            raise UserError("shards must hold clips, but every row was skipped.")
        notes += clamp_notes(done.clamped) + stats.overlap_notes(done.rows)
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
    print_report(done.rows, faults, notes)
    print(f"shards are in {out}")


def plan_jobs(
    clips: dict[str, list[Clip]],
    options: Options,
    partial: Partial,
    num_skippable: int,
    num_rows: int,
) -> list[jobs.ShardJob]:
    """Plan a job for each shard, or for as many clips as a shard of --mb_per_shard should
    take."""
    if options.clips_per_shard:
        clips_per_job = dict.fromkeys(clips, options.clips_per_shard)
    else:
        # Measured once: a build that continues must cut its jobs as it did before.
        clips_per_job = partial.kept(
            "clips_per_job", lambda: jobs.clips_for_size(clips, options)
        )
    return jobs.plan(clips, clips_per_job, partial.work, options, num_skippable, num_rows)


def work(
    todo: list[jobs.ShardJob], options: Options, faults: list[Fault], num_rows: int
) -> None:
    """Do what is left of all jobs.

    faults: of rows that were left out before. Raises UserError for more faults than may
    be skipped.
    """
    # Count what an earlier call of this build has finished, and keep the jobs that are not.
    faults = list(faults)
    left = []
    num_clips = num_done = 0
    for job in todo:
        done = jobs.records(job)
        jobs.check_stamps(job, done)
        num_clips += len(job.clips)
        for record in done:
            faults += record.faults
            num_done += len(record.stamps)
        if not done or not done[-1].last:
            left.append(job)
    if num_done:
        print(
            f"going on with an unfinished build: {num_done:,} of {num_clips:,} clips are "
            "done",
            flush=True,
        )
    check_budget(faults, options.max_skipped, num_rows)
    # Each worker checks the limit for its own job. Only this loop sees the sum over all
    # jobs.
    results = pool.run(
        jobs.write_job,
        left,
        num_workers=options.workers,
        num_clips=num_clips - num_done,
        title="build",
    )
    # Closing the generator stops the workers. Otherwise an error raised here would wait
    # until all jobs are done.
    with closing(results):
        for _, met in results:
            faults += met
            check_budget(faults, options.max_skipped, num_rows)


def repeat_notes(rows: dict[str, list[Row]]) -> list[str]:
    """Say how many rows have the id of an earlier one; they are kept, as the corpus has them."""
    counts: Counter[str] = Counter()
    for table in rows.values():
        counts.update(row.id for row in table)
    repeated = [name for name, count in counts.items() if count > 1]
    if not repeated:
        return []
    num_more = counts.total() - len(counts)
    return [
        f"{num_more:,} rows have the id of an earlier row and are kept ({_some(repeated)})"
    ]


def empty_notes(rows: dict[str, list[Row]]) -> list[str]:
    """Say which splits have no rows."""
    notes = []
    for split, table in rows.items():
        if not table:
            notes.append(f"{split}: has no rows, left out")
    return notes


def clamp_notes(clamped: dict[str, list[str]]) -> list[str]:
    """Say for each split how many clips end later than their video does."""
    notes = []
    for split, ids in clamped.items():
        if ids:
            notes.append(
                f"{split}: {len(ids):,} clips end past their video's end and were cut "
                f"there ({_some(ids)})"
            )
    return notes


def print_report(
    rows: dict[str, list[dict[str, Any]]], faults: Sequence[Fault], notes: Sequence[str]
) -> None:
    """Print the statistics of the shards, what was skipped, and the notes."""
    print(stats.summarise(rows))
    print_faults(faults)
    for note in notes:
        print(f"note: {note}")


def print_faults(faults: Sequence[Fault]) -> None:
    """Print the count and the first few sentences of each kind of fault."""
    for kind, entry in count_faults(faults).items():
        print(f"skipped, {kind}: {entry['count']:,}")
        for example in entry["examples"]:
            print(f"  {example}")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NUM_EXAMPLES]) + (", ..." if len(ids) > _NUM_EXAMPLES else "")


def verb(corpus_name: str) -> Callable[..., None]:
    """Make the command of one corpus.

    Its options are --source, --out, every field of Options, and the importer's own.
    """
    read = CORPORA[corpus_name]
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = []
    defaults = {}
    for parameter in inspect.signature(read).parameters.values():
        if parameter.kind == keyword:
            own.append(parameter)
            defaults[parameter.name] = parameter.default

    def run(source: Path, out: Path, **given: Any) -> None:
        options = Options.taken_from(given)
        build(corpus_name, source, out, options, **defaults | given)

    # The command line reads names and types of options from the signature, and the help
    # from the docstring. So `run` gets those of the three sources together.
    parameters = [
        inspect.Parameter("source", keyword, annotation=Path),
        inspect.Parameter("out", keyword, annotation=Path),
    ]
    for parameter in inspect.signature(Options).parameters.values():
        parameters.append(parameter.replace(kind=keyword))
    parameters += own
    signature = inspect.Signature(parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = f"{inspect.getdoc(read)}\n{inspect.getdoc(Options)}"
    return run


VERBS = {name: verb(name) for name in CORPORA}
