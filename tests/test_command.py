import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest

from flallm_ds.command import bind, coerce, nearest, read_words
from flallm_ds.command_help import usage
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve_both


def command(
    video: Path, *, model: Path, beams: int | None = None, fast: bool = False
) -> None:
    """Translate."""


def open_ended(stage: str | None = None, **overrides: str) -> None:
    """Train."""


def of_many(video: tuple[Path, ...] = (), *, model: Path, long: bool | None = None) -> None:
    """Translate."""


# --- words


@pytest.mark.parametrize(
    ("argv", "words", "options"),
    [
        (["a.mp4", "--model=m"], ["a.mp4"], {"model": "m"}),
        (["a.mp4", "--model", "m"], ["a.mp4"], {"model": "m"}),
        (
            ["--optim.lr=3e-4", "--data.shards", "x"],
            [],
            {"optim.lr": "3e-4", "data.shards": "x"},
        ),
        # plain fire makes the number 202401 of it
        (["--run=2024_01"], [], {"run": "2024_01"}),
        (["--run=[1,2]", "--name=None"], [], {"run": "[1,2]", "name": "None"}),
        (["007"], ["007"], {}),
        (["--keep-every=3"], [], {"keep_every": "3"}),
        (["--lr", "-1", "--by=-x"], [], {"lr": "-1", "by": "-x"}),
        (["-1"], ["-1"], {}),
        (["--a=b=c", "--b="], [], {"a": "b=c", "b": ""}),
        (["--a=two\nlines"], [], {"a": "two\nlines"}),
        (["a b", "--separator=x", "--args=1"], ["a b"], {"separator": "x", "args": "1"}),
    ],
)
def test_words_and_options_stay_the_strings_that_were_typed(argv, words, options):
    assert read_words(argv) == (words, options)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        # fire drops all that follows
        (["--", "--seed=7"], "got a '--' that stands alone"),
        (["--seed=7", "--"], "got a '--' that stands alone"),
        # fire opens Python's prompt
        (["--", "--interactive"], "got a '--' that stands alone"),
        (["--", "--trace"], "got a '--' that stands alone"),
        (["--", "--completion"], "got a '--' that stands alone"),
        # fire ends the call here and begins another
        (["-"], "got a '-' that stands alone"),
        (["--seed=7", "-", "--seed=8"], "got a '-' that stands alone"),
        (["--out", "-"], "got a '-' that stands alone"),
        (["-seed=7"], "must begin with two hyphens, --seed=7, got '-seed=7'"),
        (["-s"], "must begin with two hyphens, --s, got '-s'"),
        (["---seed=7"], "must begin with two hyphens, --seed=7, got '---seed=7'"),
        # an en dash
        (["\u2013seed=7"], r"must begin with two hyphens, --seed=7, got '\u2013seed=7'"),
        (
            ["\u2014stage", "llm"],
            r"must begin with two hyphens, --stage, got '\u2014stage'",
        ),
        (["-\u2010seed"], r"must begin with two hyphens, --seed, got '-\u2010seed'"),
        (["\u2212seed=1"], r"must begin with two hyphens, --seed=1, got '\u2212seed=1'"),
        (
            ["-aB.mp4"],
            "a file whose name begins with a hyphen: write --option=-aB.mp4 or ./-aB.mp4",
        ),
        (["--run", "-aB"], "must begin with two hyphens, --aB, got '-aB'"),
        (
            ["--seed=7", "--seed=8"],
            "--seed must be given once, got it twice: 7, then 8",
        ),
        (["--keep-every=7", "--keep_every", "8"], "--keep_every must be given once"),
        (["--run", "=x"], "--run must be written without spaces, --run=x, got '=x'"),
        (["--=7"], "Options must be written --name=value, got '--=7'"),
        (["--7=x"], "Options must be written --name=value, got '--7=x'"),
        (["--seed\u200b=7"], r"Options must be written --name=value, got '--seed\u200b=7'"),
        (["--seed\u00a07"], r"Options must be written --name=value, got '--seed\xa07'"),
        (["--seed:7"], "Options must be written --name=value, got '--seed:7'"),
    ],
)
def test_an_argument_that_is_neither_a_word_nor_an_option_is_refused(argv, sentence):
    with pytest.raises(UserError) as caught:
        read_words(argv)
    assert sentence in str(caught.value)


