"""Test whether the difference between two systems is significant.

`paired_tests` are those of sacreBLEU for two outputs: bootstrap and approximate
randomization. `paired_bootstrap` compares means over several runs (seeds) of each system.
Source: Koehn (2004), "Statistical Significance Tests for Machine Translation Evaluation";
Riezler and Maxwell (2005), "On Some Pitfalls in Automatic Evaluation and Significance
Testing for MT".

Shapes: R resampled test sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.significance import PairedTest

from flallm_ds.errors import UserError
from flallm_ds.metrics.bleu import DEFAULT_RULE, BleuRule, bleu_counts
from flallm_ds.metrics.counts import RESAMPLES, resampled_sums

# Number of trials of approximate randomization: the default of sacreBLEU.
TRIALS = 10_000


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
    rule: BleuRule = DEFAULT_RULE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrap:
    """Score systems on the test set and on `resamples` resampled ones.

    systems: maps the name of a system to the hypotheses of each of its runs (seeds), in the
    order of the references. All systems and runs are scored on the same resampled sets.
    Raises UserError if the number of hypotheses differs from that of references.
    """
    n = len(references)
    for name, runs in systems.items():
        for hypotheses in runs:
            if len(hypotheses) != n or not n:
                raise UserError(
                    f"Each run of {name} must have one hypothesis for each of {n} "
                    f"references (at least 1), got {len(hypotheses)}."
                )

    means = {}
    for name, runs in systems.items():
        scores = []
        for hypotheses in runs:
            counts = bleu_counts(hypotheses, references, rule)
            sums_RC = resampled_sums(counts.counts_NC, resamples, seed)
            whole = counts.counts_NC.sum(axis=0)
            scores.append([rule.scores(sums)[-1] for sums in (whole, *sums_RC)])
        means[name] = np.mean(scores, axis=0)
    return Bootstrap(means)


def _interval(values: np.ndarray) -> Interval:
    """Make an interval. values: of the whole test set first, then of the resampled ones."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """The scores of two systems by one metric, and how likely chance explains the gap.

    first, second: the scores. bootstrap, randomization: p values of the paired tests of
    sacreBLEU. lower_is_better: whether the metric is an error rate.
    """

    metric: str
    first: float
    second: float
    bootstrap: float
    randomization: float
    lower_is_better: bool
    signature: str

    @property
    def gap(self) -> float:
        """Return second - first."""
        return self.second - self.first


def paired_tests(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str],
    rule: BleuRule,
    resamples: int = RESAMPLES,
    trials: int = TRIALS,
) -> list[Difference]:
    """Compare the outputs of two systems by BLEU-4, chrF and TER.

    resamples, trials: numbers of test sets of the bootstrap and the randomization.
    """
    assert len(first) == len(second) == len(references) > 0
    systems = [("first", list(first)), ("second", list(second))]
    found: dict[str, dict[str, list[Any]]] = {}
    signatures: dict[str, Any] = {}
    for kind, number in (("bs", resamples), ("ar", trials)):
        metrics = {"BLEU": rule.metric(), "chrF": CHRF(), "TER": TER()}
        test = PairedTest(
            systems, metrics, [list(references)], test_type=kind, n_samples=number
        )
        # The names of sacreBLEU are those of its scores: BLEU, chrF2, TER.
        signatures, found[kind] = test()
    differences = []
    for name, signature in signatures.items():
        ours, theirs = found["bs"][name]
        one = Difference(
            name,
            ours.score,
            theirs.score,
            bootstrap=_chance(found["bs"][name]),
            randomization=_chance(found["ar"][name]),
            lower_is_better=name == "TER",
            signature=str(signature),
        )
        differences.append(one)
    return differences


def _chance(results: Sequence[Any]) -> float:
    """Return the p value of two results of sacreBLEU; 1 if the scores are equal.

    For equal scores sacreBLEU gives the smallest p value, because it counts only trials
    with a larger difference.
    """
    first, second = results
    return 1.0 if first.score == second.score else float(second.p_value)
