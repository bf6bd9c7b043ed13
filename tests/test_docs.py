"""README and docs/: every command is parsed, the cheap ones run, and links lead somewhere.

The language of a code block says which (CONTRIBUTING.md, "Documentation").
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flallm_ds.cli.features import features
from flallm_ds.cli.submit import submit
from flallm_ds.cli.train import train
from flallm_ds.command import bind, read_words
from flallm_ds.command_help import named_parameters
from flallm_ds.recipes import resolve, resolve_both
from flallm_ds.sharding.corpora import manifest
from tests.helpers.documents import (
    PAGES,
    Block,
    blocks,
    flallm_words,
    inline_commands,
    lines,
    words_of,
)
from tests.helpers.launching import environment
from tests.helpers.paths import ROOT
from tests.helpers.run_documentation import find
from tests.helpers.trees import write_video

LANGUAGES = {"bash", "sh", "python", "text", "csv", "json"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh")]
# Programs that are not ours and may appear in a command.
PROGRAMS = {
    "apptainer", "chromium", "curl", "cut", "docker", "export", "pip", "source", "ssh",
    "tail", "tensorboard",
}  # fmt: skip
_LINK = re.compile(r"\]\((?P<target>[^)#\s:]+)(#[^)\s]*)?\)")


def place(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", BLOCKS, ids=place)
def test_every_block_says_its_language(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.place} is a block of {block.language!r}"


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_every_command_is_one_that_we_accept(block: Block) -> None:
    for line in lines(block.text):
        check(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_sentence_is_one_that_we_accept(page: Path) -> None:
    for line in inline_commands(page):
        check(line)


def check(line: str) -> None:
    """Raise what our own parser raises for a command, or an AssertionError."""
    words = flallm_words(line)
    if words is not None:
        check_ours(words)
        return
    program, *rest = words_of(line)
    program = Path(program).name
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in rest:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), line
    elif program in ("python", "deepspeed"):
        if rest[:2] != ["-m", "pytest"]:
            scripts = ("benchmarks", "docs/")
            (module,) = [word for word in rest if word.startswith(scripts)]
            script = module.removesuffix(".py").replace(".", "/") + ".py"
            assert (ROOT / script).is_file(), line
    else:
        assert program in PROGRAMS, (
            f"{line} is a program that the documentation may not use"
        )


def check_ours(words: list[str]) -> None:
    """Raise UserError if a `flallm` command has a wrong verb, option, value or recipe."""
    if words in (["--help"], ["--version"]):
        return
    function, rest = find(words)
    if rest == ["--help"]:
        return
    by_place, options = read_words(rest)
    arguments = bind(function, by_place, options, words[0])
    stage, recipe = arguments.pop("stage", None), arguments.pop("recipe", None)
    if function is submit:
        arguments = {name: arguments[name] for name in arguments if is_of_run(name)}
    if function in (train, submit) and stage == "both":
        resolve_both(recipe, arguments)
    elif function in (train, submit):
        resolve(stage, recipe, arguments)
    elif function is features:
        # What bind does not know is an option of the run that is to train on the features.
        of_run = {name: value for name, value in arguments.items() if name in options}
        for name in ("out", "views", "dtype", "splits", "shards"):
            of_run.pop(name, None)
        resolve("llm", recipe, of_run)


def is_of_run(name: str) -> bool:
    """Whether an option of `flallm submit` is one of the run, not of its own."""
    return name not in named_parameters(submit)


def test_the_commands_marked_to_run_do_run(tmp_path: Path) -> None:
    """In the order of the pages, in a folder with ten short videos and a manifest.

    A command that several pages show runs once.
    """
    write_clips(tmp_path)
    # Dicts keep the order and drop repetitions, which may differ in their comments.
    commands: dict[tuple[str, ...], str] = {}
    code: dict[str, None] = {}
    for block in BLOCKS:
        if block.language == "bash":
            for line in lines(block.text):
                commands.setdefault(tuple(words_of(line)), line)
        # The loop of webdataset needs more than one tar: tests/data/test_wds.py runs it.
        elif block.language == "python" and "import webdataset" not in block.text:
            code[block.text] = None
    assert len(commands) >= 8 and len(code) >= 3
    todo = tmp_path / "todo.json"
    todo.write_text(json.dumps({"commands": list(commands.values()), "code": list(code)}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.run_documentation", str(todo)],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def write_clips(folder: Path) -> None:
    """Write clips.csv and its videos, with the names that the pages use."""
    splits = ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    rows = ["video,text,split,signer"]
    for number, split in enumerate(splits):
        name = f"videos/{'abcdefghij'[number]}.mp4"
        write_video(folder / name, num_frames=12 + number)
        rows.append(f"{name},rain in the {('north', 'south')[number % 2]} today,{split},s")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_the_manifests_of_the_pages_can_be_read(tmp_path: Path) -> None:
    tables = [block for block in BLOCKS if block.language == "csv"]
    assert tables
    for block in tables:
        (tmp_path / "clips.csv").write_text(block.text, encoding="utf-8")
        corpus = manifest.read(
            tmp_path / "clips.csv", ("train", "dev", "test"), language="en"
        )
        assert sum(map(len, corpus.rows.values())) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """`make docs` checks anchors as well."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [match["target"] for match in _LINK.finditer(text)]
    assert [name for name in targets if not (page.parent / name).exists()] == []


def test_the_navigation_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
