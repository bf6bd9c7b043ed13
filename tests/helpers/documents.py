"""The pages of the documentation, their code blocks, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ds_configs" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(
    r"^( *)```(?P<language>\S*)\n(?P<text>.*?)^\1```$", re.MULTILINE | re.DOTALL
)
_INLINE = re.compile(r"`(flallm [^`]+)`")
_ASSIGNMENT = re.compile(r"(?P<name>[A-Z]+)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block. place: file and line, for messages."""

    place: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        place = f"{page.relative_to(ROOT)}:{line}"
        found.append(Block(place, match["language"], match["text"]))
    return found


def inline_commands(page: Path) -> list[str]:
    """Return the code spans of a page that are `flallm` commands with options."""
    found: list[str] = []
    for command in _INLINE.findall(page.read_text(encoding="utf-8")):
        if "--" in command and "..." not in command and "OPTION" not in command:
            found.append(command)
    return found


def lines(text: str) -> Iterator[str]:
    """Yield the commands of a shell block, each as one line.

    Lines that end with a backslash, or inside a quote, are joined with the next one.
    Variables (`OPTIONS="..."`) are replaced by their values. Comments are left out.
    """
    variables: dict[str, str] = {}
    pending = ""
    for line in text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        # shlex finds where a command ends: a quote may span lines.
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote that is open
            pending += " "
            continue
        command, pending = pending, ""
        assignment = _ASSIGNMENT.fullmatch(words[0]) if len(words) == 1 else None
        if assignment:
            variables[assignment["name"]] = assignment["value"]
        elif words:
            for name, value in variables.items():
                command = command.replace(f"${name}", value)
            yield command.strip()
    assert not pending, f"a command must end in its block, got {pending!r}"


def words_of(line: str) -> list[str]:
    """Return the words of a command, without its comment."""
    return shlex.split(line, comments=True)


_LAUNCHERS = ("deepspeed", "torchrun", "python", "flallm", "sbatch")
_SCRIPT = re.compile(r"(?P<folder>launch|shards)/(slurm/)?(?P<name>\w+)\.(py|sbatch)")


def flallm_words(line: str) -> list[str] | None:
    """Return the words after `flallm` of a command in any of its forms.

    `deepspeed --num_gpus=2 launch/train.py --stage=llm` is `train --stage=llm`. None: the
    command is not one of ours.
    """
    program, *rest = words_of(line)
    program = Path(program).name  # .venv/bin/python is python
    if program not in _LAUNCHERS:
        return None
    if program == "flallm":
        return rest
    # The options of the launcher come before the script, ours after it.
    while rest:
        word = rest.pop(0)
        script = _SCRIPT.fullmatch(word)
        if script:
            verb = script["name"]
            if verb == "shard":  # an array of jobs
                return ["shards", "build", *rest]
            return [*(["shards"] if script["folder"] == "shards" else []), verb, *rest]
        if word == "--module":
            return [rest.pop(0).removeprefix("flallm_ds.cli."), *rest]
    return None
