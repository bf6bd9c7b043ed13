"""`flallm options`: the list of a training run's options."""

from flallm_ds.command_help import column_widths, table, wrapped
from flallm_ds.config.describe import Option, Section, sections
from flallm_ds.errors import UserError

MAX_DEFAULT_CHARS = 13  # a longer default is written below, with the meaning


def options(section: str = "") -> None:
    """List the options of a training run, with their defaults and meanings.

    Example: flallm options optim

    Options:
        section: run, data, visual, light_t, llm, optim, train or eval; all by default
    """
    print(option_list(section))


def option_list(section: str = "") -> str:
    """Return the options of a section, or of all. Raises UserError for an unknown section."""
    found = sections()
    if section and section not in found:
        raise UserError(f"SECTION must be one of {', '.join(found)}, got {section!r}.")
    chosen = [found[section]] if section else list(found.values())
    rows: list[tuple[str, str, str]] = []
    for one in chosen:
        rows += map(_row, one.options)
    widths = column_widths(rows)  # one alignment for all sections
    parts: list[str] = []
    for one in chosen:
        parts.append(_section_text(one, widths))
    parts.append(
        wrapped(
            "Set an option with --NAME=VALUE. Recipes have defaults of their own: flallm "
            "recipes. The options of a run are in its config.json."
        )
    )
    return "\n\n".join(parts)


def _section_text(section: Section, widths: list[int]) -> str:
    rows = list(map(_row, section.options))
    return f"{wrapped(f'{section.name}: {section.title}')}\n{table(rows, widths)}"


def _row(option: Option) -> tuple[str, str, str]:
    # A long default would make the column of meanings narrow.
    default, meaning = option.default, option.meaning
    if len(default) > MAX_DEFAULT_CHARS:
        meaning = f"{meaning} (default {default})"
        default = "..."
    if option.choices:
        meaning = f"{meaning} ({', '.join(option.choices)})"
    return option.name, default, meaning.strip()
