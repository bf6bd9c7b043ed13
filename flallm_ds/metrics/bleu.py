"""Compute BLEU-1 to BLEU-4 and chrF with sacreBLEU, and return their signatures.

Published results differ in tokenizer, smoothing and effective order, so these are
arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

MAX_ORDER = 4


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
    smooth: Literal["exp", "floor", "none"] = "exp",
    smooth_value: float | None = None,
    effective_order: bool = False,
) -> Bleu:
    """Compute BLEU-1 to BLEU-4 of hypotheses against one reference each.

    Both sequences have the same length, at least 1.
    """
    assert len(hypotheses) == len(references) > 0
    # force=True: PHOENIX14T is tokenized text that ends with " .", and sacreBLEU would
    # warn about it at each call.
    metric = BLEU(
        tokenize=tokenize,
        smooth_method=smooth,
        smooth_value=smooth_value,
        effective_order=effective_order,
        max_ngram_order=MAX_ORDER,
        force=True,
    )
    whole = metric.corpus_score(list(hypotheses), [list(references)])
    # The counts of order 4 contain those of all lower orders, so n-grams are counted once.
    scores = []
    for order in range(1, MAX_ORDER + 1):
        bleu = BLEU.compute_bleu(
            correct=whole.counts[:order],
            total=whole.totals[:order],
            sys_len=whole.sys_len,
            ref_len=whole.ref_len,
            smooth_method=smooth,
            smooth_value=smooth_value,
            effective_order=effective_order,
            max_ngram_order=order,
        )
        scores.append(bleu.score)
    one, two, three, four = scores
    return Bleu((one, two, three, four), whole.ratio, str(metric.get_signature()))


def corpus_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Return (chrF2 in percent, its signature).

    It uses character n-grams up to order 6 without spaces, and no word n-grams.
    """
    assert len(hypotheses) == len(references) > 0
    metric = CHRF()
    chrf = metric.corpus_score(list(hypotheses), [list(references)])
    return chrf.score, str(metric.get_signature())
