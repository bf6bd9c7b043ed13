"""Build shards from a sign language corpus.

    python shards/build.py CORPUS --source=DIR --out=DIR     (options: CORPUS --help)

Each worker process writes complete shards, so no frames are sent between processes. The
same corpus and options give the same bytes with any number of workers, also if the build
was killed and started again. `--out` is created at the end. Until then, the work is in
`<out>.partial`.
"""

import inspect
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flallm_ds.command_help import DESCRIBED_ABOVE
from flallm_ds.errors import UserError
from flallm_ds.sharding import jobs, pool, stats
from flallm_ds.sharding.build_plan import is_built, make_plan
from flallm_ds.sharding.corpora import Corpus, Row
from flallm_ds.sharding.faults import Fault, check_budget, count_faults
from flallm_ds.sharding.options import Options
from flallm_ds.sharding.partial import InUse, Partial, hold, partial_folder
from flallm_ds.sharding.parts import (
    is_part_built,
    missing_parts,
    part_folder,
    publish_part,
    remove_parts,
    take_parts,
)
from flallm_ds.sharding.rows import CORPORA, Clip, check_rows, read_corpus
from flallm_ds.sharding.writer import earlier_build, write_index

# Ids named in a note.
_NUM_EXAMPLES = 3


def build(
    corpus_name: str, source: Path, out: Path, options: Options, **importer_options: Any
) -> None:
    """Read a corpus and write its shards to `out`.

    Continues an earlier call with the same options and source that was stopped. Raises
    UserError if `out` has other content, or if more rows must be skipped than
    --max_skipped allows.
    """
    out = out.resolve()
    # Refuse a wrong --out now: reading the source can take minutes.
    earlier_build(out)
    corpus, rows = read_corpus(corpus_name, source, options, importer_options)
    clips, faults = check_rows(rows, options)
    num_rows = sum(map(len, rows.values()))
    check_budget(faults, options.max_skipped, num_rows)
    # An importer notes why it left rows out, such as captions that cannot be read.
    if not any(clips.values()):
        why = f" ({'; '.join(corpus.notes)})" if corpus.notes else ""
        names = ", ".join(rows)
        raise UserError(
            f"--source must have rows of {names}, got none in {source}{why}. Check "
            "--source and --splits."
        )
    recorded = options.recorded() | importer_options
    plan = make_plan(corpus_name, corpus, clips, recorded)
    inputs = Inputs(source, corpus, rows, clips, faults, plan)
    if is_built(out, plan) and not partial_folder(out).exists():
        remove_parts(out)
    elif options.part:
        _build_part(out, inputs, options)
    else:
        _build_all(out, inputs, options)


