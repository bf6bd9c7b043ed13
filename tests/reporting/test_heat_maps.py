"""Test how the attention of tokens becomes a heat map of words."""

from collections.abc import Sequence

import numpy as np
import pytest

from flallm_ds.reporting.attention import LEVELS, MAX_COLUMNS, heat_map, words_of


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
