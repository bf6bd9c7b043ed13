"""Started by tests/test_docs.py: runs commands and Python code of the documentation, one
after another in one process, because most of the time of a short command is its imports.

A command under the `deepspeed` launcher runs as one process; tests/training covers the
launcher.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flallm_ds.cli import FLALLM
from flallm_ds.command import bind, read_words
from flallm_ds.command_help import Verb, VerbTable
from tests.helpers.documents import flallm_words

# The same commands with fewer steps: the test is about options and files, not about scores.
SHORTER = {
    "standin_llm": {"steps": "5"},
    "train": {
        "stage1.train.epochs": "1",
        "stage2.train.epochs": "1",
        "eval.every_epochs": "1",
        "eval.max_new_tokens": "8",
    },
}


def find(words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """Return the function of a `flallm` command, and the words after its verbs."""
    command: Any = FLALLM
    while isinstance(command, VerbTable):
        verb, *words = words
        assert verb in command.verbs, f"there is no verb {verb!r}"
        command = command.verbs[verb]
        if isinstance(command, Verb):
            command = command.load()
    return command, words


def run(line: str) -> None:
    """Run one command in the current folder."""
    words = flallm_words(line)
    if words is None:
        subprocess.run(["bash", "-c", line], check=True)
        return
    # As `main` of flallm_ds.command does, without its signals and its exit.
    function, rest = find(words)
    by_place, options = read_words(rest)
    options |= SHORTER.get(words[0], {})
    function(**bind(function, by_place, options, words[0]))


def main(file: Path) -> None:
    """Run the commands, then the code, of a JSON file: {"commands": [...], "code": [...]}."""
    todo = json.loads(file.read_text(encoding="utf-8"))
    for line in todo["commands"]:
        print(f"== {line}", flush=True)
        run(line)
    for code in todo["code"]:
        print(f"== {code}", flush=True)
        exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
