"""Pages of the site that are not files of docs/: mkdocs calls the functions `on_...` here.

Some pages are files elsewhere in the repository (README.md, ds_configs/README.md, ...).
The reference of options, recipes and commands is generated from the code in each build,
so that it is never out of date.
"""

import contextlib
import io
import logging
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from flallm_ds.cli import FLALLM
from flallm_ds.command import main
from flallm_ds.command_help import Verb, VerbTable
from flallm_ds.config.describe import sections, written
from flallm_ds.recipes import RECIPES, config_of

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("mkdocs.hooks")  # a warning ends `mkdocs build --strict`

# Files of the repository, and where the site shows them.
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
    "ds_configs/README.md": "reference/deepspeed.md",
    "benchmarks/README.md": "benchmarks/method.md",
} | {
    f"benchmarks/results/{path.name}": f"benchmarks/results/{path.name}"
    for path in (ROOT / "benchmarks" / "results").iterdir()
}
_SOURCE_OF = dict(zip(COPIED.values(), COPIED.keys(), strict=True))
# `](target` or `](target#anchor` of a Markdown link or picture.
_LINK = re.compile(r"\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


# --- what mkdocs calls


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the copied and the generated pages."""
    for source, page in COPIED.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, write in GENERATED.items():
        files.append(File.generated(config, page, content=write()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of a page, which are paths in the repository, paths in the site."""
    place = page.file.src_uri
    if place in GENERATED:
        return markdown
    source = _SOURCE_OF.get(place, f"docs/{place}")

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(
            posixpath.join(posixpath.dirname(source), match["target"])
        )
        # In the site the files of docs/ are at the top.
        shown = COPIED.get(target, target.removeprefix("docs/"))
        if shown == target and not files.get_file_from_path(shown):
            log.warning("%s links to %s, which is not in the site", source, target)
        link = posixpath.relpath(shown, posixpath.dirname(place) or ".")
        return f"]({link}{match['anchor'] or ''})"

    return _LINK.sub(linked, markdown)


# --- the generated pages


def options_page() -> str:
    """Return the page of all options: a table for each section."""
    lines = [
        "# Options",
        "",
        "Every option of a training run; `flallm options` prints the same. Pass an option to",
        "`flallm train`, `launch/train.py` and `launch/features.py` as `--NAME=VALUE`. Recipes",
        "change some of the defaults: see [Recipes](recipes.md).",
    ]
    for section in sections().values():
        lines += ["", f"## {section.name}", "", section.title, ""]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for option in section.options:
            meaning = option.meaning
            if option.choices:
                meaning += f" (one of: {', '.join(option.choices)})"
            cells = (f"`{option.name}`", f"`{option.default}`", _escaped(meaning.strip()))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return text such that Markdown shows it as it is, in a cell of a table."""
    return re.sub(r"([|*_<`])", r"\\\1", text)


def recipes_page() -> str:
    """Return the page of all recipes: a table, and what each changes of the defaults."""
    lines = [
        "# Recipes",
        "",
        "A recipe is a named run: `--recipe NAME`. `--recipe phoenix14t --stage llm` means",
        '`phoenix14t_llm`. Scores are test BLEU-4. "Paper" is FLa-LLM',
        "([arXiv 2403.12556](https://arxiv.org/abs/2403.12556)).",
        "",
        "| recipe | what it is | paper | here |",
        "|---|---|--:|---|",
    ]
    for name, recipe in RECIPES.items():
        paper = "" if recipe.paper is None else f"{recipe.paper:.2f}"
        row = (f"[`{name}`](#{name})", recipe.summary, paper, recipe.ours or "not measured")
        lines.append(f"| {' | '.join(row)} |")
    for name in RECIPES:
        lines += ["", f"## {name}", "", f"```text\n{_changes(name)}\n```"]
    return "\n".join(lines) + "\n"


def _changes(name: str) -> str:
    """Return the options of a recipe that differ from the defaults, one per line."""
    config = config_of(name)
    default = type(config)(stage=config.stage, run="", visual_run=config.visual_run)
    defaults = default.options() | {"stage": "", "visual_run": ""}
    changed: list[str] = []
    for option, value in config.options().items():
        if value != defaults[option]:
            changed.append(f"--{option}={written(value)}")
    return "\n".join(changed)


def cli_page() -> str:
    """Return the page of all commands with their help."""
    lines = [
        "# Command line",
        "",
        "What `--help` prints. The files in `launch/` and `shards/` of a checkout are the",
        "same commands: `deepspeed launch/train.py` is `flallm train` on several ranks.",
        "",
        f"```text\n{output_of('--help')}\n```",
    ]
    for words in commands(FLALLM):
        title = " ".join(("flallm", *words))
        lines += ["", f"## {title}", "", f"```text\n{output_of(*words, '--help')}\n```"]
    return "\n".join(lines) + "\n"


def commands(table: VerbTable) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command of a table of verbs, and of the tables in it."""
    for name, verb in table.verbs.items():
        command = verb.load() if isinstance(verb, Verb) else verb
        if not isinstance(command, VerbTable):
            yield (name,)
            continue
        yield from ((name, *words) for words in commands(command))


def output_of(*words: str) -> str:
    """Return what `flallm WORDS` prints. A command that fails fails the build."""
    # In this process: a start of Python for each command would take a minute.
    printed = io.StringIO()
    try:
        with (
            mock.patch.object(sys, "argv", ["flallm", *words]),
            mock.patch.dict(os.environ, COLUMNS="88"),
            contextlib.redirect_stdout(printed),
        ):
            main(FLALLM)
    except SystemExit as end:
        if end.code:
            log.warning("flallm %s ends with code %s", " ".join(words), end.code)
    return printed.getvalue().strip("\n")


GENERATED: dict[str, Callable[[], str]] = {
    "reference/options.md": options_page,
    "reference/recipes.md": recipes_page,
    "reference/cli.md": cli_page,
}
