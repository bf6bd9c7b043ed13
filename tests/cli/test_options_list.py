"""`flallm options` lists every option with its default and its meaning."""

from dataclasses import dataclass

import pytest

from flallm_ds.cli.options import option_list
from flallm_ds.config import RunConfig
from flallm_ds.config.describe import field_comments, sections, written
from flallm_ds.errors import UserError
from tests.helpers.early import flallm

DEFAULTS = RunConfig(stage="visual", run="").options()


def test_every_option_is_described_once() -> None:
    described = [option for section in sections().values() for option in section.options]
    assert [option.name for option in described] == list(DEFAULTS)
    for option in described:
        assert option.default in ("(required)", written(DEFAULTS[option.name]))
        assert option.meaning, f"{option.name} has no comment"


def test_an_option_is_listed_with_default_meaning_and_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (line,) = [line for line in option_list().splitlines() if "optim.name " in line]
    assert line.split()[:2] == ["optim.name", "adamw"] and line.endswith("(sgd, adamw)")


def test_a_section_is_listed_alone_within_the_width_of_the_terminal() -> None:
    text = flallm("options", "train", COLUMNS="60").stdout
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  train.")]
    assert names == [name for name in DEFAULTS if name.startswith("train.")]
    assert max(map(len, text.splitlines())) <= 60


def test_an_unknown_section_is_refused_with_the_sections() -> None:
    with pytest.raises(UserError) as caught:
        option_list("optimizer")
    assert str(caught.value) == (
        "SECTION must be one of run, data, visual, light_t, llm, optim, train, eval, got "
        "'optimizer'."
    )


@dataclass
class Example:
    """An example."""

    # above
    above: int = 1
    at_end: int = 2  # at the end
    without: int = 3
    # two
    # lines
    two_lines: tuple[int, ...] = ()  # and at the end


def test_a_comment_belongs_to_the_field_below_or_before_it() -> None:
    assert field_comments(Example) == {
        "above": "above",
        "at_end": "at the end",
        "without": "",
        "two_lines": "two lines and at the end",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "true"), (1e-5, "1e-05"), ((), '""'), (("a", 1.5), "a,1.5")],
)
def test_defaults_are_written_as_on_the_command_line(value: object, text: str) -> None:
    assert written(value) == text