@dataclass(frozen=True)
class Inputs:
    """Hold what a build reads.

    rows: of each split, in the order of the corpus. clips: in stored order. faults: rows
    that cannot become clips. plan: of `make_plan`.
    """

    source: Path
    corpus: Corpus
    rows: dict[str, list[Row]]
    clips: dict[str, list[Clip]]
    faults: list[Fault]
    plan: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Return the number of rows of all splits."""
        return sum(map(len, self.rows.values()))

    @property
    def compared(self) -> dict[str, Any]:
        """Return what an unfinished build must have in common with this one.

        Without the source: a video whose clip is not finished may still change. `run_jobs`
        compares the videos of finished clips one by one.
        """
        return {name: value for name, value in self.plan.items() if name != "source"}


def _build_all(out: Path, inputs: Inputs, options: Options) -> None:
    """Write all shards, or merge the parts that have been built, and publish them."""
    corpus, rows, num_rows = inputs.corpus, inputs.rows, inputs.num_rows
    with hold(out) as partial:
        # Another process may have finished this build just before the lock was taken, or
        # may have been killed after it published the shards and before it removed its work.
        if is_built(out, inputs.plan):
            partial.discard()
            remove_parts(out)
            return
        partial.begin(inputs.compared, options.restart)
        take_parts(out, inputs.compared, partial)
        notes = corpus.notes + repeat_notes(rows) + empty_notes(rows)
        todo = plan_jobs(inputs, options, partial)
        run_jobs(todo, options, inputs.faults, num_rows)
        done = jobs.collect(todo, partial.shards)
        # Sorted by split and id for the reader: training clips are in shuffled order.
        faults = sorted(inputs.faults + done.faults, key=lambda fault: fault.sentence)
        check_budget(faults, options.max_skipped, num_rows)
        if not done.splits:
            raise UserError(
                f"Cannot build shards of {inputs.source}: all {num_rows:,} rows were skipped. "
                "Run with --max_skipped=0 to see why."
            )
        notes += clamp_notes(done.clamped) + stats.overlap_notes(done.rows)
        publish(partial, corpus, inputs.plan, done, faults, notes)
    remove_parts(out)
    print_report(done.rows, faults, notes)
    print(f"shards are in {out}")


def _build_part(out: Path, inputs: Inputs, options: Options) -> None:
    """Write the shards of one part; the last part that finishes merges them all."""
    part = options.part_of()
    assert part is not None
    number, count = part
    folder = part_folder(out, number, count)
    if options.restart:
        shutil.rmtree(folder, ignore_errors=True)
    if not is_part_built(folder, inputs.compared):
        with hold(folder) as partial:
            # Another process may have finished it just before the lock was taken.
            if not is_part_built(folder, inputs.compared):
                partial.begin(inputs.compared, options.restart)
                todo = plan_jobs(inputs, options, partial)
                # Every n-th job: the parts take about the same time.
                mine = todo[number - 1 :: count]
                run_jobs(mine, options, inputs.faults, inputs.num_rows)
                publish_part(partial, inputs.compared)
    # The last one to publish sees all parts: each one looks after it has published.
    missing = missing_parts(out, count)
    if missing:
        print(f"part {options.part} is finished; not finished yet: {', '.join(missing)}")
        return
    try:
        _build_all(out, inputs, replace(options, part="", restart=False))
    except InUse:
        print(f"part {options.part} is finished; another process merges the parts")


def plan_jobs(inputs: Inputs, options: Options, partial: Partial) -> list[jobs.ShardJob]:
    """Plan one job for each shard.

    With --mb_per_shard, a job gets as many clips as should fit into one shard.
    """
    clips, num_skippable = inputs.clips, options.max_skipped - len(inputs.faults)
    if options.clips_per_shard:
        clips_per_job = dict.fromkeys(clips, options.clips_per_shard)
    else:
        # Measured once: a continued build must divide its clips as before.
        clips_per_job = partial.kept(
            "clips_per_job", lambda: jobs.clips_for_size(clips, options)
        )
    return jobs.plan(
        clips, clips_per_job, partial.work, options, num_skippable, inputs.num_rows
    )


def run_jobs(
    todo: list[jobs.ShardJob], options: Options, faults: list[Fault], num_rows: int
) -> None:
    """Run the unfinished jobs, and the unfinished part of each.

    faults: rows that cannot become clips, found before. Raises UserError if more rows must
    be skipped than --max_skipped allows.
    """
    # Count what an earlier call of this build has finished, and keep the unfinished jobs.
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
            f"continuing an unfinished build: {num_done:,} of {num_clips:,} clips are done",
            flush=True,
        )
    check_budget(faults, options.max_skipped, num_rows)
    # Each worker checks the limit for its own job. This loop checks the sum over all jobs.
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


def publish(
    partial: Partial,
    corpus: Corpus,
    plan: dict[str, Any],
    done: jobs.Collected,
    faults: Sequence[Fault],
    notes: Sequence[str],
) -> None:
    """Write the index of the finished shards, and move them to the output folder."""
    write_index(
        partial.shards,
        corpus=corpus.name,
        language=corpus.language,
        options=plan["options"],
        splits=done.splits,
        skipped=count_faults(faults),
        notes=notes,
        importer=plan["importer"],
        source=plan["source"],
    )
    partial.finish()


def repeat_notes(rows: dict[str, list[Row]]) -> list[str]:
    """Return a note on rows with the id of an earlier row, which are kept."""
    # Count across splits: an id in train and test may be the same clip.
    counts: Counter[str] = Counter()
    for table in rows.values():
        counts.update(row.id for row in table)
    repeated = [name for name, count in counts.items() if count > 1]
    if not repeated:
        return []
    num_more = counts.total() - len(counts)
    return [
        f"{num_more:,} rows have the id of an earlier row and are kept ({_examples(repeated)})"
    ]


def empty_notes(rows: dict[str, list[Row]]) -> list[str]:
    """Return a note for each split without rows."""
    notes = []
    for split, table in rows.items():
        if not table:
            notes.append(f"{split}: has no rows, left out")
    return notes


def clamp_notes(clamped: dict[str, list[str]]) -> list[str]:
    """Return a note for each split with clips that end after their video."""
    notes = []
    for split, ids in clamped.items():
        if ids:
            notes.append(
                f"{split}: {len(ids):,} clips end past their video's end and were cut "
                f"there ({_examples(ids)})"
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
    """Print the number and the first few sentences of each kind of fault."""
    for kind, entry in count_faults(faults).items():
        print(f"skipped, {kind}: {entry['count']:,}")
        for example in entry["examples"]:
            print(f"  {example}")


def _examples(ids: Sequence[str]) -> str:
    """Return the first few ids."""
    return ", ".join(ids[:_NUM_EXAMPLES]) + (", ..." if len(ids) > _NUM_EXAMPLES else "")


def verb(corpus_name: str) -> Callable[..., None]:
    """Return the command that builds one corpus.

    It has the options --source and --out, every field of `Options`, and the keyword-only
    arguments of the importer.
    """
    read = CORPORA[corpus_name]
    keyword = inspect.Parameter.KEYWORD_ONLY
    importer_parameters = []
    defaults = {}
    for parameter in inspect.signature(read).parameters.values():
        if parameter.kind == keyword:
            importer_parameters.append(parameter)
            defaults[parameter.name] = parameter.default

    def run(source: Path, out: Path, **given: Any) -> None:
        options = Options.taken_from(given)
        build(corpus_name, source, out, options, **defaults | given)

    # The command line reads the names and types of options from the signature, and the help
    # from the docstring. So `run` gets the parameters of all three.
    parameters = [
        inspect.Parameter("source", keyword, annotation=Path),
        inspect.Parameter("out", keyword, annotation=Path),
    ]
    for parameter in inspect.signature(Options).parameters.values():
        parameters.append(parameter.replace(kind=keyword))
    parameters += importer_parameters
    signature = inspect.Signature(parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    # The help of `shards build` lists the options that all importers share, once.
    run.__doc__ = (
        f"{inspect.getdoc(read)}\n--out: the shard folder to write.\n\n"
        "Options of every corpus: python shards/build.py --help"
    )
    setattr(run, DESCRIBED_ABOVE, tuple(inspect.signature(Options).parameters))
    return run


VERBS = {name: verb(name) for name in CORPORA}
