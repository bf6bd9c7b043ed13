"""Tests of the table of scores and the file of hypotheses."""

from pathlib import Path

from flallm_ds.batch import Hypothesis
from flallm_ds.inference.report import read_hypotheses, table, write_hypotheses


def test_hypotheses_are_read_from_their_file_unchanged(tmp_path: Path) -> None:
    nbest = (("a b c d", -0.5), ("a", -1.5))
    said = [Hypothesis("0_0", "im norden regen", "im norden schnee", "phoenix14t", "de")]
    said.append(Hypothesis("1_0", "a b c d", "im norden regen", "mine", "de", nbest))
    write_hypotheses(tmp_path / "said.jsonl", said)
    assert read_hypotheses(tmp_path / "said.jsonl") == said
    first = (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert '"nbest"' not in first


ROW = {"bleu1": 40.0, "bleu2": 30.126, "bleu3": 25.0, "bleu4": 21.25}
ROW |= {"rouge_l": 44.0, "chrf": 100.0}


def test_the_table_has_a_column_for_each_metric() -> None:
    assert table({"model": ROW, "older": {"bleu4": 1.5}}) == (
        "|       |  BLEU-1 |  BLEU-2 |  BLEU-3 |  BLEU-4 | ROUGE-L |    chrF |\n"
        "|-------|--------:|--------:|--------:|--------:|--------:|--------:|\n"
        "| model |   40.00 |   30.13 |   25.00 |   21.25 |   44.00 |  100.00 |\n"
        "| older |         |         |         |    1.50 |         |         |"
    )


def test_the_table_has_a_ceiling_column_if_one_ceiling_is_low() -> None:
    rows = {"model": ROW | {"ceiling_bleu4": 99.4}, "older": ROW}
    header, _, model, older = table(rows).splitlines()
    assert header.endswith("|    chrF | ceiling |") and model.endswith(
        "|  100.00 |   99.40 |"
    )
    assert older.endswith("|  100.00 |         |")
    assert "ceiling" not in table({"model": ROW | {"ceiling_bleu4": 99.5}})
