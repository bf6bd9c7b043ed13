"""BLEU-1 to 4 and chrF by sacreBLEU, each with the signature that says how it was computed.

The rule (tokenizer, smoothing, effective order) is an argument, so that another lineage
is another call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

MAX_ORDER = 4


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU of every order, in percent, from one pass over the sentences."""

    orders: tuple[float, float, float, float]
    """orders[n - 1] is corpus BLEU with max_ngram_order n."""
    length_ratio: float
    """Return tokens of all hypotheses over tokens of all references, 0 where these are empty."""
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
    """BLEU-1..4 of hypotheses against one reference each; the sequences are of equal
    length, at least 1."""
    assert len(hypotheses) == len(references) > 0
    # force: PHOENIX14T is tokenized text with a final " .", about which sacreBLEU would
    # warn every time.
    metric = BLEU(
        tokenize=tokenize,
        smooth_method=smooth,
        smooth_value=smooth_value,
        effective_order=effective_order,
        max_ngram_order=MAX_ORDER,
        force=True,
    )
    whole = metric.corpus_score(list(hypotheses), [list(references)])
    # The n-gram counts of lower orders are the first of those of order 4: no need to
    # count four times.
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
    """(chrF2 in percent, its signature): characters up to 6-grams, spaces left out, no
    word n-grams."""
    assert len(hypotheses) == len(references) > 0
    metric = CHRF()
    chrf = metric.corpus_score(list(hypotheses), [list(references)])
    return chrf.score, str(metric.get_signature())
