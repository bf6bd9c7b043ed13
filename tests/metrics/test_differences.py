"""Test which parts of a hypothesis and of its reference differ."""

import pytest

from flallm_ds.metrics.differences import differences


@pytest.mark.parametrize(
    ("hypothesis", "reference", "characters", "expected"),
    [
        (
            "im süden regen",
            "im norden viel regen",
            False,
            (["im ", "süden", " regen"], ["im ", "norden viel", " regen"]),
        ),
        ("regen", "sonne", False, (["", "regen"], ["", "sonne"])),
        ("wind und  regen", "wind", False, (["wind ", "und regen"], ["wind"])),
        ("", "sonne", False, ([""], ["", "sonne"])),
        ("明天下雨", "明天 有雨", True, (["明天", "下", "雨"], ["明天", "有", "雨"])),
    ],
)
def test_differences_are_marked_by_words_or_characters(
    hypothesis: str, reference: str, characters: bool, expected: tuple[list[str], list[str]]
) -> None:
    found = differences(hypothesis, reference, characters)
    assert found == expected
    # Nothing of a sentence is lost, and no mark begins or ends with a space.
    separator = "" if characters else " "
    for parts, text in zip(found, (hypothesis, reference), strict=True):
        assert "".join(parts) == separator.join(text.split())
        assert all(part == part.strip() for part in parts[1::2])
