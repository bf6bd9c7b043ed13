"""Help texts of commands: usage lines, tables of options, and lists of verbs."""

import importlib
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Function = Callable[..., Any]

MAX_COLUMNS = 100  # longer lines are hard to read on a wide terminal
MIN_COLUMNS = 40
MIN_LAST_COLUMN = 24  # of a table; below that a wrapped text is a column of single words
# Name of a function's attribute: options that the help of its parent verb describes.
DESCRIBED_ABOVE = "options_described_above"

_OPTIONS_SECTION = re.compile(r"^Options:\n(?P<lines>(?:    .*\n?|\n)+)", re.MULTILINE)
_OPTION_LINE = re.compile(r"    (?P<name>\w+): (?P<text>.*)")


@dataclass(frozen=True)
class Verb:
    """A verb of a command line, whose module is imported when the verb is used.

    summary: one line for the list of verbs. target: `module:name` of a function or of a
    VerbTable. group: the title under which help lists the verb.
    """

    summary: str
    target: str
    group: str = "verbs"

    def load(self) -> "Command":
        """Import the module and return the function or the table."""
        module, _, name = self.target.partition(":")
        found: Command = getattr(importlib.import_module(module), name)
        return found


@dataclass(frozen=True)
class VerbTable:
    """The verbs of a command line.

    about: what they are for, in one or two lines. more: printed below the list.
    """

    about: str
    verbs: Mapping[str, Verb | Function]
    more: str = ""


Command = Function | VerbTable


def program_name(script: str) -> str:
    """Return how a user calls the command whose sys.argv[0] is `script`."""
    path = Path(script)
    if path.name == "__main__.py":
        return f"python -m {path.parent.name}"
    if path.suffix == ".py":
        return f"python {script}"
    return path.name


def columns() -> int:
    """Return the width of a help text: that of the terminal, 40 to 100 columns."""
    return max(MIN_COLUMNS, min(shutil.get_terminal_size().columns, MAX_COLUMNS))


def column_widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """Return the width of each column but the last, which `table` wraps."""
    widths: list[int] = []
    for cells in list(zip(*rows, strict=True))[:-1]:
        widths.append(max(map(len, cells)))
    return widths


def table(rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None) -> str:
    """Return rows as aligned columns whose last column is wrapped to the terminal's width.

    Every row has the same number of cells; lines are indented by two. widths: those of
    several tables together, if their columns are to be aligned.
    """
    widths = column_widths(rows) if widths is None else widths
    lines: list[str] = []
    for *cells, last in rows:
        head = "  "
        for cell, width in zip(cells, widths, strict=True):
            head += f"{cell:{width}}  "
        # A wrapped text continues below its own beginning.
        wrapped = textwrap.wrap(last, max(MIN_LAST_COLUMN, columns() - len(head)))
        for number, part in enumerate(wrapped or [""]):
            lines.append(f"{head if number == 0 else ' ' * len(head)}{part}".rstrip())
    return "\n".join(lines)


def usage(function: Function, program: str) -> str:
    """Return how a command is called: the required arguments, and [OPTIONS] for the others."""
    parts = [program]
    # Options that have a default are not listed here: help describes them in a table.
    has_options = False
    hints = typing.get_type_hints(function)
    for name, parameter in named_parameters(function).items():
        placeholder = _placeholder(name, parameter, hints[name])
        # [VIDEO ...] may be left out.
        if parameter.default is parameter.empty or placeholder.startswith("["):
            parts.append(placeholder)
        else:
            has_options = True
    if has_options:
        parts.append("[OPTIONS]")
    if takes_overrides(function):
        parts.append("[--SECTION.OPTION=VALUE ...]")
    return " ".join(parts)


def named_parameters(function: Function) -> dict[str, inspect.Parameter]:
    """Return the parameters that a command line can give; positional-only ones are for
    callers in Python."""
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            found[name] = parameter
    return found


