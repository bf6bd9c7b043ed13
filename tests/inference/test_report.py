"""Pictures of results: strips of frames and curves."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.errors import UserError
from flallm_ds.inference.probe import draw_probe
from flallm_ds.inference.report import (
    by_epoch,
    draw_curves,
    draw_strip,
    read_hypotheses,
    table,
    write_hypotheses,
)

RED = (200, 30, 30)


def test_a_strip_shows_the_frames_of_each_clip(tmp_path: Path) -> None:
    frames = [np.full((60, 40, 3), RED, np.uint8)] * 4
    said = Hypothesis(key="a", hypothesis="im norden regen", reference="im norden schnee")
    areas = []
    for num_clips in (1, 2):
        draw_strip(tmp_path / "strip.png", [(frames, said)] * num_clips)
        picture = cv2.imread(str(tmp_path / "strip.png"))[..., ::-1]
        areas.append(int((np.abs(picture.astype(int) - RED).max(axis=2) < 3).sum()))
    assert areas[0] > 10_000 and areas[1] == pytest.approx(2 * areas[0], rel=0.1)


def test_hypotheses_come_back_from_their_file(tmp_path: Path) -> None:
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


def test_the_table_shows_the_ceiling_where_that_of_a_row_is_low() -> None:
    rows = {"model": ROW | {"ceiling_bleu4": 99.4}, "older": ROW}
    header, _, model, older = table(rows).splitlines()
    assert header.endswith("|    chrF | ceiling |") and model.endswith("|  100.00 |   99.40 |")
    assert older.endswith("|  100.00 |         |")
    assert "ceiling" not in table({"model": ROW | {"ceiling_bleu4": 99.5}})


def test_curves_hold_each_epochs_mean_loss_and_its_score(tmp_path: Path) -> None:
    entries: list[dict[str, object]] = []
    for epoch in range(3):
        entries += [{"kind": "train", "epoch": epoch, "loss": 3.0 - epoch + step} for step in (0, 1)]
        entries.append({"kind": "train", "epoch": epoch + 1, "bleu4": 10.0 * epoch})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert by_epoch(tmp_path) == ({1: 3.5, 2: 2.5, 3: 1.5}, {1: 0.0, 2: 10.0, 3: 20.0})
    draw_curves(tmp_path / "curves.png", [tmp_path])
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture is not None and picture.shape[1] > 500 and picture.std() > 5


def test_a_picture_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "epoch": 0, "loss": 3.0}\n')
    with pytest.raises(UserError, match="--out"):
        draw_curves(tmp_path / "none" / "curves.png", [tmp_path])


def test_a_run_without_a_step_has_no_curves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finished a step"):
        draw_curves(tmp_path / "curves.png", [tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_dollar_sign_is_no_formula(tmp_path: Path) -> None:
    """matplotlib would refuse it with a traceback, or leave characters out."""
    run = tmp_path / "$x_$"
    run.mkdir()
    entries = [{"kind": "train", "epoch": 0, "loss": 3.0}]
    entries.append({"kind": "probe", "global_step": 1, "epoch": 0, "visual": 1.0, "language": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    said = Hypothesis("0_0", "it costs $5_", "it costs $\\frac$", "mine", "en")
    draw_strip(tmp_path / "strip.png", [([np.zeros((8, 8, 3), np.uint8)] * 3, said)])
    draw_curves(tmp_path / "curves.png", [run])
    draw_probe(tmp_path / "probe.png", [run])
