"""Command lines: every word is checked, fire sorts words from options, then a function is
called.

fire alone drops what follows `--`, reads `-` as the end of a call, takes the last value of
an option that is given twice, and guesses (`2024_01` becomes 202401, `--notes` means
tes=False). So `checked` accepts only words and `--name=value`, which fire sorts into words
and options, all strings. A function is called when every name is known and every value
has the annotated type.
"""

import difflib
import math
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, NoReturn

import fire

from flallm_ds import terminal
from flallm_ds.command_help import (
    Command,
    Verb,
    VerbTable,
    function_help,
    named_parameters,
    program_name,
    table_help,
    takes_overrides,
    usage,
)
from flallm_ds.errors import Preempted, RankError, UserError, file_problem
from flallm_ds.process import answer_signals, end_process, process_rank

_OPTION = re.compile(r"--(?P<name>[A-Za-z][A-Za-z0-9_.-]*)(?P<value>=.*)?", re.DOTALL)
# Word processors replace two hyphens by one of these.
_OTHER_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_HELP = ("--help", "-h")


class NoValue(str):
    """The value of an option that stands alone; only a bool option accepts it."""


class UnknownOption(UserError):
    """An option that does not exist. The message has the nearest of the valid names."""

    def __init__(self, name: str, valid: Iterable[str]) -> None:
        self.name, self.valid = name, tuple(valid)
        super().__init__(
            f"Cannot set --{name}: there is no option --{name}; {nearest(name, self.valid)}"
        )


