"""What `--help` prints, and what a missing argument prints; no slow package is imported."""

import subprocess
import sys

import pytest

from flallm_ds.cli import FLALLM
from flallm_ds.cli.train import STAGES
from flallm_ds.command_help import function_help, program_name, table
from flallm_ds.recipes import FAMILIES
from tests.helpers.early import flallm
from tests.helpers.paths import ROOT


def test_the_program_explains_itself_and_lists_its_verbs_by_purpose() -> None:
    lines = flallm("--help").stdout.splitlines()
    assert "sign language translation" in lines[0] and lines[2] == ""
    assert lines[3] == "usage: flallm VERB [OPTIONS]"
    for name, verb in FLALLM.verbs.items():
        assert f"  {name:11}  {verb.summary}" in lines
        assert verb.group in lines
    assert lines[-1] == "Help of a verb: flallm VERB --help"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", FLALLM.verbs)
def test_every_verb_has_help(verb: str) -> None:
    done = flallm(verb, "--help")
    assert done.returncode == 0
    assert f"usage: flallm {verb}" in done.stdout


def test_the_version_is_printed() -> None:
    assert flallm("--version").stdout.startswith("flallm_ds 0.")


def test_help_of_training_lists_stages_and_recipes() -> None:
    text = flallm("train", "--help").stdout
    for name, meaning in (*STAGES, *FAMILIES.items()):
        assert name in text and meaning in text
    assert "flallm options" in text and text.count("deepspeed launch/train.py") == 2
    lines = text.splitlines()
    assert len(lines) <= 35 and max(map(len, lines)) <= 85


def test_the_script_has_the_help_of_the_verb() -> None:
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    usage, _, rest = done.stdout.partition("\n")
    assert usage.startswith("usage: python launch/train.py [OPTIONS]")
    assert all(f"  {stage}" in rest for stage, _ in STAGES)


def test_options_that_importers_share_are_listed_once() -> None:
    together = flallm("shards", "build", "--help").stdout
    alone = flallm("shards", "build", "manifest", "--help").stdout
    assert together.count("--clips_per_shard:") == 1
    assert "--clips_per_shard" not in alone and "--language" in alone
    assert "usage: flallm shards build manifest --source=PATH --out=PATH [OPTIONS]" in alone


@pytest.mark.parametrize(
    ("argv", "missing", "usage"),
    [
        (
            ["translate"],
            "--model",
            "flallm translate [VIDEO ...] --model=MODEL [OPTIONS]",
        ),
        (
            ["checkpoints", "verify"],
            "RUN",
            "flallm checkpoints verify RUN",
        ),
        (["evaluate"], "--run", "flallm evaluate --run=RUN [OPTIONS]"),
        (
            ["shards", "build", "phoenix14t"],
            "--source",
            "flallm shards build phoenix14t --source=PATH --out=PATH [OPTIONS]",
        ),
    ],
)
def test_a_missing_argument_prints_two_lines(
    argv: list[str], missing: str, usage: str
) -> None:
    done = flallm(*argv)
    program = " ".join(["flallm", *argv])
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            f"error: {missing} must be given, got nothing.",
            f"Usage: {usage} (all options: {program} --help)",
        ],
    )


def documented(
    first: int, *, second: bool = False, third: tuple[str, ...] = ("a",)
) -> None:
    """Do something.

    Example: do 1

    Options:
        first: how often, and
            why
        second: switch it on
        third: names
    """


def test_the_options_section_of_a_docstring_becomes_a_table() -> None:
    assert function_help(documented, "do") == (
        "usage: do FIRST [OPTIONS]\n\nDo something.\n\nExample: do 1\n\n"
        "options\n"
        "  FIRST          how often, and why (required)\n"
        "  --second       switch it on\n"
        "  --third=THIRD  names (default a)"
    )


def test_the_last_column_of_a_table_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = table([("a", "one"), ("bb", "word " * 10)])
    assert text.splitlines() == [
        "  a   one",
        "  bb  word word word word word word word",
        "      word word word",
    ]


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("/venv/bin/flallm", "flallm"),
        ("launch/train.py", "python launch/train.py"),
        ("/x/flallm_ds/__main__.py", "python -m flallm_ds"),
    ],
)
def test_a_command_is_named_as_it_was_called(script: str, name: str) -> None:
    assert program_name(script) == name
