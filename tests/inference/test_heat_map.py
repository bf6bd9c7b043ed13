"""Test how the attention of tokens becomes a heat map of words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flallm_ds.inference.heat_map import (
    LEVELS,
    MAX_COLUMNS,
    HeatMap,
    heat_map,
    heat_map_of,
    page_file,
    words_of,
)
from flallm_ds.inference.translator import Translator
from tests.helpers.attention import changed_attention
from tests.helpers.exports import DECODER_ONLY, ENCODER_DECODER, write_export


@pytest.mark.parametrize(
    ("tokens", "characters", "words", "positions"),
    [
        (["im", " nor", "den", " regen"], False, ["im", "norden", "regen"], [[0], [1, 2], [3]]),
        (["", "im", " ", "regen"], False, ["im", "regen"], [[0, 1, 2], [3]]),
        (["im norden", " regen"], False, ["im norden", "regen"], [[0], [1]]),
        (["明天", "下", " 雨"], True, ["明天", "下", "雨"], [[0], [1], [2]]),
        ([], False, [], []),
    ],
)  # fmt: skip
def test_tokens_are_joined_to_words(
    tokens: list[str], characters: bool, words: list[str], positions: list[list[int]]
) -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join(tokens[i] for i in ids)

    assert words_of(decode, range(len(tokens)), characters) == (words, positions)


def test_a_heat_map_has_the_mean_of_the_tokens_of_a_word() -> None:
    attention_LS = np.array(
        [[0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.4, 0.0], [0.1, 0.1, 0.1, 0.1]]
    )
    found = heat_map(["a", "b"], [[0, 1], [2]], attention_LS)
    assert found.levels == [[0, 128, 255, 0], [LEVELS] * 4]
    assert found.on_video == [0.3, 0.4]


def test_a_long_clip_has_few_columns() -> None:
    attention_LS = np.zeros((1, 5000))
    attention_LS[0, 2500] = 0.5
    found = heat_map(["a"], [[0]], attention_LS)
    assert len(found.levels[0]) == MAX_COLUMNS
    assert found.levels[0].index(LEVELS) == MAX_COLUMNS // 2
    assert heat_map(["a"], [[0]], np.zeros((1, 3))).levels == [[0, 0, 0]]


# --- of a model

SENTENCE, NUM_FRAMES = "regen sonne wind morgen", 9


@pytest.fixture(scope="module", params=[ENCODER_DECODER, DECODER_ONLY])
def translator(
    request: pytest.FixtureRequest,
    tiny_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Translator:
    run = tmp_path_factory.mktemp("heat") / "run"
    return Translator.from_pretrained(write_export(request.param, tiny_corpus, run), "cpu")


def of_sentence(translator: Translator, ends: bool = True) -> HeatMap | str:
    """The heat map of the sentence for random features."""
    generator = torch.Generator().manual_seed(0)
    width = translator.export.visual.feature_width
    features_SD = torch.rand(NUM_FRAMES, width, generator=generator)
    codec = translator.export.codec
    ids = codec.encode(SENTENCE)
    wording = codec.wording("de")
    return heat_map_of(
        translator.export, features_SD, wording, ids if ends else ids[:-1], "German"
    )


def test_each_word_has_a_row_with_and_without_an_end_of_sentence(
    translator: Translator,
) -> None:
    """A search may stop at its longest length, before the end of the sentence."""
    ended, cut = of_sentence(translator), of_sentence(translator, ends=False)
    assert isinstance(ended, HeatMap) and isinstance(cut, HeatMap)
    assert ended.words == SENTENCE.split() == cut.words
    np.testing.assert_allclose(ended.levels, cut.levels, atol=1)
    assert np.shape(ended.levels) == (4, NUM_FRAMES)


def out_of_memory(layer: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def broken(layer: Any) -> Any:
    raise TypeError("no such option\nmore lines")


def not_finite(layer: Any) -> Any:
    return layer * float("nan")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: None, "This language model has no attention from words to frames."),
        (
            broken,
            "This language model does not give its attention: TypeError: no such option",
        ),
        (
            out_of_memory,
            "The attention cannot be shown: the GPU has not enough memory for it.",
        ),
        (not_finite, "The attention cannot be shown: some of its values are not finite."),
    ],
)
def test_why_there_is_no_heat_map_is_one_sentence(
    translator: Translator, change: Any, reason: str
) -> None:
    with changed_attention(translator, change):
        assert of_sentence(translator) == reason
    assert isinstance(of_sentence(translator), HeatMap)  # the model is as before


# --- the table

DRAW = """
  const {table, mark} = heatTable(arguments[0], {...arguments[1], frames: null, language: "de",
                                                 seek: (time) => { table.dataset.sought = time; }});
  table.querySelector("button").click();
  const found = [table.dataset.sought || null, table.className];
  mark(99);
  return [...found, table.className, table.querySelector("svg").getAttribute("aria-label"),
          table.querySelector("button").textContent, table.querySelectorAll("b").length];
"""
MAP = {"words": ["<b>regen</b>"], "levels": [[0, 0, LEVELS, 0]], "on_video": [0.5]}


def drawn(browser: Any, start: float, end: float) -> Any:
    """What was sought, and the line, after a word was pressed; the line at 99 s; texts."""
    browser.get("about:blank")
    return browser.execute_script(page_file("js") + DRAW, MAP, {"start": start, "end": end})


def test_a_word_moves_the_video_to_its_moment_and_is_no_html(browser: Any) -> None:
    assert drawn(browser, 10, 14) == [
        "12.5",
        "heat marked",
        "heat",  # the video is outside of the clip
        "most attention at 12.5 s; 50 % on the video",
        "<b>regen</b>",
        0,
    ]


def test_without_a_known_length_a_word_has_a_share_of_the_clip(browser: Any) -> None:
    """A report of cached features has no videos."""
    sought, line, _, about, *_ = drawn(browser, 0, 0)
    assert (sought, line) == (None, "heat")
    assert about == "most attention at 63 % of the clip; 50 % on the video"
