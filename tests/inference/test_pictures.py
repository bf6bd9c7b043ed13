"""Tests of pictures of runs: frames with sentences, curves, gradient norms."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.errors import UserError
from flallm_ds.inference.pictures import (
    by_epoch,
    curves_figure,
    draw_curves,
    draw_probe,
    draw_strip,
    probe_figure,
    read_probe,
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


def test_curves_contain_the_mean_loss_and_the_score_of_each_epoch(tmp_path: Path) -> None:
    entries: list[dict[str, object]] = []
    for epoch in range(3):
        entries += [
            {"kind": "train", "epoch": epoch, "loss": 3.0 - epoch + step} for step in (0, 1)
        ]
        entries.append({"kind": "train", "epoch": epoch + 1, "bleu4": 10.0 * epoch})
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries)
    )
    assert by_epoch(tmp_path) == ({1: 3.5, 2: 2.5, 3: 1.5}, {1: 0.0, 2: 10.0, 3: 20.0})
    draw_curves(tmp_path / "curves.png", [tmp_path])
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture is not None and picture.shape[1] > 500 and picture.std() > 5


def write_run(
    folder: Path, bleus: Sequence[float] = (), probe: Mapping[str, float] | None = None
) -> Path:
    """Write the metrics of a run with an evaluation of each epoch."""
    folder.mkdir()
    records: list[dict[str, object]] = [{"kind": "train", "epoch": 0, "loss": 3.0}]
    for epoch, bleu in enumerate(bleus, start=1):
        records.append({"kind": "dev", "epoch": epoch, "bleu4": bleu})
    if probe is not None:
        records.append({"kind": "probe", "global_step": 1, **probe})
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_the_axis_of_bleu_fits_the_scores_and_the_best_has_its_value(
    tmp_path: Path,
) -> None:
    runs = [write_run(tmp_path / "low", [3.0, 7.254, 6.0]), write_run(tmp_path / "none")]
    figure = curves_figure(runs)
    left, right = figure.axes
    bottom, top = right.get_ylim()
    assert 0 <= bottom < 3.0 and 7.254 < top < 10
    (value,) = right.texts
    assert value.get_text() == "7.25" and value.xy == (2, 7.254)
    figure.draw_without_rendering()
    inside, outside = value.get_window_extent(), right.get_window_extent()
    assert outside.y0 < inside.y0 and inside.y1 < outside.y1
    assert outside.x0 < inside.x0 and inside.x1 < outside.x1
    assert "loss" in left.get_title() and "BLEU-4" in right.get_title()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["low", "none"]


def test_curves_without_scores_say_so(tmp_path: Path) -> None:
    _, right = curves_figure([write_run(tmp_path / "run")]).axes
    assert [text.get_text() for text in right.texts] == ["no scores yet"]


def test_the_probe_names_runs_units_and_parts_in_rows_of_three(tmp_path: Path) -> None:
    runs = []
    for number in range(4):
        norms = {"visual": 0.1, "language": 1.0} if number else {"language": 1.0}
        runs.append(write_run(tmp_path / f"run{number}", probe=norms))
    figure = probe_figure(runs)
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in drawn] == [f"run run{n}" for n in range(4)]
    assert len({axis.get_subplotspec().rowspan.start for axis in drawn}) == 2
    assert "L2 norm" in drawn[0].get_ylabel() and drawn[0].get_xlabel() == "training step"
    assert "Gradient" in figure.get_suptitle()
    figure.draw_without_rendering()
    boxes = [axis.get_tightbbox() for axis in drawn]
    for first, second in combinations(boxes, 2):
        assert not first.overlaps(second)
    # A part has the same colour in each run, whether or not the other part was trained.
    colors = {axis.get_legend_handles_labels()[0][0].get_color() for axis in drawn}
    assert colors == {"C0"}


def test_other_formats_are_written_by_suffix_and_unknown_ones_refused(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", [1.0])
    draw_curves(tmp_path / "curves.pdf", [run])
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"--out must end with png, pdf, svg, got .*x\.gif"):
        draw_curves(tmp_path / "x.gif", [run])


def test_a_picture_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "epoch": 0, "loss": 3.0}\n')
    with pytest.raises(
        UserError, match=r"Cannot write .*curves\.png: .*Give another --out"
    ):
        draw_curves(tmp_path / "none" / "curves.png", [tmp_path])


def test_a_run_without_a_step_has_no_curves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step is finished"):
        draw_curves(tmp_path / "curves.png", [tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_gradient_norms_are_read_for_each_trained_part(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"kind": "train", "epoch": 0, "loss": 3.0}]
    records += [{"kind": "probe", "global_step": n, "language": 0.5 * n} for n in (1, 3)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in records)
    )
    assert read_probe(tmp_path) == {"language": ([1, 3], [0.5, 1.5])}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(UserError, match="probe_every"):
        read_probe(tmp_path)


def test_a_dollar_sign_does_not_start_a_formula(tmp_path: Path) -> None:
    """matplotlib would raise an error or drop characters."""
    run = tmp_path / "$x_$"
    run.mkdir()
    entries = [{"kind": "train", "epoch": 0, "loss": 3.0}]
    entries.append(
        {"kind": "probe", "global_step": 1, "epoch": 0, "visual": 1.0, "language": 1.0}
    )
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries)
    )
    said = Hypothesis("0_0", "it costs $5_", "it costs $\\frac$", "mine", "en")
    draw_strip(tmp_path / "strip.png", [([np.zeros((8, 8, 3), np.uint8)] * 3, said)])
    draw_curves(tmp_path / "curves.png", [run])
    draw_probe(tmp_path / "probe.png", [run])
