"""How every command line of the project is read: words by fire, names and types checked by us, then the call.

fire alone runs a function with its defaults before it complains about a mistyped flag, and guesses values
(`2024_01` becomes 202401). Here fire only collects the words as strings; a function is called once every
name is known and every value is of the annotated type.
"""

import atexit
import difflib
import inspect
import os
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import fire

from flallm_ds.errors import Preempted, RankError, UserError


def read_words(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(positional words, options) of a command line, all strings; `--a.b=1` and `--a.b 1` both work."""
    words: list[str] = []
    options: dict[str, str] = {}

    @fire.decorators.SetParseFn(str)  # type: ignore[untyped-decorator]
    def collect(*args: str, **kwargs: str) -> None:
        words.extend(args)
        options.update(kwargs)

    fire.Fire(collect, command=argv)
    return words, options


def nearest(name: str, valid: Iterable[str]) -> str:
    """`Did you mean …?` with the closest valid names, or the list of all where nothing is close."""
    valid = list(valid)
    close = [v for v in valid if v.endswith(f".{name}")]  # the section was left out
    close = close or difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}."


def coerce(value: str, hint: Any, name: str) -> Any:
    """`value` as the annotated type (bool, int, float, str, Path, a Literal, `X | None`, tuple of X).

    Raises UserError that names the option, the type it must have, and what came.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value.lower() in ("none", "null") and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is typing.Literal:
        found = next((choice for choice in args if str(choice) == value), None)
        if found is None:
            raise UserError(f"--{name} must be one of {', '.join(map(str, args))}, but is {value!r}.")
        return found
    if origin is tuple:
        return tuple(
            coerce(part.strip(), args[0], name) for part in value.strip("()[]").split(",") if part.strip()
        )
    if hint is bool:
        lowered = value.lower()
        if lowered not in ("true", "false", "1", "0", "yes", "no"):
            raise UserError(f"--{name} must be true or false, but is {value!r}.")
        return lowered in ("true", "1", "yes")
    if hint in (int, float):
        try:
            number = hint(value)
            if number != number:
                raise ValueError("not a number")
            return number
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"--{name} must be {kind}, but is {value!r}.") from None
    return Path(value) if hint is Path else value


def bind(function: Callable[..., Any], words: list[str], options: Mapping[str, str]) -> dict[str, Any]:
    """Arguments for `function` from words and options; raises UserError where they do not fit its signature.

    A function that takes **overrides receives the options it does not name as they came (strings). What is
    positional-only is for callers in Python.
    """
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    positional = [n for n, p in named.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(words) > len(positional):
        raise UserError(f"{words[len(positional)]!r} is one word too many: options are written --name=value.")
    arguments: dict[str, Any] = {}
    for name, word in zip(positional, words, strict=False):
        arguments[name] = coerce(word, hints[name], name)
    for name, value in options.items():
        if name in arguments:
            raise UserError(f"--{name} must be given once, but was given twice.")
        if name in named:
            arguments[name] = coerce(value, hints[name], name)
        elif open_ended:
            arguments[name] = value
        else:
            raise UserError(f"there is no option --{name}: {nearest(name, named)}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"--{missing[0]} must be given. {usage(function)}")
    return arguments


def usage(function: Callable[..., Any]) -> str:
    parts = []
    for name, p in inspect.signature(function).parameters.items():
        if p.kind == p.POSITIONAL_ONLY:
            continue
        if p.kind == p.VAR_KEYWORD:
            parts.append("[--section.field=VALUE ...]")
        elif p.default is p.empty:
            parts.append(f"{name.upper()}" if p.kind == p.POSITIONAL_OR_KEYWORD else f"--{name}=...")
        else:
            parts.append(f"[--{name}={p.default}]")
    return f"usage: {' '.join(parts)}"


def main(command: Callable[..., Any] | Mapping[str, Callable[..., Any]]) -> NoReturn:
    """Run a function, or one verb of several, with the process's arguments, and exit with its code.

    UserError is printed as one sentence (exit code 2), never as a traceback.
    """
    argv = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    try:
        function = command if callable(command) else _verb(command, argv)
        if "--help" in argv or "-h" in argv:
            print(f"{inspect.getdoc(function) or ''}\n\n{usage(function)}")
            sys.exit(0)
        words, options = read_words(argv)
        function(**bind(function, words, options))
        code = 0
    except UserError as error:
        if isinstance(error, RankError) or process_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Preempted as stop:
        if process_rank() == 0:
            print(str(stop), flush=True)
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    end_process(code)  # not sooner: the error holds frames, and in them what is still to be closed


def _verb(commands: Mapping[str, Callable[..., Any]], argv: list[str]) -> Callable[..., Any]:
    if not argv or argv[0] in ("--help", "-h"):
        lines = [f"  {name:14} {(inspect.getdoc(f) or '').splitlines()[0]}" for name, f in commands.items()]
        print("\n".join(["verbs (each takes --help):", *lines]))
        sys.exit(0 if argv else 2)
    verb = argv.pop(0)
    if verb not in commands:
        raise UserError(f"there is no verb {verb!r}: {nearest(verb, commands)}")
    return commands[verb]


def process_rank() -> int:
    """This process's rank as its launcher says, before any process group exists."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def end_process(code: int) -> NoReturn:
    """End as Python does, but where there was a process group leave the interpreter standing.

    A thread of gloo's that waits for the interpreter while it is taken down aborts the process, whose work is
    done (https://github.com/pytorch/pytorch/issues/190489); the launcher then calls the run failed. gloo's
    threads cannot be joined: DeepSpeed keeps the group that owns them.
    """
    ranks = sys.modules.get("flallm_ds.dist")  # not imported for this: it needs torch, which takes seconds
    if ranks is None or not ranks.was_started or sys.getprofile() is not None:  # a profiler writes at the end
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
