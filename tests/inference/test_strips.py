"""Tests of strips: the layout of frames and sentences."""

from pathlib import Path

import numpy as np
import pytest

from flallm_ds.batch import Hypothesis
from flallm_ds.inference.pictures import draw_strip
from flallm_ds.inference.strips import strip_figure, wrapped

FRAMES = [np.full((60, 80, 3), 90, np.uint8)] * 10
LONG = (
    "people who explain how to play golf say a lot of words in the ten seconds of a clip "
    * 3
)


def clip(hypothesis: str, reference: str, language: str = "en") -> Hypothesis:
    return Hypothesis("a", hypothesis, reference, "mine", language)


@pytest.mark.parametrize(
    "said",
    [
        clip(LONG, LONG.replace("golf", "chess")),
        clip("a" * 400, ""),
        clip("今天天气很好，明天下雨。" * 12, "今天天气不好。" * 12, "zh"),
    ],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_sentences_fit_and_overlap_neither_each_other_nor_frames(said: Hypothesis) -> None:
    figure = strip_figure([(FRAMES, said), (FRAMES, said)], 10)
    figure.draw_without_rendering()
    texts = [text.get_window_extent() for text in figure.texts]
    assert len(texts) > 6
    for box in texts:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
        # The box of a text has a pixel of space around the letters.
        inner = box.padded(-1.0)
        assert not any(inner.overlaps(image.get_window_extent()) for image in figure.images)
        same = [
            other
            for other in texts
            if other is not box and inner.overlaps(other.padded(-1))
        ]
        assert same == []


def test_both_sentences_begin_at_the_same_place() -> None:
    figure = strip_figure([(FRAMES, clip("im norden regen", "und nun schnee", "de"))], 10)
    start = {text.get_text(): text.get_position()[0] for text in figure.texts}
    assert start["im"] == start["und"] > start["hypothesis"] == start["reference"]


def test_words_that_differ_are_underlined_and_a_legend_says_why() -> None:
    said = clip("im norden regen", "im norden viel schnee", "de")
    figure = strip_figure([(FRAMES, said)], 10)
    colors = {text.get_text(): text.get_color() for text in figure.texts}
    assert colors["norden"] == "black" != colors["regen"]
    assert colors["viel"] == colors["schnee"] not in ("black", colors["regen"])
    assert len(figure.artists) == 3  # under "regen", "viel" and "schnee"
    assert figure.artists[0].get_linestyle() == "-" != figure.artists[1].get_linestyle()
    assert "not in the reference" in figure.texts[-1].get_text()
    equal = strip_figure([(FRAMES, clip("im norden", "im norden", "de"))], 10)
    assert len(equal.artists) == 0 and equal.texts[-1].get_text() == "norden"


def test_words_are_wrapped_at_the_width_and_long_ones_are_broken() -> None:
    placed = wrapped(["aa bb ", "cc", " " + "d" * 25], False, 10.0, lambda text: len(text))
    assert [(word.text, word.line) for word in placed] == [
        ("aa", 0),
        ("bb", 0),
        ("cc", 0),
        ("d" * 10, 1),
        ("d" * 10, 2),
        ("d" * 5, 3),
    ]
    assert [word.x for word in placed[:3]] == [0, 3, 6]
    assert [word.text for word in placed if word.differs] == ["cc"]
    characters = wrapped(["今天", "下雨"], True, 3.0, lambda text: len(text))
    assert [(word.text, word.x, word.line) for word in characters] == [
        ("今", 0, 0),
        ("天", 1, 0),
        ("下", 2, 0),
        ("雨", 0, 1),
    ]


def test_characters_that_no_font_has_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The letters of Linear B are in none of the fonts that we ask for.
    draw_strip(tmp_path / "strip.png", [(FRAMES, clip("\U00010000", "x"))])
    assert "lack some characters" in capsys.readouterr().out
    draw_strip(tmp_path / "strip.png", [(FRAMES, clip("Grüße", "x"))])
    assert capsys.readouterr().out == ""
