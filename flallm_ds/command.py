"""How every command line of the project is read: each word is checked, fire sorts them,
then the call.

fire alone drops what stands after `--`, reads `-` as the end of a call, takes an option
that is given twice by its last value, and guesses (`2024_01` becomes 202401, `--notes`
means tes=False). So `checked` lets pass only words and `--name=value`, which fire sorts
into words and options, all strings. A function is called once every name is known and
every value is of the annotated type.
"""

import atexit
import difflib
import importlib
import inspect
import math
import os
import re
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import fire

from flallm_ds import terminal
from flallm_ds.errors import Preempted, RankError, UserError, file_problem

_OPTION = re.compile(r"--(?P<name>[A-Za-z][A-Za-z0-9_.-]*)(?P<value>=.*)?", re.DOTALL)
# Of typeset documents, where two hyphens often become one of them.
_OTHER_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"


class NoValue(str):
    """The value of an option that was given without one; only an option that is true or
    false can be."""


def checked(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(positional words, options) of a command line: `--a.b=1` and `--a.b 1` are options,
    hyphens as `_`.

    Raises UserError for a word that is neither, and for an option that is given twice:
    nothing is dropped.
    """
    words: list[str] = []
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_option(word):
            words.append(word)
            continue
        found = _OPTION.fullmatch(word)
        if found is None:
            raise UserError(_no_option(word))
        name = found["name"].replace("-", "_")
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
                f"--{name} must be given once, but was given twice: {options[name]}, then "
                f"{value}."
            )
        options[name] = value
    return words, options


def _is_option(word: str) -> bool:
    """Whether a word looks like an option, right or wrong; -1 and -0.5 are values."""
    return word[:1] in tuple(_OTHER_DASHES) or (
        word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word)
    )


def _no_option(word: str) -> str:
    """The sentence about a word that begins with a dash and is no option."""
    if word in ("-", "--"):
        return f"options must be written --name=value, got a {word!r} that stands alone. Remove it."
    name = word.lstrip(f"-{_OTHER_DASHES}")
    if _OPTION.fullmatch(f"--{name}"):
        return (
            f"an option must begin with two hyphens, --{name}, got {word!a}. (A value or a "
            f"file whose name begins with a hyphen: write --option={word} or ./{word}.)"
        )
    return f"options must be written --name=value, got {word!a}."


def read_words(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(positional words, options) of a command line, all strings.

    An option without a value has the value NoValue. Raises UserError as `checked` does.
    """
    given_words, given = checked(argv)
    words: list[str] = []
    options: dict[str, str] = {}

    @fire.decorators.SetParseFn(str)  # type: ignore[untyped-decorator]
    def collect(*args: str, **kwargs: str) -> None:
        words.extend(args)
        options.update(kwargs)

    fire.Fire(
        collect,
        command=[*given_words, *(f"--{name}={value}" for name, value in given.items())],
    )
    assert (words, options) == (given_words, given), "fire must pass on what it is given"
    return words, given  # with what fire has no sign for: that a value is missing


def nearest(name: str, valid: Iterable[str]) -> str:
    """`Did you mean …?` with the closest valid names, or the list of all where nothing is
    close."""
    valid = list(valid)
    lowered = {v.lower(): v for v in valid}
    name = name.lower()
    # the section was left out
    close = [v for low, v in lowered.items() if low.endswith(f".{name}")]
    close = close or [
        lowered[low] for low in difflib.get_close_matches(name, lowered, n=3, cutoff=0.5)
    ]
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}."


