"""Test that a run that is signalled or killed under the real launcher resumes, and ends
with the losses of an undisturbed run."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flallm_ds.training.stop import LOOK_EVERY_S
from tests.helpers.launching import command, environment, flags, losses, tiny_options
from tests.helpers.paths import ROOT

DEADLINE_S = 500


def options(corpus: Path, run: Path) -> list[str]:
    """25 steps of stage visual, a checkpoint every 5."""
    more = {"train.epochs": 5, "eval.every_epochs": 5, "train.save_every_steps": 5}
    return flags("visual", tiny_options(corpus, "visual", run, **more))


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command("launch/train.py", *arguments),
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes of the trainer, rank 0 first."""
    ranks: dict[str, psutil.Process] = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--local_rank"):
                ranks[argument] = process
    return [ranks[argument] for argument in sorted(ranks)]


def wait_for(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if reached():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {DEADLINE_S} s")


def wait_for_steps(run: Path, steps: int) -> None:
    path = run / "metrics.jsonl"
    wait_for(
        lambda: path.is_file() and path.read_text().count('"kind": "train"') >= steps,
        f"{steps} steps",
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(options(tiny_corpus, run), run.parent / "log").wait(DEADLINE_S) == 0
    return losses(run)


@pytest.fixture
def launchers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield a list of launchers, and end those that a failed test leaves running."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for launcher in started:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGKILL], ids=["signalled", "killed"]
)
def test_a_run_with_one_rank_signalled_or_killed_resumes(
    number: signal.Signals,
    undisturbed: list[float],
    tiny_corpus: Path,
    tmp_path: Path,
    launchers: list[subprocess.Popen[bytes]],
) -> None:
    """SIGUSR1 to rank 1 alone saves at the next step (code 75); after kill -9 the run
    resumes from the last checkpoint."""
    run = tmp_path / "run"
    launchers.append(start(options(tiny_corpus, run), tmp_path / "log"))
    wait_for_steps(run, 8)
    ranks_of(launchers[0])[1].send_signal(number)
    code = launchers[0].wait(DEADLINE_S)
    assert code != 0
    reached = [
        json.loads(line)["global_step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ][-1]
    assert 8 <= reached < len(undisturbed), (
        "the run must have been disturbed before its end"
    )
    if number == signal.SIGUSR1:
        assert code == 75
        assert (run / "checkpoints" / f"step-{reached:08d}").is_dir()
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert events.Scalars("train/loss")[-1].step == reached, (
            "the curve ends where the run does"
        )
    launchers.append(start(options(tiny_corpus, run), tmp_path / "log"))
    assert launchers[1].wait(DEADLINE_S) == 0, (tmp_path / "log").read_text()[-4000:]
    assert losses(run) == undisturbed


def test_ranks_whose_launcher_is_killed_stop_and_save(
    undisturbed: list[float],
    tiny_corpus: Path,
    tmp_path: Path,
    launchers: list[subprocess.Popen[bytes]],
) -> None:
    """The `deepspeed` command is killed at step 5, its node agent at step 14: neither
    forwards a signal, and the ranks would train forever."""
    run, log = tmp_path / "run", tmp_path / "log"
    for first, victim in ((5, "deepspeed"), (14, "deepspeed.launcher.launch")):
        launchers.append(start(options(tiny_corpus, run), log))
        wait_for(lambda: steps_of(run) >= first, f"{first} steps")  # noqa: B023
        ranks = ranks_of(launchers[-1])
        agents = {rank.parent() for rank in ranks} - {None}
        for process in [launchers[-1]] if victim == "deepspeed" else agents:
            process.kill()
        gone, alive = psutil.wait_procs([*ranks, *agents], timeout=60)
        assert not alive, log.read_text()[-4000:]
        reached = steps_of(run)
        assert first <= reached < len(undisturbed), (
            "the run must have been disturbed before its end"
        )
        assert (run / "checkpoints" / f"step-{reached:08d}").is_dir()
        said = log.read_text()
        assert f"the launcher {victim} has ended; stopping" in said
        assert f"Stopped after step {reached}. Run the same command again" in said
    launchers.append(start(options(tiny_corpus, run), log))
    assert launchers[-1].wait(DEADLINE_S) == 0, log.read_text()[-4000:]
    assert losses(run) == undisturbed


# A command without a model: it starts, it works, and it checks its request between two
# steps.
STEPS = """
import hashlib, signal, sys, time
from flallm_ds.command import main
from flallm_ds.errors import Preempted
from flallm_ds.training.stop import StopRequest

class Deleted:
    def __del__(self) -> None:
        print("deleting", flush=True)
        time.sleep(300)  # until a signal comes; a read might take the next line instead

def work() -> None:
    signal.alarm(300)  # a process that a failed test leaves behind
    stop = StopRequest()
    print("starting", flush=True)
    line = sys.stdin.readline()
    if line == "delete\\n":
        Deleted()
        line = sys.stdin.readline()
    if line == "begin\\n":
        stop.begin()
    print("begun", flush=True)
    while not stop:
        if sys.stdin.readline() == "long step\\n":
            print("long step", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # runs no handler of Python's
    raise Preempted("saved.")

main(work)
"""


class Steps:
    """parent: a script that starts the command and waits for it."""

    def __init__(
        self, ignored: signal.Signals | None = None, parent: Path | None = None
    ) -> None:
        def set_signals() -> None:
            # may be ignored where the tests run
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)

        place = [str(parent)] if parent else ["-c"]
        self.process = subprocess.Popen(
            [sys.executable, *place, STEPS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=set_signals,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline
        assert self.line() == "starting\n"

    def go(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def begin(self) -> None:
        self.go("begin")
        assert self.line() == "begun\n"

    def end(self) -> tuple[int, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        # not communicate, which forgets what came with an earlier line
        said = self.process.stdout.read()
        return self.process.wait(60), said


STOPPING = "stopping after this step, which is saved; press Ctrl-C again to end at once.\n"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1]
)
def test_a_run_that_has_begun_saves(number: signal.Signals) -> None:
    steps = Steps()
    steps.begin()
    steps.process.send_signal(number)
    code, said = steps.end()
    assert (code, said.replace(STOPPING, "")) == (75, "saved.\n")


# A signal comes just before the end: Python shuts down while the line about it is written.
ENDS_WHILE_IT_PRINTS = """
import io, os, signal, sys, time
from flallm_ds.training.stop import StopRequest

class Slow(io.FileIO):
    def write(self, content) -> int:
        time.sleep(2)
        return super().write(content)

sys.stdout = io.TextIOWrapper(io.BufferedWriter(Slow(1, "w")))
signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be ignored where the tests run
stop = StopRequest()
stop.begin()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.5)
sys.exit(0 if stop else 1)
"""


def test_a_run_that_ends_while_it_prints_that_it_stops_exits_cleanly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_IT_PRINTS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, STOPPING, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_before_the_first_step_ends_the_run_at_once(number: signal.Signals) -> None:
    steps = Steps()
    steps.process.send_signal(number)
    assert steps.end() == (128 + number, "stopped.\n")


def test_ctrl_c_during_a_deletion_ends_the_run_before_its_first_step() -> None:
    """Python ignores an exception that is raised in __del__."""
    steps = Steps()
    steps.go("delete")
    assert steps.line() == "deleting\n"
    steps.process.send_signal(signal.SIGINT)
    steps.go("begin")
    assert steps.end() == (130, "stopped.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_sigterm_before_the_first_step_stops_the_run_at_its_first_step(
    number: signal.Signals,
) -> None:
    steps = Steps()
    steps.process.send_signal(number)
    steps.begin()
    assert steps.end() == (75, "saved.\n")


def test_a_second_ctrl_c_ends_a_step_that_runs_no_signal_handler() -> None:
    steps = Steps()
    steps.begin()
    steps.go("long step")
    assert steps.line() == "long step\n"
    steps.process.send_signal(signal.SIGINT)
    assert steps.line() == STOPPING
    time.sleep(0.5)  # as a person does
    steps.process.send_signal(signal.SIGINT)
    assert steps.end() == (130, "stopped at once; everything saved before is kept.\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """SIGHUP under nohup, Ctrl-C in the background of a script."""
    steps = Steps(ignored=number)
    steps.process.send_signal(number)
    steps.begin()
    steps.process.send_signal(number)
    steps.go("next step")
    steps.process.send_signal(signal.SIGTERM)
    assert steps.end() == (75, "saved.\n")


PARENT = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", *sys.argv[1:]]))
"""


def steps_under(parent: Path) -> Steps:
    parent.write_text(PARENT)
    return Steps(parent=parent)


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_run_saves_when_its_launcher_is_killed(tmp_path: Path, name: str) -> None:
    steps = steps_under(tmp_path / name)
    steps.begin()
    steps.process.kill()
    assert steps.line() == (
        f"the launcher {name} has ended; stopping after this step, which is saved.\n"
    )
    steps.go("next step")
    assert steps.end()[1] == "saved.\n"


def test_a_run_ends_at_once_when_its_launcher_is_killed_before_the_first_step(
    tmp_path: Path,
) -> None:
    steps = steps_under(tmp_path / "deepspeed")
    steps.process.kill()
    assert steps.process.stdout is not None
    assert steps.process.stdout.read() == ("the launcher deepspeed has ended; stopped.\n")


def test_a_run_outlives_the_shell_or_script_that_started_it(tmp_path: Path) -> None:
    """`python launch/train.py &` in a shell that exits."""
    steps = steps_under(tmp_path / "start_all_runs.py")
    (run,) = psutil.Process(steps.process.pid).children()
    steps.begin()
    steps.process.kill()
    time.sleep(3 * LOOK_EVERY_S)
    steps.go("next step")
    run.send_signal(signal.SIGTERM)
    assert steps.end()[1] == "saved.\n"


class Terminal:
    """A terminal with a run under the real launcher in its foreground."""

    def __init__(self, arguments: list[str]) -> None:
        self._own, other = pty.openpty()
        os.set_blocking(self._own, False)
        self.said = ""

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            # may be ignored where the tests run
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)

        self.launcher = subprocess.Popen(
            command("launch/train.py", *arguments),
            cwd=ROOT,
            env=environment(),
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(other)

    def read(self) -> str:
        """Return all text printed so far; a run whose output is not read waits."""
        with suppress(BlockingIOError, OSError):  # nothing new; nobody writes any more
            while new := os.read(self._own, 65536):
                self.said += new.decode()
        return self.said

    def press_ctrl_c(self) -> None:
        os.write(self._own, b"\x03")

    def close(self) -> None:
        os.close(self._own)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.is_file() else 0


def test_ctrl_c_and_a_lost_terminal_save(
    undisturbed: list[float],
    tiny_corpus: Path,
    tmp_path: Path,
    launchers: list[subprocess.Popen[bytes]],
) -> None:
    """The ranks, the launcher and its agent get the signal at the same time; the launcher
    ends, and the ranks save."""
    run = tmp_path / "run"
    for first, disturb in ((5, Terminal.press_ctrl_c), (14, Terminal.close)):
        terminal = Terminal(options(tiny_corpus, run))
        launchers.append(terminal.launcher)
        wait_for(lambda: terminal.read() and steps_of(run) >= first, f"{first} steps")  # noqa: B023
        ranks = ranks_of(terminal.launcher)
        assert len(ranks) == 2
        disturb(terminal)
        gone, alive = psutil.wait_procs(ranks, timeout=120)
        assert not alive, terminal.said[-4000:]
        reached = steps_of(run)
        assert first <= reached < len(undisturbed), (
            "the run must have been disturbed before its end"
        )
        assert (run / "checkpoints" / f"step-{reached:08d}").is_dir()
        if disturb is Terminal.press_ctrl_c:
            said = terminal.read()
            terminal.close()
            assert STOPPING.strip() in said
            assert (
                f"Stopped after step {reached}. Run the same command again to resume"
                in said
            )
    launchers.append(start(options(tiny_corpus, run), tmp_path / "log"))
    assert launchers[-1].wait(DEADLINE_S) == 0, (tmp_path / "log").read_text()[-4000:]
    assert losses(run) == undisturbed


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGKILL], ids=["signalled", "killed"]
)
def test_a_run_stopped_during_scoring_keeps_its_steps(
    number: signal.Signals,
    tiny_corpus: Path,
    tmp_path: Path,
    launchers: list[subprocess.Popen[bytes]],
) -> None:
    """The steps of the epoch are kept, and the next start scores again."""
    run, log = tmp_path / "run", tmp_path / "log"
    more = {
        "train.epochs": 1,
        "train.log_every_s": 0.001,
        "data.batch_clips": 2,
        "data.micro_batches": 2,
        "eval.split": "train",
        "eval.num_beams": 5,
        "eval.max_new_tokens": 60,
    }
    arguments = flags("visual", tiny_options(tiny_corpus, "visual", run, **more))
    launchers.append(start(arguments, log))
    wait_for(
        lambda: log.is_file() and " clips/s" in log.read_text(), "progress of the scoring"
    )
    ranks_of(launchers[0])[1].send_signal(number)
    code = launchers[0].wait(DEADLINE_S)
    assert code == 75 if number == signal.SIGUSR1 else code != 0, log.read_text()[-4000:]
    assert ("stopped while clips were scored" in log.read_text()) == (
        number == signal.SIGUSR1
    )
    before = (run / "metrics.jsonl").read_text()
    assert "bleu4" not in before and not (run / "best").exists()
    launchers.append(start(arguments, log))
    assert launchers[1].wait(DEADLINE_S) == 0, log.read_text()[-4000:]
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(before), "no step may be made again"
    assert after.count('"bleu4"') == 1 and (run / "best").is_dir()
