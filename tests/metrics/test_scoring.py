"""Tests of scores by corpus and of the controls that exchange hypotheses."""

import random
from dataclasses import replace

import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.metrics.scoring import blind_scores, scores_by, scores_of, signer_scores


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


def of_signers(num_signers: int = 4) -> tuple[list[Hypothesis], dict[str, str]]:
    """100 clips by signers with words of their own; the model says what a signer says most.

    The hypothesis depends on the signer alone. No two references are equal.
    """
    draw = random.Random(0)
    clips, signers = [], {}
    for number in range(100):
        signer = number % num_signers
        words = [f"w{signer}{letter}" for letter in "abcdefg"]
        reference = " ".join([*words[:5], *draw.sample(words, 4), f"n{number}"])
        clips.append(Hypothesis(str(number), " ".join(words), reference, "c", "de"))
        signers[str(number)] = f"Signer{signer}"
    return clips, signers


def test_another_signer_scores_0_where_the_signer_predicts_the_sentence() -> None:
    clips, signers = of_signers()
    found = signer_scores(clips, signers, resamples=200)
    assert found is not None
    others, any_signer = found
    # Signers share no word. About one clip in four has another clip of its signer.
    assert others.values["bleu1"] == 0 and others.num_sentences == len(clips)
    assert scores_of(clips).bleu4 > 30 and any_signer.bleu4 > 5
    assert (any_signer.resampled["bleu4"] > others.resampled["bleu4"]).all()
    # No clip has a sentence of another one, so any signer is the blind control.
    blind = blind_scores(clips, resamples=200)
    assert any_signer.intervals == blind.intervals
    assert signer_scores(clips, signers) == found


def test_the_same_sentence_is_not_taken_from_another_signer() -> None:
    """Every signer signs every sentence, and the model reads all of them."""
    clips, signers = [], {}
    for signer in "ABCD":
        for number in range(3):
            key = f"{signer}{number}"
            text = " ".join(f"{letter}{number}" for letter in "abcde")
            clips.append(Hypothesis(key, text, text.capitalize() + ".", "c", "de"))
            signers[key] = signer
    found = signer_scores(clips, signers)
    assert found is not None
    assert [scores.values["bleu1"] for scores in found] == [0, 0]
    assert blind_scores(clips).values["bleu1"] > 0


def test_clips_without_another_signer_are_left_out() -> None:
    clips, signers = of_signers()
    # One signer of another language, with clips of its own, and clips of unknown signers.
    alone = [replace(clip, key=f"en{clip.key}", language="en") for clip in clips[:10]]
    signers |= {clip.key: "Signer9" for clip in alone}
    unknown = [replace(clip, key=f"unknown{clip.key}") for clip in clips[:10]]
    found = signer_scores([*clips, *alone, *unknown], signers | {"unknown0": ""})
    assert found is not None
    assert [scores.num_sentences for scores in found] == [100, 100]
    assert signer_scores(alone, signers) is None is signer_scores(clips, {})
    # All signers say one sentence: no clip has another sentence.
    same = [replace(clip, reference="im norden regen") for clip in clips]
    assert signer_scores(same, signers) is None
