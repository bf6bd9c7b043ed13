"""Tests that the table of metrics agrees with the results of `score`."""

from flallm_ds.metrics import Scores, score
from flallm_ds.metrics.columns import COLUMNS, SIGNATURES, has_scores

TEXTS = ["im norden regen am morgen"]


def scores() -> Scores:
    return score(TEXTS, TEXTS, "de")


def test_score_computes_exactly_the_metrics_of_the_table() -> None:
    keys = [column.key for column in COLUMNS]
    assert len(set(keys)) == len(keys)
    # BLEURT needs a checkpoint.
    assert list(scores().values) == [key for key in keys if key != "bleurt"]
    assert scores().signatures.keys() == SIGNATURES.keys() - {"bleurt_signature"}


def test_names_and_order_in_stored_files_are_fixed() -> None:
    stored = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "chrf"]
    stored += ["ter", "wer", "cer", "length_ratio", "num_sentences", "preset", "rule"]
    stored += [f"{name}_signature" for name in ("bleu", "rouge", "chrf")]
    stored += [f"{name}_signature" for name in ("ter", "wer", "cer")]
    assert list(scores().as_dict()) == stored
    assert list(scores().logged()) == ["bleu4", "rouge_l", "chrf"]


def test_a_metric_that_was_not_stored_has_an_empty_cell() -> None:
    cells = [column.text({"bleu4": 21.256}) for column in COLUMNS]
    assert cells == ["", "", "", "21.26"] + [""] * 6


def test_only_records_with_scores_are_recognized() -> None:
    assert has_scores({"epoch": 1, "bleu4": 0.5})
    assert (
        not has_scores({"epoch": 1, "loss": 3.0})
        and not has_scores({})
        and not has_scores(3)
    )
