"""Tests of the table of scores."""

from flallm_ds.metrics.table import table

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


def test_intervals_have_a_line_of_their_own_and_error_rates_a_column() -> None:
    scores = ROW | {"wer": 61.5, "intervals": {"bleu4": (19.94, 22.61), "wer": (60, 63)}}
    header, _, model, bounds, blind = table({"model": scores, "blind": ROW}).splitlines()
    assert [cell.strip() for cell in header.split("|")][-3:] == ["chrF", "WER", ""]
    assert [cell.strip() for cell in bounds.split("|")][1:] == [
        "95 % interval", "", "", "", "19.9-22.6", "", "", "60.0-63.0", ""
    ]  # fmt: skip
    assert len({len(line) for line in (header, model, bounds, blind)}) == 1