def takes_overrides(function: Function) -> bool:
    """Return whether the function accepts options of any name (`**overrides`)."""
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def function_help(function: Function, program: str) -> str:
    """Return the help of one command: its usage line, its docstring and its options.

    An `Options:` section of the docstring (`    name: meaning`) becomes a table.
    """
    text, meanings = _split_docstring(inspect.getdoc(function) or "")
    described_above = getattr(function, DESCRIBED_ABOVE, ())
    hints = typing.get_type_hints(function)
    rows: list[tuple[str, str]] = []
    for name, parameter in named_parameters(function).items():
        meaning = meanings.get(name, "")
        # Docstrings without the section explain their options as --name in the text.
        is_known = f"--{name}" in text or parameter.default is parameter.empty
        if name in described_above or (not meaning and is_known):
            continue
        meaning = f"{meaning}{_default_note(parameter)}"
        rows.append((_placeholder(name, parameter, hints[name]), meaning.strip()))
    # In the order of argparse: usage, description, options.
    parts = [f"usage: {usage(function, program)}", text]
    if rows:
        parts.append(f"options\n{table(rows)}")
    return "\n\n".join(parts)


def table_help(verbs: VerbTable, program: str) -> str:
    """Return the help of a table of verbs, listed by group."""
    # Groups appear in the order of their first verb.
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, command in verbs.verbs.items():
        group = command.group if isinstance(command, Verb) else "verbs"
        groups.setdefault(group, []).append((name, _summary(command)))
    widths = [max(map(len, verbs.verbs))]
    parts = [verbs.about, f"usage: {program} VERB [OPTIONS]"]
    for group, rows in groups.items():
        parts.append(f"{group}\n{table(rows, widths)}")
    if verbs.more:
        parts.append(verbs.more)
    parts.append(f"Help of a verb: {program} VERB --help")
    return "\n\n".join(parts)


def wrapped(text: str) -> str:
    """Return a paragraph wrapped to the terminal's width."""
    return textwrap.fill(text, columns())


def _split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Return a docstring without its `Options:` section, and the section's meanings by name."""
    found = _OPTIONS_SECTION.search(doc)
    if found is None:
        return doc.strip(), {}
    # `    name: meaning`, whose meaning may continue on lines that are indented further.
    meanings: dict[str, str] = {}
    name = ""
    for line in found["lines"].splitlines():
        option = _OPTION_LINE.fullmatch(line)
        if option is not None:
            name = option["name"]
            meanings[name] = option["text"]
        elif line.strip():
            meanings[name] += f" {line.strip()}"
    return f"{doc[: found.start()]}{doc[found.end() :]}".strip(), meanings


def _placeholder(name: str, parameter: inspect.Parameter, hint: Any) -> str:
    """Return how an argument is written: VIDEO or [VIDEO ...] by place, --model=MODEL."""
    is_required = parameter.default is parameter.empty
    is_by_place = parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    if is_by_place and typing.get_origin(hint) is tuple:
        return f"{name.upper()} ..." if is_required else f"[{name.upper()} ...]"
    if is_required and is_by_place:
        return name.upper()
    # The type of `int | None` is int.
    kinds = {hint, *typing.get_args(hint)}
    if typing.get_origin(hint) is typing.Literal:
        return f"--{name}={'|'.join(map(str, typing.get_args(hint)))}"
    if bool in kinds:  # before int: bool options stand alone
        return f"--{name}"
    if int in kinds:
        return f"--{name}=N"
    if float in kinds:
        return f"--{name}=X"
    return f"--{name}={'PATH' if Path in kinds else name.upper()}"


def _default_note(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return " (required)"
    # None and empty values mean "not given"; the meaning says what happens then.
    default = parameter.default
    if default in (None, "", ()) or default is False:
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" (default {default})"


def _summary(command: Verb | Function) -> str:
    if isinstance(command, Verb):
        return command.summary
    # Importers document their options in the first line too: "PHOENIX14T. --source: ...".
    first_line = (inspect.getdoc(command) or "").partition("\n")[0]
    return first_line.partition(" --")[0]  # without its options
