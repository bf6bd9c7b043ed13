"""Test the tables of scores of a report: stored scores, and paired tests."""

from dataclasses import replace
from pathlib import Path

import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.config import RunConfig
from flallm_ds.reporting.runs import Evaluation, Run
from flallm_ds.reporting.scores import compare_runs, score_table

SENTENCES = [f"im {place} gibt es heute {what}" for place in ("norden", "süden", "westen")
             for what in ("regen", "schnee", "wind und sonne")]  # fmt: skip


def run_of(name: str, results: dict[str, object], clips: list[Hypothesis]) -> Run:
    config = RunConfig(stage="visual", run=name)
    return Run(Path(name), name, config, [], [], [], {"test": Evaluation(results, clips)})


def clips(said: list[str], language: str = "de") -> list[Hypothesis]:
    pairs = enumerate(zip(said, SENTENCES, strict=True))
    return [Hypothesis(f"{n}", one, meant, "c", language) for n, (one, meant) in pairs]


def test_all_stored_scores_are_shown_with_intervals_and_signatures() -> None:
    results = {
        "split": "test",
        "scores": {
            "bleu4": 12.3456, "chrf": 40.0, "num_sentences": 1234, "bleu_signature": "nrefs:1",
            "intervals": {"bleu4": [11.0, 13.5]},
        },
        "blind": {"bleu4": 1.5, "bleu_signature": "nrefs:1"},
        "controls": {"blank_frames": {"bleu4": 0.25, "unknown": [1]}},
        "meanings": ["The model needs its video."],
        "slices": {"signer": {"Signer01": {"bleu4": 2.0, "num_sentences": 3}}},
        "ceiling": {"bleu4": 100.0, "changes": []},
        "of_another_version": {"a": None},
    }  # fmt: skip
    table = score_table([run_of("run", results, [])])
    assert list(table.titles) == ["BLEU-4", "chrF"]
    rows = [(row.part, row.clips, list(row.cells)) for row in table.rows]
    assert rows == [
        ("", "1,234", [("12.35", "11.0-13.5"), ("40.00", "")]),
        ("blind control", "", [("1.50", ""), ("", "")]),
        ("blank frames", "", [("0.25", ""), ("", "")]),
    ]
    assert table.signatures == {"BLEU": ["nrefs:1"]}
    assert table.meanings == ["test: The model needs its video."]
    (part,) = table.slices
    assert (part.part, part.clips) == ("signer: Signer01", "3")


def test_runs_are_compared_by_a_paired_bootstrap() -> None:
    worse = ["im norden gibt es heute nebel"] * len(SENTENCES)
    runs = [
        run_of("worse", {}, clips(worse)),
        run_of("perfect", {}, clips(SENTENCES)[::-1]),  # in another order
    ]
    (first, second), problem = compare_runs(runs, "test")
    assert problem == ""
    assert (first.run, first.difference, first.share) == ("worse", None, None)
    assert second.score.value == pytest.approx(100) and second.share == 0
    assert second.difference is not None
    assert second.difference.value == pytest.approx(100 - first.score.value)


def test_runs_that_cannot_be_compared_say_why() -> None:
    run = run_of("a", {}, clips(SENTENCES))
    other = run_of("b", {}, clips(SENTENCES)[1:])
    assert compare_runs([run], "test") == ([], "")
    assert compare_runs([run, run], "dev") == ([], "")
    found, problem = compare_runs([run, other], "test")
    assert found == [] and problem.startswith("b was evaluated on other clips")
    mixed = [replace(clip, language="zh") for clip in clips(SENTENCES)[:1]]
    both = [run_of(name, {}, [*mixed, *clips(SENTENCES)[1:]]) for name in "ab"]
    found, problem = compare_runs(both, "test")
    assert found == [] and "several tokenizers" in problem
