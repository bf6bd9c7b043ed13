"""The table of metrics and what `score` computes agree."""

from flallm_ds.metrics import Scores, score
from flallm_ds.metrics.columns import COLUMNS, SIGNATURES, has_scores

TEXTS = ["im norden regen am morgen"]


def scores() -> Scores:
    return score(TEXTS, TEXTS, "de")


def test_score_computes_each_row_of_the_table_and_nothing_else() -> None:
    keys = [column.key for column in COLUMNS]
    assert list(scores().values) == keys
    assert len(set(keys)) == len(keys)
    assert scores().signatures.keys() == SIGNATURES.keys()


def test_the_names_and_the_order_in_stored_files_stay() -> None:
    stored = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "chrf", "length_ratio"]
    stored += ["num_sentences", "bleu_signature", "chrf_signature", "rouge_signature"]
    assert list(scores().as_dict()) == stored
    assert list(scores().logged()) == ["bleu4", "rouge_l", "chrf"]


def test_a_score_that_was_stored_without_a_metric_has_an_empty_cell() -> None:
    cells = [column.text({"bleu4": 21.256}) for column in COLUMNS]
    assert cells == ["", "", "", "21.26", "", ""]


def test_records_with_scores_are_told_from_others() -> None:
    assert has_scores({"epoch": 1, "bleu4": 0.5})
    assert (
        not has_scores({"epoch": 1, "loss": 3.0})
        and not has_scores({})
        and not has_scores(3)
    )