def coerce(value: str, hint: Any, name: str) -> Any:
    """`value` as the annotated type (bool, int, float, str, Path, a Literal, `X | None`,
    tuple of X).

    Raises UserError that names the option, the type it must have, and what came. A value
    is missing where the option stood alone (not of a bool), or is empty where neither a
    text nor a tuple can be.
    """
    if isinstance(value, NoValue) and hint is not bool:
        raise UserError(f"--{name} must have a value, got none. Write --{name}=VALUE.")
    if hint is Path and not value:
        raise UserError(f"--{name} must name a file or a folder, but is empty.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value.lower() in ("none", "null") and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is typing.Literal:
        found = next((choice for choice in args if str(choice) == value), None)
        if found is None:
            raise UserError(
                f"--{name} must be one of {', '.join(map(str, args))}, but is {value!r}."
            )
        return found
    if origin is tuple:
        if not value.strip():
            return ()
        if (value[0], value[-1]) in (("(", ")"), ("[", "]")):
            value = value[1:-1].removesuffix(",")
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        if not all(parts):
            raise UserError(
                f"--{name} must have something before and after each comma, but is "
                f"{value!r}."
            )
        return tuple(coerce(part, args[0], name) for part in parts)
    if hint is bool:
        lowered = value.lower()
        if lowered not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--{name} must be true or false, but is {value!r}.")
        return lowered in ("true", "1", "yes")
    if hint in (int, float):
        try:
            number = hint(value)
            if not math.isfinite(number):
                raise ValueError("not a number")
            return number
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"--{name} must be {kind}, but is {value!r}.") from None
    return Path(value) if hint is Path else value


