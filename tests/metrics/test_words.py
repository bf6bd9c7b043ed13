"""Tests of the scores of words with content and of rare words."""

import pytest

from flallm_ds.metrics.words import content_words, rare_words, words_of


def test_words_are_those_of_bleu_without_punctuation() -> None:
    assert words_of("Am Tag, 12.5 Grad - schön!", "de") == [
        "am",
        "tag",
        "12.5",
        "grad",
        "schön",
    ]
    assert words_of("明天，有雨。", "zh") == ["明", "天", "有", "雨"]


def test_only_words_with_content_count() -> None:
    # Content: regen, norden | schnee, norden, norden (one of them is matched).
    found = content_words(
        ["der Regen im Norden ."], ["die Schnee , Norden Norden"], "German"
    )
    assert found is not None
    assert found.recall == pytest.approx(100 / 3) and found.precision == pytest.approx(50)
    assert found.f1 == pytest.approx(40) and found.num_reference_words == 3
    usual = content_words(["und in der"], ["und in der Nacht"], "de")
    assert usual is not None and usual.f1 == 0


def test_a_language_without_a_list_has_no_content_words() -> None:
    assert content_words(["明天有雨"], ["明天有雨"], "zh") is None


def test_rare_words_are_counted_by_their_number_in_the_training_text() -> None:
    training = ["regen"] * 100 + ["schnee"] * 5 + ["sturm"]
    found = rare_words(["Regen und Sturm"], ["regen schnee sturm hagel"], training, "de")
    assert {name: one.recall for name, one in found.items()} == {
        "0 times": 0, "1 to 5 times": 50, "51 times or more": 100
    }  # fmt: skip
    assert found["1 to 5 times"].num_reference_words == 2