def checked(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the positional words and the options of a command line.

    `--a.b=1` and `--a.b 1` are options; hyphens in names become `_`. Raises UserError for
    a word that is neither, and for an option that is given twice: nothing is dropped.
    """
    words: list[str] = []
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        # A word: VIDEO, or the name of a verb.
        if not _is_option(word):
            words.append(word)
            continue
        found = _OPTION.fullmatch(word)
        if found is None:
            raise UserError(_not_an_option(word))
        name = found["name"].replace("-", "_")
        # --name=value, then --name alone, then --name value.
        if found["value"] is not None:
            value = found["value"][1:]
        elif not rest or _is_option(rest[0]):
            value = NoValue("true")
        else:
            value = rest.pop(0)
            if value.startswith("="):
                raise UserError(
                    f"--{name} must be written without spaces, --{name}={value[1:]}, got "
                    f"{value!r}."
                )
        if name in options:
            raise UserError(
                f"--{name} must be given once, got it twice: {options[name]}, then {value}."
            )
        options[name] = value
    return words, options


def _is_option(word: str) -> bool:
    """Return whether a word looks like an option, right or wrong; -1 and -0.5 are values."""
    # Negative numbers are values: --lr -1.
    is_number = re.fullmatch(r"-\.?\d.*", word) is not None
    return word.startswith(tuple(_OTHER_DASHES)) or (word.startswith("-") and not is_number)


def _not_an_option(word: str) -> str:
    """Return the error for a word that begins with a dash but is not an option."""
    if word in ("-", "--"):
        return f"Options must be written --name=value, got a {word!r} that stands alone. Remove it."
    # One hyphen, three, or a typeset dash before a correct name: show how to write it.
    name = word.lstrip(f"-{_OTHER_DASHES}")
    if _OPTION.fullmatch(f"--{name}"):
        return (
            f"An option must begin with two hyphens, --{name}, got {word!a}. (A value or a "
            f"file whose name begins with a hyphen: write --option={word} or ./{word}.)"
        )
    return f"Options must be written --name=value, got {word!a}."


def read_words(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the positional words and the options of a command line, all strings.

    An option without a value has the value NoValue. Raises UserError as `checked` does.
    """
    given_words, given = checked(argv)
    words: list[str] = []
    options: dict[str, str] = {}

    @fire.decorators.SetParseFn(str)  # type: ignore[untyped-decorator]
    def collect(*args: str, **kwargs: str) -> None:
        words.extend(args)
        options.update(kwargs)

    # SetParseFn(str) keeps fire from reading values as Python literals.
    for_fire = list(given_words)
    for name, value in given.items():
        for_fire.append(f"--{name}={value}")
    fire.Fire(collect, command=for_fire)
    assert (words, options) == (given_words, given), "fire must pass on what it is given"
    return words, given  # not fire's copy, in which a NoValue is an ordinary string


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `did you mean ...?` with the closest names, or the list of valid names."""
    by_lower_case: dict[str, str] = {}
    for candidate in valid:
        by_lower_case[candidate.lower()] = candidate
    name = name.lower()
    # `lr` is close to optim.lr: the section was left out.
    close = [lower for lower in by_lower_case if lower.endswith(f".{name}")]
    if not close:
        close = difflib.get_close_matches(name, by_lower_case, n=3, cutoff=0.5)
    if not close:
        return f"valid: {', '.join(by_lower_case.values())}."
    return f"did you mean {' or '.join(map(by_lower_case.__getitem__, close))}?"


def coerce(value: str, hint: Any, name: str) -> Any:
    """Convert a value to the annotated type.

    The types are bool, int, float, str, Path, a Literal, `X | None` and a tuple of X.
    Raises UserError with the option, the type and the value. A value is missing if the
    option stood alone (bool options may), or is empty where neither a text nor a tuple
    is expected.
    """
    if isinstance(value, NoValue) and bool not in (hint, *typing.get_args(hint)):
        raise UserError(f"--{name} must have a value, got none. Write --{name}=VALUE.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    # `X | None`: `none` is None, any other value is of type X.
    if origin in (typing.Union, types.UnionType):
        if value.lower() in ("none", "null") and type(None) in args:
            return None
        (inner,) = set(args) - {type(None)}
        return coerce(value, inner, name)
    if origin is typing.Literal:
        return _choice(value, args, name)
    if origin is tuple:
        return tuple(coerce(part, args[0], name) for part in _split(value, name))
    if hint is Path:
        if not value:
            raise UserError(f"--{name} must name a file or a folder, got an empty value.")
        return Path(value)
    if hint is bool:
        return _bool(value, name)
    if hint in (int, float):
        return _number(value, hint, name)
    return value


def _choice(value: str, choices: Sequence[Any], name: str) -> Any:
    for choice in choices:
        if str(choice) == value:
            return choice
    valid = ", ".join(map(str, choices))
    raise UserError(f"--{name} must be one of {valid}, got {value!r}.")


def _split(value: str, name: str) -> list[str]:
    """Return the parts of `a,b`, `(a, b)` or `[a, b]`."""
    value = value.strip()
    if (value[:1], value[-1:]) in (("(", ")"), ("[", "]")):
        value = value[1:-1].strip().removesuffix(",")  # Python writes (1,) for one value
    if not value:
        return []
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise UserError(
            f"--{name} must have a value before and after each comma, got {value!r}."
        )
    return parts


def _bool(value: str, name: str) -> bool:
    lowered = value.lower()
    if lowered not in ("true", "false", "1", "0", "yes", "no"):
        raise UserError(f"--{name} must be true or false, got {value!r}.")
    return lowered in ("true", "1", "yes")


def _number(value: str, kind: type[int] | type[float], name: str) -> int | float:
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name} must be {wanted}, got {value!r}.")
    return number


def bind(
    function: Callable[..., Any],
    words: list[str],
    options: Mapping[str, str],
    program: str = "",
) -> dict[str, Any]:
    """Return the arguments of `function` from words and options.

    A function that takes **overrides receives the options that it does not name as
    strings. program: how the command is called, for the error about a missing argument.
    Raises UserError where words and options do not fit the signature.
    """
    hints = typing.get_type_hints(function)
    named = named_parameters(function)
    # Arguments before the `*` of a signature may be given as plain words.
    kind = Parameter.POSITIONAL_OR_KEYWORD
    by_place = [name for name, parameter in named.items() if parameter.kind == kind]
    arguments: dict[str, Any] = {}
    rest = list(words)
    for name in by_place[: len(words)]:
        # A tuple takes all words that remain, each as one value.
        if typing.get_origin(hints[name]) is tuple:
            each = typing.get_args(hints[name])[0]
            arguments[name] = tuple(coerce(word, each, name) for word in rest)
            rest.clear()
            break
        word = rest.pop(0)
        arguments[name] = coerce(word, hints[name], name)
        check_not_empty(word, named[name].default, name)
    if rest:
        raise UserError(
            f"Arguments must be at most {len(by_place)} word(s) and options --name=value, "
            f"got {rest[0]!r}, one word too many."
        )
    for name, value in options.items():
        if name in arguments:
            raise UserError(f"--{name} must be given once, got it twice.")
        if name in named:
            arguments[name] = coerce(value, hints[name], name)
            check_not_empty(value, named[name].default, name)
        elif takes_overrides(function):
            arguments[name] = value
        else:
            raise UnknownOption(name, named)
    # Report the first missing argument alone: one line says what is missing, one how to call.
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments:
            label = name.upper() if name in by_place else f"--{name}"
            raise UserError(
                f"{label} must be given, got nothing.\nUsage: {usage(function, program)} "
                f"(all options: {program} --help)"
            )
    return arguments


def check_not_empty(value: str, default: Any, name: str) -> None:
    """Raise UserError for an empty text that is not the default.

    It usually comes from a shell variable that is not set.
    """
    if not value and default not in ("", ()):
        raise UserError(
            f"--{name} must not be empty, got ''. Give it a value, or leave it out."
        )


def call(
    function: Callable[..., Any], words: list[str], options: Mapping[str, str], program: str
) -> None:
    """Call `function` with words and options. Raises UserError as `bind` does."""
    arguments = bind(function, words, options, program)
    try:
        function(**arguments)
    except UnknownOption as error:
        # RunConfig refuses one of **overrides, and does not know the command's own options.
        valid = (*named_parameters(function), *error.valid)
        raise UnknownOption(error.name, valid) from error


def main(command: Command | Verb) -> NoReturn:
    """Run a function, or one verb of several, with the process's arguments, and exit with
    its code.

    UserError is printed as one sentence (exit code 2), never as a traceback.
    """
    terminal.prepare()
    answer_signals(importing=True)
    argv = sys.argv[1:]
    if argv and re.fullmatch(r"--local[_-]rank=\d+", argv[0]):
        argv.pop(0)  # the deepspeed launcher puts it before the user's arguments
    try:
        function, program = _find_function(command, argv)
        # The command is imported: from here on, signals unwind it.
        answer_signals()
        if set(_HELP).intersection(argv):
            _print_help(function_help(function, program))
            sys.exit(0)
        words, options = read_words(argv)
        call(function, words, options, program)
        code = 0
    except UserError as error:
        if isinstance(error, RankError) or process_rank() == 0:
            _say_error(str(error))
        code = error.exit_code
    except OSError as error:  # of a file, and not turned into a UserError before
        _say_error(file_problem(error))
        code = RankError.exit_code
    except Preempted as stop:
        if process_rank() == 0:
            print(str(stop), flush=True)
        code = stop.exit_code
    except KeyboardInterrupt as stop:
        if process_rank() == 0:
            print("stopped.", file=sys.stderr, flush=True)
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
    # A log file on a full disk must not pass for a complete one.
    if (reason := terminal.write_error()) and code == 0:
        _say_error(
            f"Cannot write all of the output: {reason}. Make room, or send it elsewhere."
        )
        code = RankError.exit_code
    # Outside the except blocks: the error holds frames, and their objects are not closed
    # before the error is gone.
    end_process(code)


def _find_function(
    command: Command | Verb, argv: list[str]
) -> tuple[Callable[..., Any], str]:
    """Take the verbs off `argv`; return the function that they name and how it is called.

    Exits after printing the list of verbs where none is given. Raises UserError for a
    verb that does not exist.
    """
    program = program_name(sys.argv[0])
    while True:
        if isinstance(command, Verb):
            command = command.load()
        if not isinstance(command, VerbTable):
            return command, program
        if not argv or argv[0] in _HELP:
            _print_help(table_help(command, program))
            sys.exit(0 if argv else 2)
        name = argv.pop(0)
        if name not in command.verbs:
            hint = nearest(name, command.verbs)
            raise UserError(f"Cannot run {name!r}: there is no verb {name!r}; {hint}")
        command = command.verbs[name]
        program = f"{program} {name}"


def _print_help(text: str) -> None:
    """Print a help text on rank 0 alone."""
    if process_rank() == 0:
        print(text)


def _say_error(sentence: str) -> None:
    print(f"error: {terminal.printable(sentence)}", file=sys.stderr, flush=True)
