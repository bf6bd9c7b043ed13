"""Tests of output: any encoding, no reader, full disk, control characters, progress."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from flallm_ds.terminal import printable

PRINTS = r"""
import os, sys
from flallm_ds.command import main

def say(text: str = "Gr\u00fc\u00dfe, \u4f60\u597d \u266a", lines: int = 1, fail: bool = False) -> None:
    for _ in range(lines):
        print(text)
        print(text, file=sys.stderr)
    with open(os.environ["PROOF"], "w") as file:
        file.write("reached the end")
    if fail:
        sys.exit(7)

main(say)
"""


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """Path of a file that exists after the command has reached its end."""
    return tmp_path / "proof"


def run(proof: Path, *argv: str, **more) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PROOF": str(proof), **more.pop("env", {})}
    command = [sys.executable, "-c", PRINTS, *argv]
    if "stdout" not in more:
        more["capture_output"] = True
    return subprocess.run(command, env=env, text=True, encoding="utf-8", timeout=60, **more)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"Gr\xfc\xdfe, \u4f60\u597d \u266a"),
        (
            {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
            r"Gr\xfc\xdfe, \u4f60\u597d \u266a",
        ),
        ({"PYTHONIOENCODING": "utf-8"}, "Grüße, 你好 ♪"),
    ],
)
def test_characters_that_an_encoding_lacks_are_escaped(proof, env, said):
    done = run(proof, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{said}\n", f"{said}\n")


def test_a_file_name_that_is_not_utf_8_is_printed(proof):
    """Python represents bytes that are not UTF-8 by surrogates, which cannot be encoded."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, b"--text=clip\xff.mp4"],
        env={**os.environ, "PROOF": str(proof), "PYTHONUTF8": "1"}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, rb"clip\udcff.mp4" + b"\n"), done.stderr


@pytest.mark.parametrize(("argv", "code"), [((), 0), (("--fail",), 7)])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_continues_without_a_reader(proof, argv, code, unbuffered):
    """As with `| head -1`. The exit code is that of its work."""
    reads, writes = os.pipe()
    os.close(reads)
    env = {"PYTHONUNBUFFERED": unbuffered}
    done = run(proof, "--lines=5000", *argv, stdout=writes, stderr=subprocess.PIPE, env=env)
    os.close(writes)
    assert done.returncode == code and proof.is_file()
    assert done.stderr.count("\n") == 5000 and "Error" not in done.stderr, done.stderr[
        -2000:
    ]


@pytest.mark.parametrize("argv", [["--help"], ["--no_such=1"]])
def test_help_and_errors_do_not_need_a_reader(proof, argv):
    reads, writes = os.pipe()
    os.close(reads)
    done = run(proof, *argv, stdout=writes, stderr=writes)
    os.close(writes)
    assert done.returncode == (0 if argv == ["--help"] else 2)


def test_a_command_continues_after_its_terminal_is_closed(proof):
    own, other = pty.openpty()
    os.close(own)
    assert (
        run(proof, "--lines=5000", stdout=other, stderr=other).returncode == 0
        and proof.is_file()
    )
    os.close(other)


def test_a_command_runs_without_stdout_and_stderr(proof):
    command = [sys.executable, "-c", PRINTS]
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command],
        env={**os.environ, "PROOF": str(proof)}, timeout=60,
    )  # fmt: skip
    assert closed.returncode == 0 and proof.read_text() == "reached the end"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_lost_output_on_a_full_disk_is_an_error(proof):
    with open("/dev/full", "w") as full:
        done = run(proof, stdout=full, stderr=subprocess.PIPE)
    sentence = "error: Cannot write all of the output: No space left on device. Make room"
    assert done.returncode == 3 and sentence in done.stderr and proof.is_file()
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


# --- control characters

STEERING = "a\x1b[31mred\x07\x08\x9b2J\u202egnp.exe\u2066x\u2028y\rz\x7f"


def test_control_characters_are_escaped():
    assert printable(STEERING) == (
        r"a\x1b[31mred\x07\x08\x9b2J\u202egnp.exe\u2066x\u2028y\rz\x7f"
    )
    text = "Grüße,\t你好 שלום ♪ 👋🏽\n"
    assert printable(text) == text


def test_a_text_cannot_control_the_terminal(proof):
    done = run(proof, f"--text={STEERING}")
    assert done.stdout == printable(STEERING) + "\n"
    done = run(proof, "--no_such=1", f"--{STEERING}")
    assert done.returncode == 2 and printable(done.stderr) == done.stderr
    done = run(proof, f"--fail={STEERING}")
    assert done.returncode == 2 and printable(done.stderr) == done.stderr


# --- progress

BAR = """
import sys, time
from flallm_ds import terminal
from flallm_ds.command import main

def work() -> None:
    terminal.LOG_EVERY_S = 0.0
    with terminal.progress(3, "build") as bar:
        for _ in range(3):
            bar.update(1)
            time.sleep(0.3)
    from transformers.utils import logging
    for _ in logging.tqdm(range(3), desc="weights"):
        pass

main(work)
"""


def test_progress_in_a_log_file_is_printed_as_lines():
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, timeout=120)
    assert done.returncode == 0 and b"\r" not in done.stderr and b"\x1b" not in done.stderr
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 4 and all(" clips/s " in line for line in lines), lines
    assert lines[1].startswith("build: 2/3 clips ") and " left 0:0" in lines[1]
    assert lines[3].startswith("build: 3/3 clips ") and "left" not in lines[3]


@pytest.mark.parametrize(
    ("term", "columns"), [("xterm", 80), ("xterm", 20), ("xterm", 0), ("dumb", 80)]
)
def test_progress_on_a_terminal_is_a_bar_if_the_terminal_can_update_it(term, columns):
    own, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", BAR], stderr=other, env={**os.environ, "TERM": term}
    )
    os.close(other)
    said = b""
    try:
        while new := os.read(own, 65536):
            said += new
    except OSError:  # all is read
        pass
    os.close(own)
    bars = said.replace(b"\r\n", b"\n").split(b"\r")
    assert done.returncode == 0 and (len(bars) > 2) == (term != "dumb"), said
    if term != "dumb" and columns:
        assert (
            max(
                len(line.decode().rstrip("\n")) for bar in bars for line in bar.splitlines()
            )
            <= columns
        )
