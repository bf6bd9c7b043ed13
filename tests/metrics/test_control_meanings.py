"""Tests of what controls are said to show."""

import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.errors import UserError
from flallm_ds.metrics import Scores
from flallm_ds.metrics.controls import (
    ANOTHER_SIGNER,
    CONTROLS,
    check_controls,
    meaning,
    no_other_signer,
)
from flallm_ds.metrics.scoring import blind_scores, scores_of
from tests.helpers.pairs import pairs


def scored(sees: bool) -> tuple[Scores, Scores]:
    """Scores of a model and of its blind control."""
    said, meant = pairs("de")
    if not sees:  # always the same sentence
        said = ["der Regen zieht am Abend von Westen"] * len(meant)
    clips = []
    for number, (one, other) in enumerate(zip(said, meant, strict=True)):
        clips.append(Hypothesis(str(number), one, other, "c", "de"))
    return scores_of(clips, resamples=200), blind_scores(clips, resamples=200)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_model_that_loses_its_score_without_the_video_uses_it(control: str) -> None:
    model, blind = scored(sees=True)
    sentence = meaning(control, model, blind)
    begin = ("The model uses", "The model needs")
    if control == ANOTHER_SIGNER:
        begin = ("The model may use who signs and not only what is signed",)
    assert sentence.startswith(begin)
    assert f"{blind.bleu4:.2f}" in sentence and "(p < 0.005)" in sentence


def test_a_model_that_always_says_the_same_does_not_use_the_video() -> None:
    sentence = meaning("blind", *scored(sees=False))
    assert sentence.startswith(
        "The model does not use the video, as far as 100 clips show: BLEU-4 is"
    )


def test_another_signer_is_compared_with_any_signer() -> None:
    sentence = meaning(ANOTHER_SIGNER, *scored(sees=False))
    assert sentence.startswith("The model does not use who signs, as far as 100 clips show")
    assert "with the videos of other signers, and " in sentence
    assert sentence.endswith("with those of any signer (p = 1.000).")


def test_a_split_without_another_signer_says_why() -> None:
    assert no_other_signer(["", ""]) == (
        "There is no control with another signer: the shards do not say who signs."
    )
    assert no_other_signer(["A", "", "A"]).endswith("all clips are by the signer A.")
    assert no_other_signer(["A", "B"]).endswith("in the same language.")


def test_unknown_controls_are_refused() -> None:
    check_controls(CONTROLS)
    with pytest.raises(
        UserError, match="must be of blind, another_signer, shuffled_frames, blank, got 'x'"
    ):
        check_controls(("blind", "x"))
