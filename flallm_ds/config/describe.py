"""Name, default and meaning of every option, from the fields of the config's dataclasses and
their comments."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from dataclasses import dataclass, fields
from typing import Any

from flallm_ds.config.run import RunConfig

RUN_SECTION = "run"  # of the options without a dot: stage, run, visual_run


@dataclass(frozen=True)
class Option:
    """One option. name: as on the command line. choices: empty if any value of its type
    may be given."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """The options of one section, in the order of its fields."""

    name: str
    title: str
    options: tuple[Option, ...]


def sections() -> dict[str, Section]:
    """Return all options by section; options without a dot are in the section `run`."""
    found = {RUN_SECTION: _section(RUN_SECTION, RunConfig, prefix="")}
    hints = typing.get_type_hints(RunConfig)
    # A field of RunConfig that is a dataclass is a section.
    for field in fields(RunConfig):
        if dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = _section(field.name, hints[field.name], f"{field.name}.")
    return found


def _section(name: str, cls: Any, prefix: str) -> Section:
    hints = typing.get_type_hints(cls)
    comments = field_comments(cls)
    options: list[Option] = []
    for field in fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue  # a section of its own
        choices: tuple[str, ...] = ()
        if typing.get_origin(hint) is typing.Literal:
            choices = tuple(map(str, typing.get_args(hint)))
        # Without a default: stage and run, which the recipe gives.
        default = "(required)"
        if field.default is not dataclasses.MISSING:
            default = written(field.default)
        options.append(
            Option(prefix + field.name, default, comments.get(field.name, ""), choices)
        )
    title = inspect.getdoc(cls) or ""
    return Section(name, title.partition("\n\n")[0].replace("\n", " "), tuple(options))


def written(value: Any) -> str:
    """Return a value as the command line writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(written, value)) or '""'
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or '""'


def field_comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: above its line, or at the end of it."""
    # ast knows the fields but drops comments; tokenize knows comments but not fields.
    # Line numbers join the two.
    source = textwrap.dedent(inspect.getsource(cls))
    comment_of_line: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment_of_line[token.start[0]] = token.string.lstrip("# ")
    (class_node,) = ast.parse(source).body
    assert isinstance(class_node, ast.ClassDef)
    comments: dict[str, str] = {}
    last_code_line = class_node.lineno
    for node in class_node.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            # All comment lines between the field before and the end of this one.
            lines = range(last_code_line + 1, (node.end_lineno or node.lineno) + 1)
            texts = [comment_of_line[line] for line in lines if line in comment_of_line]
            comments[node.target.id] = " ".join(texts)
        last_code_line = node.end_lineno or node.lineno
    return comments
