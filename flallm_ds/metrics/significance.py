"""How sure a BLEU score, or a difference of two, is: paired bootstrap over the sentences
of a test set.

Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation";
counts by sacreBLEU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from flallm_ds.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A score with the interval that holds 95 % of the resampled ones."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Bootstrap:
    """BLEU-4 of several systems over the same resampled test sets.

    means: {system: (resamples + 1,)}; the mean over its runs, of the whole test set
    first.
    """

    means: Mapping[str, np.ndarray]

    def score(self, system: str) -> Interval:
        return _interval(self.means[system])

    def difference(self, better: str, worse: str) -> tuple[Interval, float]:
        """(better - worse, the share of resampled test sets on which it is not above 0)."""
        gaps = self.means[better] - self.means[worse]
        return _interval(gaps), float((gaps[1:] <= 0).mean())


def paired_bootstrap(
    systems: Mapping[str, Sequence[Sequence[str]]],
    references: Sequence[str],
    tokenize: str = "13a",
    resamples: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """systems: {name: hypotheses of each run, in the order of the references}; runs
    differ by their seeds.

    tokenize: `word_rule` of the language (zh for Chinese, char for others without
    spaces). A resampled test set is the same for all systems and runs. Raises UserError
    for lists of other lengths.
    """
    n = len(references)
    picks_RN = (
        np.random.default_rng(seed).integers(0, n, (resamples, n))
        if n
        else np.zeros((0, 0), int)
    )
    times_RN = np.stack(
        [np.ones(n, int), *(np.bincount(picks, minlength=n) for picks in picks_RN)]
    )
    means = {}
    for name, runs in systems.items():
        for hypotheses in runs:
            if len(hypotheses) != n or not n:
                raise UserError(
                    f"{name} must have a hypothesis for each of {n} references (one at "
                    f"least), but has {len(hypotheses)}."
                )
        counts = [_counts(hypotheses, references, tokenize) for hypotheses in runs]
        means[name] = np.mean(
            [[_bleu(sums) for sums in times_RN @ of_run] for of_run in counts], axis=0
        )
    return Bootstrap(means)


def _counts(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: str
) -> np.ndarray:
    """(N, 10): matching and all n-grams of orders 1 to 4, length of hypothesis and of
    reference."""
    metric = BLEU(tokenize=tokenize, effective_order=True, force=True)
    scores = [
        metric.sentence_score(h, [r]) for h, r in zip(hypotheses, references, strict=True)
    ]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores])


def _bleu(sums: np.ndarray) -> float:
    values = [int(value) for value in sums]
    return float(
        BLEU.compute_bleu(
            correct=values[:4],
            total=values[4:8],
            sys_len=values[8],
            ref_len=values[9],
            smooth_method="exp",
        ).score
    )


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
