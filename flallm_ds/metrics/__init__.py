"""Score translations, and record how each value was computed.

BLEU-1 to 4, ROUGE-L, chrF, TER, WER and CER, and BLEURT with a checkpoint. Published
results differ in tokenizer, smoothing and ROUGE: `score` follows the defaults of sacreBLEU,
or a preset of presets.py.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flallm_ds.data.text.languages import tag_or_name, word_rule
from flallm_ds.errors import UserError
from flallm_ds.metrics.bleu import BleuRule, bleu_counts, chrf_counts, length_ratio
from flallm_ds.metrics.columns import COLUMNS
from flallm_ds.metrics.counts import Counts, interval, resampled_scores
from flallm_ds.metrics.error_rates import error_counts
from flallm_ds.metrics.presets import (
    DEFAULT,
    Preset,
    RoundTrip,
    find_preset,
    prepared,
    rule_of,
)
from flallm_ds.metrics.rouge import rouge_counts

# Returns the counts of a metric of hypotheses and references, such as `Bleurt.counts`.
Metric = Callable[[Sequence[str], Sequence[str]], Counts]

__all__ = ["Scores", "score", "score_by_language"]


@dataclass(frozen=True)
class Scores:
    """Scores of one system over one test set."""

    values: Mapping[str, float]
    """Maps the key of each column in `COLUMNS` to a score in percent."""
    length_ratio: float
    """Number of hypothesis tokens divided by number of reference tokens, as in BLEU."""
    num_sentences: int
    signatures: Mapping[str, str]
    """Maps each key of `SIGNATURES` to a description of how the score was computed."""
    preset: str
    rule: str
    """The rule of the preset, for people."""
    resampled: Mapping[str, np.ndarray] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Maps each key to the scores of resampled test sets, (R,); empty if there are none."""

    @property
    def bleu4(self) -> float:
        """Return BLEU-4 in percent, which selects the best export."""
        return self.values["bleu4"]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the 95 % interval of each score; empty without resampled test sets."""
        return {key: interval(scores) for key, scores in self.resampled.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all values by name, for a JSON file."""
        found: dict[str, Any] = {}
        for column in COLUMNS:
            if column.key in self.values:
                found[column.key] = self.values[column.key]
        if self.resampled:
            found["intervals"] = self.intervals
        return {
            **found,
            "length_ratio": self.length_ratio,
            "num_sentences": self.num_sentences,
            "preset": self.preset,
            "rule": self.rule,
            **self.signatures,
        }

    def logged(self) -> dict[str, float]:
        """Return the scores that training logs, by key."""
        values = {}
        for column in COLUMNS:
            if column.logged:
                values[column.key] = self.values[column.key]
        return values


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str,
    preset: str = DEFAULT,
    *,
    round_trip: RoundTrip | None = None,
    error_rates: bool = True,
    resamples: int = 0,
    trained: Metric | None = None,
) -> Scores:
    """Score hypotheses against one reference each, in the same order.

    language: language of the text, by any name that `find_language` accepts. Chinese is
    tokenized by sacreBLEU's `zh`, other languages without spaces between words (Japanese,
    Thai, ...) by characters. preset: one of `PRESET_NAMES`. round_trip: encodes and decodes
    references with a tokenizer, for presets that score decoded references. error_rates:
    whether to compute TER, WER and CER. resamples: number of resampled test sets for
    intervals. trained: a trained metric, which scores the text as it is, without the
    preset. Raises UserError if the numbers of hypotheses and references differ or are
    0, or if the preset does not fit the language.
    """
    check_pairs(hypotheses, references)
    chosen = find_preset(preset)
    metrics = preset_counts(
        chosen, hypotheses, references, language, round_trip, error_rates
    )
    if trained is not None:
        metrics.append(trained(hypotheses, references))
    values: dict[str, float] = {}
    signatures: dict[str, str] = {}
    for metric in metrics:
        values |= metric.score()
        signatures |= metric.signatures
    return Scores(
        values,
        length_ratio=length_ratio(metrics[0]),
        num_sentences=len(references),
        signatures=signatures,
        preset=preset,
        rule=rule_of(chosen, round_trip is not None),
        resampled=resampled_scores(metrics, resamples) if resamples else {},
    )


def check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise UserError if the numbers of hypotheses and references differ or are 0."""
    if len(hypotheses) != len(references):
        raise UserError(
            f"The number of hypotheses must equal the number of references "
            f"({len(references)}), got {len(hypotheses)}. Give one hypothesis for each "
            "reference, in the same order."
        )
    if not references:
        raise UserError("The number of sentences to score must be at least 1, got 0.")


def preset_counts(
    preset: Preset,
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str,
    round_trip: RoundTrip | None = None,
    error_rates: bool = False,
) -> list[Counts]:
    """Return the counts of BLEU (first), ROUGE-L, chrF, and TER, WER, CER if wanted."""
    said, meant = prepared(preset, hypotheses, references, language, round_trip)
    rule = word_rule(language)
    bleu = BleuRule(
        preset.bleu_tokenizer(rule),
        preset.smooth,
        preset.smooth_value,
        preset.effective_order,
    )
    # ROUGE uses the same units as BLEU: characters if the language has no spaces.
    characters = rule != "13a" and preset.unspaced == "language"
    metrics = [
        bleu_counts(said, meant, bleu),
        rouge_counts(said, meant, preset.rouge, characters),
        chrf_counts(said, meant),
    ]
    if error_rates:
        metrics += error_counts(said, meant, characters)
    return metrics


def score_by_language(
    hypotheses: Sequence[str],
    references: Sequence[str],
    languages: Sequence[str],
    preset: str = DEFAULT,
    *,
    round_trip: RoundTrip | None = None,
    error_rates: bool = True,
    resamples: int = 0,
    trained: Metric | None = None,
) -> Scores:
    """Score each language with its own tokenizer and return the mean over languages.

    languages: language of each pair of sentences. All languages have the same weight,
    regardless of their number of sentences. With one language, the result equals `score`,
    which describes the other arguments.
    """
    # Group by tag, because "de" and "German" are the same language.
    rows_by_tag = defaultdict(list)
    for row, language in enumerate(languages):
        rows_by_tag[tag_or_name(language)].append(row)
    check_pairs(hypotheses, references)

    scores = {}
    for tag, rows in sorted(rows_by_tag.items()):
        scores[tag] = score(
            [hypotheses[row] for row in rows],
            [references[row] for row in rows],
            tag,
            preset,
            round_trip=round_trip,
            error_rates=error_rates,
            resamples=resamples,
            trained=trained,
        )
    if len(scores) == 1:
        return next(iter(scores.values()))
    return _mean(scores)


def _mean(scores: Mapping[str, Scores]) -> Scores:
    """Average scores over languages. scores: maps two or more languages to their scores."""
    parts = list(scores.values())
    values = {}
    for key in parts[0].values:
        values[key] = sum(part.values[key] for part in parts) / len(parts)
    resampled = {}
    for key in parts[0].resampled:
        resampled[key] = np.mean([part.resampled[key] for part in parts], axis=0)
    signatures = {}
    for key in parts[0].signatures:
        rules = [f"{language}: {part.signatures[key]}" for language, part in scores.items()]
        signatures[key] = f"mean over languages ({'; '.join(rules)})"
    return Scores(
        values,
        length_ratio=sum(part.length_ratio for part in parts) / len(parts),
        num_sentences=sum(part.num_sentences for part in parts),
        signatures=signatures,
        preset=parts[0].preset,
        rule=parts[0].rule,
        resampled=resampled,
    )
