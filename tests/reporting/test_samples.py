"""Test the samples of a report: sentence scores, the choice of clips."""

from pathlib import Path

import pytest
import sacrebleu

from flallm_ds.batch import Hypothesis
from flallm_ds.config import RunConfig
from flallm_ds.reporting.runs import Evaluation, Run
from flallm_ds.reporting.samples import (
    by_epoch,
    evenly_chosen,
    samples_of,
    sentence_scores,
)


def run_of(*clips: Hypothesis, name: str = "run") -> Run:
    config = RunConfig(stage="visual", run=name)
    return Run(Path(name), name, config, [], [], [], {"test": Evaluation({}, clips)})


def test_sentence_scores_are_those_of_sacrebleu() -> None:
    said, meant = "im norden gibt es regen", "im norden gibt es schnee und regen"
    bleu, chrf = sentence_scores(said, meant, "13a")
    assert bleu == pytest.approx(sacrebleu.sentence_bleu(said, [meant]).score)
    assert chrf == pytest.approx(sacrebleu.sentence_chrf(said, [meant]).score)
    assert sentence_scores("明天下雨", "明天下雨", "zh") == (pytest.approx(100), 100)


def test_runs_are_joined_by_key_and_reference() -> None:
    first = run_of(Hypothesis("a", "x", "x"), Hypothesis("b", "x", "y"))
    second = run_of(Hypothesis("b", "y", "y"), Hypothesis("a", "x", "other reference"))
    a, b = samples_of([first, second], "test")
    assert (a.key, b.key) == ("a", "b")
    assert a.translations[0] is not None and a.translations[1] is None
    assert b.translations[1] is not None and b.translations[1].chrf == 100


def test_clips_are_chosen_from_the_worst_to_the_best() -> None:
    words = ["im", "norden", "und", "süden", "gibt", "es", "heute", "regen", "und", "wind"]
    reference = " ".join(words)
    clips = []
    for num in range(11):
        clips.append(Hypothesis(f"{num:02}", " ".join(words[:num]), reference))
    samples = samples_of([run_of(*clips)], "test")
    assert evenly_chosen(samples, 3) == ["00", "05", "10"]
    assert evenly_chosen(samples, 1) == ["00"]
    assert len(evenly_chosen(samples, 50)) == 11
    assert evenly_chosen(samples, 0) == [] == evenly_chosen([], 5)


def test_hypotheses_over_the_epochs_are_evenly_chosen_with_the_last() -> None:
    records = []
    for epoch in range(1, 21):
        records.append({"reference": "r", "epoch": epoch, "hypothesis": f"h{epoch}"})
    (of_clip,) = by_epoch(records, most=3).values()
    assert of_clip == [(1, "h1"), (11, "h11"), (20, "h20")]