def test_an_option_without_a_value_is_true_or_refused():
    words, options = read_words(["v", "--model=m", "--fast"])
    assert bind(command, words, options)["fast"] is True
    for argv in (["--model"], ["--model", "--fast"], ["--fast", "--model"]):
        words, options = read_words(["v", *argv])
        with pytest.raises(UserError, match="--model must have a value, got none"):
            bind(command, words, options)
    with pytest.raises(UserError, match="there is no option --nofast; did you mean fast"):
        # fire makes fast=False of it
        bind(command, *read_words(["v", "--model=m", "--nofast"]))


@pytest.mark.parametrize(
    "name", ["optim.lr", "llm.name", "data.augment", "stage1.optim.lr", "run", "seed"]
)
@pytest.mark.parametrize("value", ["", "x --stage=llm", None])
def test_an_option_of_a_run_without_its_value_is_refused(name, value):
    """Also with the prefix of a stage, and with the empty value of an unset shell variable."""
    given = f"--{name}" if value is None else f"--{name}={value}"
    _, overrides = read_words([given])
    right = (
        name == "data.augment"
        if value is None
        else bool(value) and name in ("llm.name", "run")
    )
    with (
        nullcontext()
        if right
        else pytest.raises(UserError, match=f"--{name.removeprefix('stage1.')}")
    ):
        resolve_both("quickstart", overrides)


# --- values


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        ("3e-4", float, 3e-4),
        ("x", str, "x"),
        ("1", str, "1"),
        ("a/b", Path, Path("a/b")),
        ("True", bool, True),
        ("no", bool, False),
        ("none", int | None, None),
        ("5", int | None, 5),
        ("tiny", Literal["tiny", "base"], "tiny"),
        ("4", Literal[16, 8, 4], 4),
        ("0.9,0.98", tuple[float, ...], (0.9, 0.98)),
        ("(0.9, 0.98)", tuple[float, ...], (0.9, 0.98)),
        ("(0.9,)", tuple[float, ...], (0.9,)),
        ("", tuple[float, ...], ()),
        ("[]", tuple[str, ...], ()),
        ("/data/[a],b", tuple[str, ...], ("/data/[a]", "b")),
    ],
)
def test_values_become_the_annotated_type(value, hint, expected):
    got = coerce(value, hint, "name")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "sentence"),
    [
        ("3.5", int, "--epochs must be a whole number, got '3.5'"),
        ("fast", float, "--epochs must be a number, got 'fast'"),
        ("maybe", bool, "--epochs must be true or false, got 'maybe'"),
        (
            "huge",
            Literal["tiny", "base"],
            "--epochs must be one of tiny, base, got 'huge'",
        ),
        ("5", Literal[16, 8, 4], "--epochs must be one of 16, 8, 4, got '5'"),
        ("a,b", tuple[float, ...], "--epochs must be a number, got 'a'"),
        ("x", int | None, "--epochs must be a whole number, got 'x'"),
        ("nan", float, "--epochs must be a number, got 'nan'"),
        ("-inf", float, "--epochs must be a number, got '-inf'"),
        ("1e999", float, "--epochs must be a number, got '1e999'"),
        ("", Path, "--epochs must name a file or a folder, got an empty value"),
        ("", Path | None, "--epochs must name a file or a folder, got an empty value"),
        (
            "a,",
            tuple[str, ...],
            "--epochs must have a value before and after each comma, got 'a,'",
        ),
        (
            "a,,b",
            tuple[str, ...],
            "--epochs must have a value before and after each comma",
        ),
        (",", tuple[str, ...], "--epochs must have a value before and after each comma"),
    ],
)
def test_a_value_of_another_type_is_refused(value, hint, sentence):
    with pytest.raises(UserError) as caught:
        coerce(value, hint, "epochs")
    assert sentence in str(caught.value)


# --- binding


def test_arguments_are_bound_by_place_and_by_name():
    assert bind(command, ["v.mp4"], {"model": "m", "beams": "3", "fast": "yes"}) == {
        "video": Path("v.mp4"), "model": Path("m"), "beams": 3, "fast": True,
    }  # fmt: skip
    assert bind(command, [], {"video": "v", "model": "m"}) == {
        "video": Path("v"),
        "model": Path("m"),
    }


def test_a_tuple_takes_all_words_each_as_one_value():
    arguments = bind(of_many, ["a,b", "c"], {"model": "m"})
    assert arguments == {"video": (Path("a,b"), Path("c")), "model": Path("m")}
    assert bind(of_many, [], {"video": "a,b", "model": "m"})["video"] == (
        Path("a"),
        Path("b"),
    )
    assert bind(of_many, [], {"model": "m"}) == {"model": Path("m")}
    with pytest.raises(UserError, match="--video must name a file or a folder"):
        bind(of_many, ["a", ""], {"model": "m"})
    assert usage(of_many, "x") == "x [VIDEO ...] --model=PATH [OPTIONS]"


