"""Compute corpus scores from the counts of each sentence, and resample test sets.

Each score is a function of sums over sentences. So a corpus, a part of a corpus and a
resampled test set are scored from the same counts, and n-grams are counted once. Scores
that are averaged over ranks or batches are other numbers: only counts can be added.

Shapes: R resampled test sets, N sentences, C counts, K scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# The number of resampled test sets and the seed are the defaults of sacreBLEU, so that
# intervals equal those of its option `n_bootstrap`.
RESAMPLES = 1000
SEED = 12345


@dataclass(frozen=True)
class Counts:
    """The counts of one metric for each sentence.

    keys: names of the K scores. counts_NC: one row per sentence. scores_of: computes the
    scores, in percent, from the sums of counts (C,). signatures: how they are computed.
    """

    keys: tuple[str, ...]
    counts_NC: np.ndarray
    scores_of: Callable[[np.ndarray], Sequence[float]]
    signatures: Mapping[str, str]

    def score(self, rows: np.ndarray | None = None) -> dict[str, float]:
        """Return {key: score} of all sentences, or of some.

        rows: indices of sentences, int (n,).
        """
        chosen = self.counts_NC if rows is None else self.counts_NC[rows]
        return dict(zip(self.keys, self.scores_of(chosen.sum(axis=0)), strict=True))


def resampled_scores(
    metrics: Sequence[Counts], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, np.ndarray]:
    """Score test sets whose sentences are drawn with replacement.

    All metrics are scored on the same test sets. Return {key: scores (R,)}.
    """
    joined_NC = np.concatenate([metric.counts_NC for metric in metrics], axis=1)
    sums_RC = resampled_sums(joined_NC, resamples, seed)
    found: dict[str, np.ndarray] = {}
    begin = 0
    for metric in metrics:
        end = begin + metric.counts_NC.shape[1]
        scores_RK = np.array([metric.scores_of(sums) for sums in sums_RC[:, begin:end]])
        found |= dict(zip(metric.keys, scores_RK.T, strict=True))
        begin = end
    return found


def resampled_sums(
    counts_NC: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Return the sums of counts of resampled test sets, (R, C)."""
    num = len(counts_NC)
    random = np.random.default_rng(seed)
    sums = []
    for _ in range(resamples):
        # How often the test set contains each sentence. A product with these numbers is
        # faster than a sum over the drawn rows.
        times_N = np.bincount(random.integers(0, num, num), minlength=num)
        sums.append(times_N @ counts_NC)
    return np.array(sums)


def interval(scores_R: np.ndarray) -> tuple[float, float]:
    """Return the bounds that contain 95 % of resampled scores, as sacreBLEU counts them."""
    ordered = np.sort(scores_R)
    outside = len(ordered) // 40
    return float(ordered[outside]), float(ordered[len(ordered) - outside - 1])
