"""Tests of scores by corpus and of the blind control."""

from dataclasses import replace

import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.metrics.scoring import blind_scores, scores_by


def test_each_corpus_is_scored_alone() -> None:
    right = ("im norden regen am morgen", "im norden regen am morgen")
    wrong = ("a b c d", "im norden regen am")
    said = [Hypothesis(f"0_{n}", *right, "phoenix14t", "de") for n in range(3)]
    said += [Hypothesis(f"1_{n}", *wrong, "mine", "de") for n in range(2)]
    scores = scores_by(said, "corpus")
    assert list(scores) == ["mine", "phoenix14t"]
    assert scores["phoenix14t"].bleu4 == pytest.approx(100) and scores["mine"].bleu4 < 10


def test_the_blind_control_stays_within_a_language() -> None:
    """Each language has one sentence, so mixed languages would lower the score."""
    texts = {"de": "im norden regen am morgen", "en": "rain in the north at dawn"}
    said = []
    for code, text in texts.items():
        said += [Hypothesis(f"{n}_{code}", text, text, "c", code) for n in range(3)]
    assert blind_scores(said).bleu4 == pytest.approx(100)
    alone = [said[0], *said[3:]]
    assert blind_scores(alone).bleu4 == pytest.approx(100)
    assert blind_scores([replace(h, reference=f"{h.key} a b c") for h in said]).bleu4 < 10