def bind(
    function: Callable[..., Any], words: list[str], options: Mapping[str, str]
) -> dict[str, Any]:
    """Arguments for `function` from words and options; raises UserError where they do not
    fit its signature.

    A function that takes **overrides receives the options it does not name as they came
    (strings). What is positional-only is for callers in Python.
    """
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    named = {
        n: p
        for n, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    positional = [n for n, p in named.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(words) > len(positional):
        raise UserError(
            f"{words[len(positional)]!r} is one word too many: options are written "
            "--name=value."
        )
    arguments: dict[str, Any] = {}
    for name, word in zip(positional, words, strict=False):
        arguments[name] = coerce(word, hints[name], name)
        check_not_empty(word, named[name].default, name)
    for name, value in options.items():
        if name in arguments:
            raise UserError(f"--{name} must be given once, but was given twice.")
        if name in named:
            arguments[name] = coerce(value, hints[name], name)
            check_not_empty(value, named[name].default, name)
        elif open_ended:
            arguments[name] = value
        else:
            raise UserError(f"there is no option --{name}: {nearest(name, named)}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"--{missing[0]} must be given. {usage(function)}")
    return arguments


def check_not_empty(value: str, default: Any, name: str) -> None:
    """Raise UserError for an empty text (of a shell variable that is not set?) that is
    not the default."""
    if not value and default not in ("", ()):
        raise UserError(f"--{name} must not be empty. Give it a value, or leave it out.")


def usage(function: Callable[..., Any]) -> str:
    parts = []
    for name, p in inspect.signature(function).parameters.items():
        if p.kind == p.POSITIONAL_ONLY:
            continue
        if p.kind == p.VAR_KEYWORD:
            parts.append("[--section.field=VALUE ...]")
        elif p.default is p.empty:
            parts.append(
                f"{name.upper()}" if p.kind == p.POSITIONAL_OR_KEYWORD else f"--{name}=..."
            )
        else:
            parts.append(f"[--{name}={p.default}]")
    return f"usage: {' '.join(parts)}"


@dataclass(frozen=True)
class Verb:
    """A verb of a command line, whose module is imported when the verb is used.

    summary: one line for the list of verbs. target: `module:name` of a function or of a
    table of verbs.
    """

    summary: str
    target: str

    def load(self) -> "Command":
        """Import the module and return the function or the table."""
        module, _, name = self.target.partition(":")
        found: Command = getattr(importlib.import_module(module), name)
        return found


Verbs = Mapping[str, "Verb | Callable[..., Any]"]
Command = Callable[..., Any] | Verbs


def main(command: Command | Verb) -> NoReturn:
    """Run a function, or one verb of several, with the process's arguments, and exit with
    its code.

    UserError is printed as one sentence (exit code 2), never as a traceback.
    """
    terminal.prepare()
    answer_signals(importing=True)
    argv = sys.argv[1:]
    if argv and re.fullmatch(r"--local[_-]rank=\d+", argv[0]):
        argv.pop(0)  # the deepspeed launcher puts it before what was typed
    try:
        while not callable(command):
            command = command.load() if isinstance(command, Verb) else _verb(command, argv)
        function = command
        answer_signals()
        if "--help" in argv or "-h" in argv:
            if process_rank() == 0:
                print(f"{inspect.getdoc(function) or ''}\n\n{usage(function)}")
            sys.exit(0)
        words, options = read_words(argv)
        function(**bind(function, words, options))
        code = 0
    except UserError as error:
        if isinstance(error, RankError) or process_rank() == 0:
            _say_error(str(error))
        code = error.exit_code
    except OSError as error:  # of a file that no other sentence is about
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
    if (reason := terminal.write_error()) and code == 0:
        _say_error(
            f"Cannot write all of the output: {reason}. Make room, or send it elsewhere."
        )
        code = RankError.exit_code
    # not sooner: the error holds frames, and in them what is still to be closed
    end_process(code)


def _say_error(sentence: str) -> None:
    print(f"error: {terminal.printable(sentence)}", file=sys.stderr, flush=True)


def answer_signals(importing: bool = False) -> None:
    """Let Ctrl-C, SIGTERM and a lost terminal (SIGHUP) end the process without a traceback.

    They unwind the command, so that it tidies up; a second Ctrl-C does not wait for that.
    A signal that is ignored, as SIGHUP under nohup, stays so. Of several ranks, SIGTERM
    and SIGHUP end each at once: one that waits for another would not wake up. importing:
    called before slow imports, Ctrl-C ends at once.
    """
    sys.unraisablehook = _report_ignored
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave if importing else _interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL and not importing and not _is_rank():
            signal.signal(number, _end)


def _interrupt(number: int, frame: types.FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _report_ignored(ignored: "sys.UnraisableHookArgs") -> None:
    """As Python does, but without a traceback of a Ctrl-C that came while an object was
    deleted."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)


def _end(number: int, frame: types.FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _leave(number: int, frame: types.FrameType | None) -> NoReturn:
    if process_rank() == 0:
        os.write(2, b"stopped.\n")
    os._exit(128 + number)


def _verb(commands: Verbs, argv: list[str]) -> Verb | Callable[..., Any]:
    """Take the first word off and return the verb that it names."""
    if not argv or argv[0] in ("--help", "-h"):
        lines = [f"  {name:14} {_summary(command)}" for name, command in commands.items()]
        print("\n".join(["verbs (each takes --help):", *lines]))
        sys.exit(0 if argv else 2)
    name = argv.pop(0)
    if name not in commands:
        raise UserError(f"there is no verb {name!r}: {nearest(name, commands)}")
    return commands[name]


def _summary(command: Verb | Callable[..., Any]) -> str:
    if isinstance(command, Verb):
        return command.summary
    return (inspect.getdoc(command) or "").splitlines()[0]


_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def process_rank() -> int:
    """This process's rank as its launcher says, before any process group exists."""
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), "0"))


def _is_rank() -> bool:
    """Whether a launcher started this process as one of several."""
    sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    return any(int(os.environ.get(name, "1")) > 1 for name in sizes)


def end_process(code: int) -> NoReturn:
    """End as Python does, but where there was a process group leave the interpreter standing.

    A thread of gloo's that waits for the interpreter while it is taken down aborts the
    process, whose work is done (https://github.com/pytorch/pytorch/issues/190489); the
    launcher then calls the run failed. gloo's threads cannot be joined: DeepSpeed keeps
    the group that owns them.
    """
    # not imported for this: it needs torch, which takes seconds
    ranks = sys.modules.get("flallm_ds.dist")
    # a profiler writes at the end
    if ranks is None or not ranks.was_started or sys.getprofile() is not None:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
