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
    for name, runs in systems.items():
        for hypotheses in runs:
            if len(hypotheses) != n or not n:
                raise UserError(
                    f"{name} must have a hypothesis for each of {n} references (one at "
                    f"least), but has {len(hypotheses)}."
                )

    # How often each resampled test set contains each sentence. Row 0 is the whole test set.
    times_RN = np.ones((resamples + 1, n), int)
    picks_RN = np.random.default_rng(seed).integers(0, n, (resamples, n))
    for times_N, picks_N in zip(times_RN[1:], picks_RN, strict=True):
        times_N[:] = np.bincount(picks_N, minlength=n)

    means = {}
    for name, runs in systems.items():
        scores = []
        for hypotheses in runs:
            # BLEU needs sums over sentences only, so one matrix product scores all sets.
            sums_RC = times_RN @ _counts(hypotheses, references, tokenize)
            scores.append([_bleu(sums_C) for sums_C in sums_RC])
        means[name] = np.mean(scores, axis=0)
    return Bootstrap(means)


def _counts(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: str
) -> np.ndarray:
    """(N, 10): matching and all n-grams of orders 1 to 4, length of hypothesis and of
    reference."""
    metric = BLEU(tokenize=tokenize, effective_order=True, force=True)
    counts = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        bleu = metric.sentence_score(hypothesis, [reference])
        counts.append([*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len])
    return np.array(counts)


def _bleu(sums: np.ndarray) -> float:
    values = sums.tolist()
    bleu = BLEU.compute_bleu(
        correct=values[:4],
        total=values[4:8],
        sys_len=values[8],
        ref_len=values[9],
        smooth_method="exp",
    )
    return float(bleu.score)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
