"""Compute BLEU-1 to BLEU-4 and chrF with sacreBLEU, and return their signatures.

Published results differ in tokenizer, smoothing and effective order, so these are
arguments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from flallm_ds.metrics.counts import Counts

MAX_ORDER = 4
BLEU_KEYS = ("bleu1", "bleu2", "bleu3", "bleu4")

Smoothing = Literal["exp", "floor", "none", "coco"]


@dataclass(frozen=True)
class BleuRule:
    """How BLEU is computed.

    tokenize: a tokenizer of sacreBLEU. smooth: a method of sacreBLEU, or coco for the
    formula of the COCO caption evaluation. effective_order: as in sacreBLEU.
    """

    tokenize: str = "13a"
    smooth: Smoothing = "exp"
    smooth_value: float | None = None
    effective_order: bool = False

    def metric(self) -> Any:
        """Return the metric of sacreBLEU that counts n-grams and has the signature."""
        # coco adds constants of 1e-9 and less, so its score is that without smoothing.
        method = "none" if self.smooth == "coco" else self.smooth
        # force=True: PHOENIX14T is tokenized text that ends with " .", and sacreBLEU would
        # warn about it at each call.
        return BLEU(
            tokenize=self.tokenize,
            smooth_method=method,
            smooth_value=self.smooth_value,
            effective_order=self.effective_order,
            max_ngram_order=MAX_ORDER,
            force=True,
        )

    def scores(self, sums_C: np.ndarray) -> list[float]:
        """Return BLEU-1 to BLEU-4 in percent.

        sums_C: lengths of hypotheses and references, matching n-grams of orders 1 to 4,
        all n-grams of orders 1 to 4.
        """
        counts = sums_C.tolist()
        if self.smooth == "coco":
            return _coco_scores(counts)
        # The counts of order 4 contain those of all lower orders.
        found = []
        for order in range(1, MAX_ORDER + 1):
            bleu = BLEU.compute_bleu(
                correct=counts[2 : 2 + order],
                total=counts[2 + MAX_ORDER : 2 + MAX_ORDER + order],
                # sacreBLEU formats the lengths as integers.
                sys_len=int(counts[0]),
                ref_len=int(counts[1]),
                smooth_method=self.smooth,
                smooth_value=self.smooth_value,
                effective_order=self.effective_order,
                max_ngram_order=order,
            )
            found.append(float(bleu.score))
        return found


DEFAULT_RULE = BleuRule()


def _coco_scores(counts: Sequence[float]) -> list[float]:
    """Return BLEU-1 to BLEU-4 by the COCO caption evaluation, which adds tiny constants."""
    tiny, small = 1e-15, 1e-9
    ratio = (counts[0] + tiny) / (counts[1] + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product = 1.0
    found = []
    for order in range(1, MAX_ORDER + 1):
        correct, total = counts[1 + order], counts[1 + MAX_ORDER + order]
        product *= (correct + tiny) / (total + small)
        found.append(100 * brevity * product ** (1 / order))
    return found


def bleu_counts(
    hypotheses: Sequence[str], references: Sequence[str], rule: BleuRule
) -> Counts:
    """Count n-grams of hypotheses against one reference each; the scores are `BLEU_KEYS`."""
    metric = rule.metric()
    counts_NC = _statistics(metric, hypotheses, references)
    signatures = {"bleu_signature": str(metric.get_signature())}
    return Counts(BLEU_KEYS, counts_NC, rule.scores, signatures)


def chrf_counts(hypotheses: Sequence[str], references: Sequence[str]) -> Counts:
    """Count character n-grams up to order 6 without spaces for chrF2, and no word n-grams."""
    return sacrebleu_counts("chrf", CHRF(), hypotheses, references)


def sacrebleu_counts(
    key: str, metric: Any, hypotheses: Sequence[str], references: Sequence[str]
) -> Counts:
    """Count for a metric of sacreBLEU with one score. metric: CHRF or TER."""
    counts_NC = _statistics(metric, hypotheses, references)

    def scores(sums_C: np.ndarray) -> list[float]:
        return [float(metric._compute_score_from_stats(sums_C.tolist()).score)]

    signature = str(metric.get_signature())
    return Counts((key,), counts_NC, scores, {f"{key}_signature": signature})


def _statistics(
    metric: Any, hypotheses: Sequence[str], references: Sequence[str]
) -> np.ndarray:
    """Return the counts of each sentence, (N, C), by a metric of sacreBLEU.

    Its base class defines the two methods that are used here, and sacreBLEU's significance
    tests call them, too.
    """
    assert len(hypotheses) == len(references) > 0
    rows = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    return np.array(rows, float)


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU of orders 1 to 4, in percent."""

    orders: tuple[float, float, float, float]
    """orders[n - 1] is corpus BLEU with max_ngram_order n."""
    length_ratio: float
    """Tokens of all hypotheses divided by tokens of all references; 0 if there are none."""
    signature: str


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    smooth: Smoothing = "exp",
    smooth_value: float | None = None,
    effective_order: bool = False,
) -> Bleu:
    """Compute BLEU-1 to BLEU-4 of hypotheses against one reference each.

    Both sequences have the same length, at least 1.
    """
    rule = BleuRule(tokenize, smooth, smooth_value, effective_order)
    counts = bleu_counts(hypotheses, references, rule)
    one, two, three, four = counts.score().values()
    return Bleu(
        (one, two, three, four), length_ratio(counts), counts.signatures["bleu_signature"]
    )


def length_ratio(counts: Counts, rows: np.ndarray | None = None) -> float:
    """Return tokens of hypotheses divided by tokens of references; 0 if there are none.

    counts: of `bleu_counts`. rows: indices of the sentences to count, default all.
    """
    chosen = counts.counts_NC if rows is None else counts.counts_NC[rows]
    hypothesis_length, reference_length = chosen[:, :2].sum(axis=0).tolist()
    return hypothesis_length / reference_length if reference_length else 0.0


def corpus_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Return (chrF2 in percent, its signature)."""
    counts = chrf_counts(hypotheses, references)
    return counts.score()["chrf"], counts.signatures["chrf_signature"]