def test_an_optional_bool_may_stand_alone():
    words, options = read_words(["--model=m", "--long"])
    assert bind(of_many, words, options)["long"] is True
    assert bind(of_many, [], {"model": "m", "long": "false"})["long"] is False
    assert bind(of_many, [], {"model": "m", "long": "none"})["long"] is None


def test_overrides_stay_strings():
    assert bind(open_ended, [], {"stage": "llm", "optim.lr": "1"}) == {
        "stage": "llm",
        "optim.lr": "1",
    }


@pytest.mark.parametrize(
    ("words", "options", "sentence"),
    [
        (
            ["v"],
            {"model": "m", "beam": "3"},
            "Cannot set --beam: there is no option --beam; did you mean beams?",
        ),
        (
            ["v"],
            {"model": "m", "zzz": "3"},
            "there is no option --zzz; valid: video, model, beams, fast.",
        ),
        (["v", "w"], {"model": "m"}, "got 'w', one word too many"),
        (
            ["v"],
            {},
            "--model must be given, got nothing.\nUsage: flallm translate VIDEO --model=PATH [OPTIONS]",
        ),
        (
            ["v"],
            {"video": "w", "model": "m"},
            "--video must be given once, got it twice",
        ),
        (["v"], {"model": "m", "beams": "many"}, "--beams must be a whole number"),
    ],
)
def test_arguments_that_do_not_fit_the_signature_are_refused(words, options, sentence):
    with pytest.raises(UserError) as caught:
        bind(command, words, options, "flallm translate")
    assert sentence in str(caught.value)


def test_usage_shows_required_arguments_and_placeholders():
    assert usage(command, "x") == "x VIDEO --model=PATH [OPTIONS]"
    assert usage(open_ended, "x") == "x [OPTIONS] [--SECTION.OPTION=VALUE ...]"


def test_a_tuple_at_the_end_takes_all_words_that_are_left():
    def several(place: str, run: tuple[Path, ...], *, out: Path) -> None: ...

    expected = {"place": "p", "run": (Path("a"), Path("b")), "out": Path("o")}
    assert bind(several, ["p", "a", "b"], {"out": "o"}) == expected
    assert bind(several, ["p"], {"run": "a,b", "out": "o"}) == expected
    assert usage(several, "x") == "x PLACE RUN ... --out=PATH"
    with pytest.raises(UserError, match="RUN must be given"):
        bind(several, ["p"], {"out": "o"})


def test_nearest_names_come_first():
    assert nearest("optm.lr", ["optim.lr", "optim.llm_lr", "data.shards"]).startswith(
        "did you mean optim.lr"
    )
    assert nearest("qqq", ["a", "b"]) == "valid: a, b."
    assert nearest("SEED", ["train.seed", "speed"]) == "did you mean train.seed?"


# --- a whole process

SCRIPT = """
import sys
from flallm_ds.command import main
from flallm_ds.command_help import VerbTable
from flallm_ds.errors import Preempted, RankError, UserError

def train(steps: int = 1, fail: str = "") -> None:
    "Train for a number of steps."
    print("ran", steps, flush=True)
    if fail:
        raise {"user": UserError, "rank": RankError, "stop": Preempted}[fail](f"{fail} says why.")

main(VerbTable("Trains.", {"train": train}) if VERBS else train)
"""


def run(*argv: str, verbs: bool = False, **env: str) -> subprocess.CompletedProcess:
    code = f"VERBS = {verbs}\n{SCRIPT}"
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_mistyped_option_stops_the_command_before_it_runs():
    done = run("--step=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: Cannot set --step: there is no option --step; did you mean steps?\n"
    )


@pytest.mark.parametrize(
    "argv",
    [("--",), ("--", "--steps=3"), ("-",), ("--steps=1", "--steps=2"), ("3", "", "4")],
)
@pytest.mark.parametrize("launcher", [(), ("--local_rank=0",)])
def test_no_typed_argument_is_dropped(launcher, argv):
    done = run(*launcher, *argv)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, (
        done.stderr
    )


@pytest.mark.parametrize("added", ["--local_rank=1", "--local-rank=1"])
def test_the_option_that_a_launcher_adds_is_ignored(added):
    done = run(added, "--steps=3")
    assert (done.returncode, done.stdout) == (0, "ran 3\n")
    # these are typed
    for argv in (["--steps=3", added], ["--local_ranks=1"], ["--local_rank=x"]):
        assert run(*argv).returncode == 2


