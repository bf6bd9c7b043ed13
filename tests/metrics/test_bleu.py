import math

import pytest
from sacrebleu.metrics import BLEU, CHRF

from flallm_ds.metrics.bleu import corpus_bleu, corpus_chrf

HYPOTHESES = [
    "am tag regnet es im norden",
    "morgen scheint die sonne , im süden bleibt es kühl .",
    "",
    "schnee",
]
REFERENCES = [
    "am tag regnet es im norden und osten",
    "morgen scheint im süden die sonne , dort bleibt es mild .",
    "der wind weht schwach",
    "schnee und frost",
]


@pytest.mark.parametrize("tokenize", ["13a", "none", "intl"])
@pytest.mark.parametrize("smooth", ["exp", "floor", "none"])
@pytest.mark.parametrize("effective_order", [False, True])
def test_bleu_n_equals_sacrebleu_with_max_ngram_order_n(tokenize, smooth, effective_order):
    ours = corpus_bleu(
        HYPOTHESES,
        REFERENCES,
        tokenize=tokenize,
        smooth=smooth,
        effective_order=effective_order,
    )
    for order in range(1, 5):
        theirs = BLEU(
            tokenize=tokenize,
            smooth_method=smooth,
            effective_order=effective_order,
            max_ngram_order=order,
        )
        assert ours.orders[order - 1] == pytest.approx(
            theirs.corpus_score(HYPOTHESES, [REFERENCES]).score, abs=1e-9
        )


def test_bleu_equals_a_computation_by_hand():
    # Matching n-grams: 4 of 5, 3 of 4, 2 of 3, 1 of 2. Lengths: 5 and 6 tokens.
    bleu = corpus_bleu(["am tag regnet es viel"], ["am tag regnet es im norden"])
    brevity = math.exp(1 - 6 / 5)
    assert bleu.orders[0] == pytest.approx(100 * brevity * 4 / 5)
    assert bleu.orders[1] == pytest.approx(100 * brevity * (4 / 5 * 3 / 4) ** (1 / 2))
    assert bleu.orders[2] == pytest.approx(
        100 * brevity * (4 / 5 * 3 / 4 * 2 / 3) ** (1 / 3)
    )
    assert bleu.orders[3] == pytest.approx(
        100 * brevity * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    )
    assert bleu.length_ratio == pytest.approx(5 / 6)


def test_a_final_period_raises_bleu():
    """Appending " ." to both sides adds about 1 BLEU-4 on PHOENIX14T: never do it."""
    with_period = corpus_bleu(
        [f"{h} ." for h in HYPOTHESES], [f"{r} ." for r in REFERENCES]
    )
    assert with_period.orders[0] > corpus_bleu(HYPOTHESES, REFERENCES).orders[0] + 1


def test_tokenized_periods_cause_no_warning(caplog):
    corpus_bleu(["am tag regnet es ."] * 120, ["am tag regnet es ."] * 120)
    assert not caplog.records


def test_the_signature_names_tokenizer_and_smoothing():
    assert "|tok:13a|smooth:exp|" in corpus_bleu(HYPOTHESES, REFERENCES).signature
    assert "|tok:zh|" in corpus_bleu(["今天有雨"], ["今天有雪"], tokenize="zh").signature


def test_chrf_equals_sacrebleu():
    metric = CHRF()
    value, signature = corpus_chrf(HYPOTHESES, REFERENCES)
    assert value == pytest.approx(metric.corpus_score(HYPOTHESES, [REFERENCES]).score)
    assert signature == str(metric.get_signature())
