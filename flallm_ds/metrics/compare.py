"""Compare systems: `flallm compare` for run folders and files of any project."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flallm_ds.data.text.languages import word_rule
from flallm_ds.errors import UserError
from flallm_ds.metrics import score
from flallm_ds.metrics.bleu import BleuRule
from flallm_ds.metrics.columns import COLUMNS
from flallm_ds.metrics.presets import DEFAULT, find_preset, prepared
from flallm_ds.metrics.score_files import languages_of
from flallm_ds.metrics.significance import (
    Difference,
    paired_bootstrap,
    paired_tests,
)
from flallm_ds.metrics.table import markdown
from flallm_ds.metrics.texts import Pairs, read_pairs

# A difference with a lower p value is called significant.
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class System:
    """The outputs of the runs of a system for the same references.

    runs: maps the name of a run to its hypotheses. ids: of the clips, empty if not known.
    """

    name: str
    runs: dict[str, list[str]]
    references: list[str]
    ids: list[str]
    language: str


def read_system(
    name: str,
    split: str,
    references: Path | None = None,
    language: str = "",
    like: System | None = None,
) -> System:
    """Read the hypotheses of a run folder, of a file, or of all that a pattern names.

    split: of run folders. references, language: as in `score_files`. like: another system,
    whose order of clips is used. Raises UserError if there are no hypotheses, or if runs
    or systems have different references.
    """
    is_pattern = re.search(r"[*?\[]", name) is not None
    # glob, because a pattern may be absolute.
    paths = sorted(glob.glob(name)) if is_pattern else [name]  # noqa: PTH207
    if not paths:
        raise UserError(f"Cannot find a run or file for {name}. Check the pattern.")
    runs: dict[str, list[str]] = {}
    base = like
    for path in paths:
        pairs = read_pairs(_hypotheses_of(Path(path), split), references)
        # The first run of the first system sets the order.
        if base is None:
            base = System(
                path, {}, pairs.references, pairs.ids, _one_language(pairs, language, path)
            )
        runs[path] = _aligned(pairs, base, path)
    assert base is not None
    return System(name, runs, base.references, base.ids, base.language)


def _one_language(pairs: Pairs, language: str, path: str) -> str:
    """Return the language of a file. Raises UserError if it has several."""
    languages = sorted(set(languages_of(pairs, language)))
    if len(languages) > 1:
        raise UserError(
            f"Systems must be compared in one language, got {', '.join(languages)} in "
            f"{path}. Compare the clips of one language."
        )
    return languages[0]


def _hypotheses_of(path: Path, split: str) -> Path:
    """Return the file of hypotheses of a run folder or an export; a file itself."""
    if not path.is_dir():
        return path
    found = path / "evaluation" / f"{split}.hypotheses.jsonl"
    if not found.is_file():
        raise UserError(
            f"Cannot read {found}: {split} was not evaluated. Run deepspeed "
            f"launch/evaluate.py --run {path} --split {split} first."
        )
    return found


def _aligned(pairs: Pairs, base: System, path: str) -> list[str]:
    """Return hypotheses in the order of another system. Raises UserError if the clips or
    the references differ."""
    hypotheses, references = pairs.hypotheses, pairs.references
    if pairs.ids and base.ids and pairs.ids != base.ids:
        rows = {one: row for row, one in enumerate(pairs.ids)}
        if rows.keys() != set(base.ids):
            other = sorted(rows.keys() ^ set(base.ids))[0]
            raise UserError(
                f"Systems must be compared on the same clips, got {other!r} only in one of "
                f"{base.name} and {path}. Score the same split."
            )
        order = [rows[one] for one in base.ids]
        hypotheses = [hypotheses[row] for row in order]
        references = [references[row] for row in order]
    if references != base.references:
        raise UserError(
            "Systems must be compared on the same references, got others in "
            f"{path} than in {base.name}. Score the same split."
        )
    return hypotheses


def compare(
    first: System,
    second: System,
    preset: str = DEFAULT,
    resamples: int = 1000,
    trials: int = 10_000,
) -> str:
    """Return tables of the scores of two systems and of their difference.

    second: read like the first. Raises UserError if the preset does not fit the language.
    """
    assert first.references == second.references
    parts = []
    if len(first.runs) == len(second.runs) == 1:
        (said,), (other,) = first.runs.values(), second.runs.values()
        rule = _rule(preset, first.language)
        ours, meant = _texts(preset, said, first)
        theirs, _ = _texts(preset, other, first)
        found = paired_tests(ours, theirs, meant, rule, resamples, trials)
        parts += [_test_table(found), *_conclusions(found, first.name, second.name)]
        parts += [f"{one.metric} signature: {one.signature}" for one in found]
    else:
        parts += [runs_table(system, preset) for system in (first, second)]
        parts.append(_difference_of_means(first, second, preset, resamples))
    return "\n".join(parts)


def _rule(preset: str, language: str) -> BleuRule:
    chosen = find_preset(preset)
    return BleuRule(
        chosen.bleu_tokenizer(word_rule(language)),
        chosen.smooth,
        chosen.smooth_value,
        chosen.effective_order,
    )


def _texts(
    preset: str, hypotheses: Sequence[str], system: System
) -> tuple[list[str], list[str]]:
    """Return hypotheses and references as the preset scores them."""
    return prepared(find_preset(preset), hypotheses, system.references, system.language)


def _test_table(found: Sequence[Difference]) -> str:
    cells = [["", "first", "second", "difference", "bootstrap p", "randomization p"]]
    for one in found:
        title = f"{one.metric} (lower is better)" if one.lower_is_better else one.metric
        numbers = [f"{one.first:.2f}", f"{one.second:.2f}", f"{one.gap:+.2f}"]
        chances = [f"{one.bootstrap:.4f}", f"{one.randomization:.4f}"]
        cells.append([title, *numbers, *chances])
    return markdown(cells)


def _conclusions(found: Sequence[Difference], first: str, second: str) -> list[str]:
    """Say for each metric which system is better."""
    lines = [f"first: {first}", f"second: {second}"]
    for one in found:
        if max(one.bootstrap, one.randomization) < SIGNIFICANT:
            second_is_better = (one.gap > 0) != one.lower_is_better
            better = "The second" if second_is_better else "The first"
            lines.append(f"{better} system is significantly better in {one.metric}.")
        else:
            lines.append(f"There is no significant difference in {one.metric}.")
    return lines


def runs_table(system: System, preset: str = DEFAULT) -> str:
    """Return a table of the scores of each run, their mean and their deviation."""
    columns = [column for column in COLUMNS if column.always]
    cells = [[system.name, *(column.title for column in columns)]]
    values = []
    for name, hypotheses in system.runs.items():
        found = score(
            hypotheses, system.references, system.language, preset, error_rates=False
        )
        values.append([found.values[column.key] for column in columns])
        cells.append([name, *(f"{value:.2f}" for value in values[-1])])
    means = np.mean(values, axis=0)
    cells.append([f"mean of {len(values)}", *(f"{value:.2f}" for value in means)])
    if len(values) > 1:
        # Of a sample: the runs are some of all possible seeds.
        deviations = np.std(values, axis=0, ddof=1)
        cells.append(["deviation", *(f"{value:.2f}" for value in deviations)])
    return markdown(cells)


def _difference_of_means(first: System, second: System, preset: str, resamples: int) -> str:
    """Return the difference of the mean BLEU-4, with its interval."""
    rule = _rule(preset, first.language)
    outputs = {}
    for name, system in (("first", first), ("second", second)):
        outputs[name] = [_texts(preset, one, first)[0] for one in system.runs.values()]
    _, meant = _texts(preset, outputs["first"][0], first)
    found = paired_bootstrap(outputs, meant, rule, resamples)
    gap, chance = found.difference("second", "first")
    return (
        f"{second.name} - {first.name}: BLEU-4 {gap.value:+.2f}, 95 % interval "
        f"{gap.low:+.2f} to {gap.high:+.2f} over sentences (not over seeds), share of "
        f"resampled test sets without a gain {chance:.3f}"
    )