def test_an_error_of_the_user_is_one_sentence_on_rank_0_and_the_code_on_all():
    first, second = run("--fail=user"), run("--fail=user", RANK="1")
    assert (first.returncode, first.stderr) == (2, "error: user says why.\n")
    assert (second.returncode, second.stderr) == (2, "")


def test_an_error_of_one_rank_is_printed_by_that_rank():
    done = run("--fail=rank", RANK="1")
    assert (done.returncode, done.stderr) == (3, "error: rank says why.\n")


def test_a_preempted_run_asks_to_be_started_again():
    assert run("--fail=stop").returncode == 75


def test_verbs_are_listed_and_mistyped_ones_are_refused():
    listed, wrong, right = (
        run("--help", verbs=True),
        run("trian", verbs=True),
        run("train", "--steps=2", verbs=True),
    )
    assert (
        listed.returncode == 0
        and "train" in listed.stdout
        and "Train for a number of steps." in listed.stdout
    )
    assert (
        wrong.returncode == 2
        and "there is no verb 'trian'; did you mean train?" in wrong.stderr
    )
    assert right.stdout == "ran 2\n"


def test_help_shows_the_usage_without_running():
    done = run("--help")
    assert (
        done.returncode == 0
        and "usage: -c [OPTIONS]" in done.stdout
        and "--steps=N    (default 1)" in done.stdout
        and "ran" not in done.stdout
    )


def test_help_is_printed_by_one_rank():
    assert run("--help", RANK="1").stdout == ""


def test_a_positional_only_parameter_is_not_an_option():
    def run(stop: bool = False, /, *, name: str = "a") -> None: ...

    assert bind(run, [], {"name": "b"}) == {"name": "b"}
    with pytest.raises(UserError, match="there is no option --stop; valid: name"):
        bind(run, [], {"stop": "true"})
    assert usage(run, "x") == "x [OPTIONS]"


THREADS_THAT_WAIT = """
import sys, time
import torch
from flallm_ds import dist
from flallm_ds.command import main

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.2)  # lets other threads have the interpreter while it is taken down

late = Late()

def run() -> None:
    global group
    dist.start()
    group = torch.distributed.group.WORLD  # as DeepSpeed keeps it
    sys.setswitchinterval(100)
    work = torch.distributed.all_reduce(torch.ones(3), async_op=True)
    del work  # gloo's thread lets the tensor go, for which it needs the interpreter
    sum(range(10_000_000))
    print("ran")

main(run)
"""


def test_a_thread_that_waits_for_the_interpreter_does_not_abort_a_finished_run():
    done = subprocess.run(
        [sys.executable, "-c", THREADS_THAT_WAIT], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


# --- signals

WAITS = """
import sys, time
from flallm_ds.command import main
from flallm_ds.process import answer_signals

answer_signals(importing=True)
print("importing", flush=True)
sys.stdin.readline()

def work() -> None:
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)
        if STUBBORN:
            time.sleep(60)

main(work)
"""


def waiting(
    *, stubborn: bool = False, ignored: signal.Signals | None = None
) -> subprocess.Popen[str]:
    """Start a command and wait until it imports; it handles the signals that the tests ignore."""

    def set_signals() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # in the background, under nohup
            signal.signal(number, signal.SIG_DFL)
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    pipe = subprocess.PIPE
    code = f"STUBBORN = {stubborn}\n{WAITS}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=set_signals,
    )
    assert process.stdout.readline() == "importing\n"
    return process


def working(**given) -> subprocess.Popen[str]:
    process = waiting(**given)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "working\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what the process prints until it ends.

    `communicate` would lose what was read together with an earlier line.
    """
    process.stdin.close()
    said = process.stdout.read(), process.stderr.read()
    process.wait(60)
    return said


def test_ctrl_c_during_imports_is_one_line():
    process = waiting()
    process.send_signal(signal.SIGINT)
    out, error = end(process)
    assert (process.returncode, out, error) == (130, "", "stopped.\n")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "stopped.\n"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
    ],
)
def test_a_command_that_a_signal_ends_tidies_up(number, code, line):
    process = working()
    process.send_signal(number)
    out, error = end(process)
    assert (process.returncode, out, error) == (code, "tidied up\n", line)


def test_a_second_ctrl_c_does_not_wait():
    process = working(stubborn=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "tidied up\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == ("", "stopped.\n") and process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number):
    """nohup starts commands with SIGHUP ignored."""
    process = working(ignored=number)
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    end(process)
