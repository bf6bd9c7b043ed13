"""Compute confidence intervals of BLEU-4 and of differences, by paired bootstrap.

Sentences of the test set are resampled. Source: Koehn (2004), "Statistical Significance
Tests for Machine Translation Evaluation"; sacreBLEU counts the n-grams.

Shapes: R resampled test sets, N sentences, C counts of n-grams and lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from flallm_ds.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A score, and the interval that contains 95 % of the resampled scores."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Bootstrap:
    """BLEU-4 of several systems on the same resampled test sets.

    means: maps each system to an array (1 + R,), its BLEU-4 averaged over its runs. The
    first value is of the whole test set.
    """

    means: Mapping[str, np.ndarray]

    def score(self, system: str) -> Interval:
        return _interval(self.means[system])

    def difference(self, better: str, worse: str) -> tuple[Interval, float]:
        """Return (better - worse, share of resampled sets on which it is at most 0)."""
        gaps = self.means[better] - self.means[worse]
        return _interval(gaps), float((gaps[1:] <= 0).mean())


def paired_bootstrap(
    systems: Mapping[str, Sequence[Sequence[str]]],
    references: Sequence[str],
    tokenize: str = "13a",
    resamples: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """Score systems on the test set and on `resamples` resampled ones.

    systems: maps the name of a system to the hypotheses of each of its runs (seeds), in the
    order of the references. All systems and runs are scored on the same resampled sets.
    tokenize: `word_rule` of the language (zh for Chinese, char for other languages without
    spaces). Raises UserError if the number of hypotheses differs from that of references.
    """
    n = len(references)
    for name, runs in systems.items():
        for hypotheses in runs:
            if len(hypotheses) != n or not n:
                raise UserError(
                    f"Each run of {name} must have one hypothesis for each of {n} "
                    f"references (at least 1), got {len(hypotheses)}."
                )

    # times_RN: how often each test set contains each sentence. The first row is the whole
    # test set, the others are resampled.
    times_RN = np.ones((resamples + 1, n), int)
    picks_RN = np.random.default_rng(seed).integers(0, n, (resamples, n))
    for times_N, picks_N in zip(times_RN[1:], picks_RN, strict=True):
        times_N[:] = np.bincount(picks_N, minlength=n)

    means = {}
    for name, runs in systems.items():
        scores = []
        for hypotheses in runs:
            # Corpus BLEU needs only sums of counts over sentences, so that one matrix
            # product gives the sums of all test sets.
            sums_RC = times_RN @ _counts(hypotheses, references, tokenize)
            scores.append([_bleu(sums_C) for sums_C in sums_RC])
        means[name] = np.mean(scores, axis=0)
    return Bootstrap(means)


def _counts(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: str
) -> np.ndarray:
    """Count n-grams of each sentence: (N, 10).

    The columns are matching n-grams of orders 1 to 4, all n-grams of orders 1 to 4, and the
    lengths of hypothesis and reference.
    """
    metric = BLEU(tokenize=tokenize, effective_order=True, force=True)
    counts = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        bleu = metric.sentence_score(hypothesis, [reference])
        counts.append([*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len])
    return np.array(counts)


def _bleu(sums_C: np.ndarray) -> float:
    """Compute BLEU-4 in percent from the sums of the columns of `_counts`."""
    values = sums_C.tolist()
    bleu = BLEU.compute_bleu(
        correct=values[:4],
        total=values[4:8],
        sys_len=values[8],
        ref_len=values[9],
        smooth_method="exp",
    )
    return float(bleu.score)


def _interval(values: np.ndarray) -> Interval:
    """Make an interval. values: of the whole test set first, then of the resampled ones."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
