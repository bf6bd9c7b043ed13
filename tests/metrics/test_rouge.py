import random

import pytest

from flallm_ds.metrics.rouge import lcs_length, rouge_l, sentence_rouge_l


def lcs_by_cells(a, b):
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def test_lcs_equals_plain_dynamic_programming():
    draw = random.Random(0)
    for _ in range(500):
        a, b = (draw.choices("abcd", k=draw.randrange(80)) for _ in range(2))
        assert lcs_length(a, b) == lcs_length(b, a) == lcs_by_cells(a, b)


def test_a_sentence_score_equals_a_computation_by_hand():
    # Common: am regnet es (3). P = 3/4, R = 3/5; F = 2.44 P R / (R + 1.44 P).
    value = sentence_rouge_l(
        ["am", "abend", "regnet", "es"], ["am", "tag", "regnet", "es", "viel"]
    )
    assert value == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))


def test_order_matters_and_recall_has_more_weight():
    assert sentence_rouge_l(["b", "a"], ["a", "b"]) == pytest.approx(0.5)
    reference = ["a", "b", "c", "d"]
    long, short = (
        sentence_rouge_l(["a", "b", "c", "d", "x", "x", "x", "x"], reference),
        sentence_rouge_l(["a", "b"], reference),
    )
    assert long > short  # P 0.5 R 1 against P 1 R 0.5


def test_the_corpus_score_is_the_mean_over_sentences():
    assert rouge_l([["a", "b"], ["x"]], [["a", "b"], ["y"]]) == pytest.approx(50)


def test_an_empty_side_scores_zero():
    assert rouge_l([[], ["a"], []], [["a"], [], []]) == 0
