import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from flallm_ds.command import bind, coerce, nearest, read_words, usage
from flallm_ds.errors import UserError


def command(video: Path, *, model: Path, beams: int | None = None, fast: bool = False) -> None:
    """Translate."""


def open_ended(stage: str | None = None, **overrides: str) -> None:
    """Train."""


# --- words


@pytest.mark.parametrize(
    ("argv", "words", "options"),
    [
        (["a.mp4", "--model=m"], ["a.mp4"], {"model": "m"}),
        (["a.mp4", "--model", "m"], ["a.mp4"], {"model": "m"}),
        (["--optim.lr=3e-4", "--data.shards", "x"], [], {"optim.lr": "3e-4", "data.shards": "x"}),
        (["--run=2024_01"], [], {"run": "2024_01"}),  # plain fire makes the number 202401 of it
        (["--run=[1,2]", "--name=None"], [], {"run": "[1,2]", "name": "None"}),
        (["007"], ["007"], {}),
    ],
)
def test_words_and_options_stay_the_strings_that_were_typed(argv, words, options):
    assert read_words(argv) == (words, options)


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
    ],
)
def test_values_become_the_annotated_type(value, hint, expected):
    got = coerce(value, hint, "name")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "sentence"),
    [
        ("3.5", int, "--epochs must be a whole number, but is '3.5'"),
        ("fast", float, "--epochs must be a number, but is 'fast'"),
        ("maybe", bool, "--epochs must be true or false, but is 'maybe'"),
        ("huge", Literal["tiny", "base"], "--epochs must be one of tiny, base, but is 'huge'"),
        ("5", Literal[16, 8, 4], "--epochs must be one of 16, 8, 4, but is '5'"),
        ("a,b", tuple[float, ...], "--epochs must be a number, but is 'a'"),
        ("x", int | None, "--epochs must be a whole number, but is 'x'"),
        ("nan", float, "--epochs must be a number, but is 'nan'"),
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
    assert bind(command, [], {"video": "v", "model": "m"}) == {"video": Path("v"), "model": Path("m")}


def test_overrides_stay_strings():
    assert bind(open_ended, [], {"stage": "llm", "optim.lr": "1"}) == {"stage": "llm", "optim.lr": "1"}


@pytest.mark.parametrize(
    ("words", "options", "sentence"),
    [
        (["v"], {"model": "m", "beam": "3"}, "there is no option --beam: did you mean beams?"),
        (["v"], {"model": "m", "zzz": "3"}, "there is no option --zzz: valid: video, model, beams, fast."),
        (["v", "w"], {"model": "m"}, "'w' is one word too many"),
        (["v"], {}, "--model must be given. usage: VIDEO --model=... [--beams=None] [--fast=False]"),
        (["v"], {"video": "w", "model": "m"}, "--video must be given once, but was given twice"),
        (["v"], {"model": "m", "beams": "many"}, "--beams must be a whole number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(words, options, sentence):
    with pytest.raises(UserError) as caught:
        bind(command, words, options)
    assert sentence in str(caught.value)


def test_usage_shows_words_options_and_defaults():
    assert usage(open_ended) == "usage: [--stage=None] [--section.field=VALUE ...]"


def test_nearest_names_come_first():
    assert nearest("optm.lr", ["optim.lr", "optim.llm_lr", "data.shards"]).startswith("did you mean optim.lr")
    assert nearest("qqq", ["a", "b"]) == "valid: a, b."


# --- a whole process

SCRIPT = """
import sys
from flallm_ds.command import main
from flallm_ds.errors import Preempted, RankError, UserError

def train(steps: int = 1, fail: str = "") -> None:
    "Train for so many steps."
    print("ran", steps, flush=True)
    if fail:
        raise {"user": UserError, "rank": RankError, "stop": Preempted}[fail](f"{fail} says why.")

main({"train": train} if VERBS else train)
"""


def run(*argv: str, verbs: bool = False, **env: str) -> subprocess.CompletedProcess:
    import os

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
    assert done.stderr == "error: there is no option --step: did you mean steps?\n"


def test_the_option_that_the_deepspeed_launcher_adds_is_passed_over():
    done = run("--local_rank=1", "--steps=3")
    assert (done.returncode, done.stdout) == (0, "ran 3\n")


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
    assert listed.returncode == 0 and "train" in listed.stdout and "Train for so many steps." in listed.stdout
    assert wrong.returncode == 2 and "there is no verb 'trian': did you mean train?" in wrong.stderr
    assert right.stdout == "ran 2\n"


def test_help_shows_the_usage_without_running():
    done = run("--help")
    assert done.returncode == 0 and "usage: [--steps=1]" in done.stdout and "ran" not in done.stdout


def test_what_is_positional_only_is_no_option():
    def run(stop: bool = False, /, *, name: str = "a") -> None: ...

    assert bind(run, [], {"name": "b"}) == {"name": "b"}
    with pytest.raises(UserError, match="there is no option --stop: valid: name"):
        bind(run, [], {"stop": "true"})
    assert usage(run) == "usage: [--name=a]"


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


def test_a_thread_that_waits_for_the_interpreter_does_not_abort_a_run_that_is_done():
    done = subprocess.run([sys.executable, "-c", THREADS_THAT_WAIT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
