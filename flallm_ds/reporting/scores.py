"""The scores of a report: stored results of evaluations, and paired tests between runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flallm_ds.data.text.languages import word_rule
from flallm_ds.metrics.bleu import BleuRule
from flallm_ds.metrics.ceiling import is_low
from flallm_ds.metrics.columns import CEILING, COLUMNS, SIGNATURES, has_scores
from flallm_ds.metrics.significance import Interval, paired_bootstrap
from flallm_ds.reporting.runs import Run

# Fields of SPLIT.json with scores, and how the table names them; others by their key.
_TITLES = {"scores": "", "blind": "blind control"}
# Fields whose entries need no other name than their own.
_CONTAINERS = ("controls", "slices")


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores. part: empty for the model on the whole split, else a
    control, a corpus or a language. cells: (score, interval) of each column, as text."""

    run: str
    split: str
    part: str
    clips: str
    cells: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ScoreTable:
    """The stored scores of all runs.

    titles: of the columns. rows: of whole splits and their controls. slices: of parts of
    splits, such as the clips of a signer. signatures: {title: distinct signatures of the
    rows}. meanings: sentences about the controls.
    """

    titles: Sequence[str]
    rows: Sequence[ScoreRow]
    slices: Sequence[ScoreRow]
    signatures: Mapping[str, Sequence[str]]
    meanings: Sequence[str]


def score_table(runs: Sequence[Run]) -> ScoreTable:
    """Return the stored scores of all evaluated splits."""
    found = []
    meanings = []
    for run in runs:
        for split, evaluation in run.evaluations.items():
            for path, scores in _scores_in(evaluation.results):
                found.append((run.name, split, path, scores))
            for sentence in evaluation.results.get("meanings") or ():
                place = f"{run.name}, {split}" if len(runs) > 1 else split
                meanings.append(f"{place}: {sentence}")
    columns = [c for c in COLUMNS if any(c.key in scores for *_, scores in found)]
    if any(is_low(scores) for *_, scores in found):
        columns.append(CEILING)
    rows: list[ScoreRow] = []
    slices: list[ScoreRow] = []
    signatures: dict[str, dict[str, None]] = {}
    for run_name, split, path, scores in found:
        cells = [(column.text(scores), column.interval_text(scores)) for column in columns]
        num = scores.get("num_sentences")
        clips = f"{num:,}" if isinstance(num, int) else ""
        part = ": ".join(path).replace("_", " ")
        row = ScoreRow(run_name, split, part, clips, cells)
        # Parts of a split are nested, as `slices` in {way to divide the split: {part: ...}}.
        (slices if len(path) > 1 else rows).append(row)
        for key, title in SIGNATURES.items():
            if key in scores:
                signatures.setdefault(title, {})[str(scores[key])] = None
    return ScoreTable(
        [column.title for column in columns],
        rows,
        slices,
        {title: list(distinct) for title, distinct in signatures.items()},
        meanings,
    )


def _scores_in(
    results: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield (path, scores) of everything in SPLIT.json that has scores.

    path: the names that lead to the scores, without those of `_CONTAINERS`.
    """
    for key, value in results.items():
        own = () if key in _CONTAINERS else (_TITLES.get(key, key),)
        if key == "ceiling":
            continue  # each row has its own
        if has_scores(value):
            yield (*path, *own), value
        elif isinstance(value, dict):
            yield from _scores_in(value, (*path, *own))


# --- paired tests


@dataclass(frozen=True)
class Compared:
    """BLEU-4 of a run, and its difference to the first run.

    difference: None for the first run. share: of the resampled test sets on which this run
    is not better.
    """

    run: str
    score: Interval
    difference: Interval | None = None
    share: float | None = None


def compare_runs(runs: Sequence[Run], split: str) -> tuple[list[Compared], str]:
    """Compare runs on a split by paired bootstrap. Return (differences, why there are none).

    The first run that was evaluated on the split is the one that others are compared with.
    """
    evaluated = [run for run in runs if split in run.evaluations]
    if len(evaluated) < 2:
        return [], ""
    references = None
    systems: dict[str, list[list[str]]] = {}
    rules = set()
    for run in evaluated:
        clips = sorted(run.evaluations[split].hypotheses, key=lambda clip: clip.key)
        of_run = [(clip.key, clip.reference) for clip in clips]
        if references not in (None, of_run):
            return [], (
                f"{run.name} was evaluated on other clips or references than "
                f"{evaluated[0].name}: they cannot be compared."
            )
        references = of_run
        systems[run.name] = [[clip.hypothesis for clip in clips]]
        rules |= {word_rule(clip.language) for clip in clips}
    if len(rules) > 1:
        return [], "The split has languages with several tokenizers of BLEU."
    first = evaluated[0].name
    bootstrap = paired_bootstrap(
        systems,
        [reference for _, reference in references or []],
        BleuRule(rules.pop()),
    )
    found = [Compared(first, bootstrap.score(first))]
    for run in evaluated[1:]:
        difference, share = bootstrap.difference(run.name, first)
        found.append(Compared(run.name, bootstrap.score(run.name), difference, share))
    return found, ""
