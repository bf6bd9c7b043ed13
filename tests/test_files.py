"""The lock of what a command writes, against real processes."""

import errno
import fcntl
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.files import locked, locked_by_main
from tests.helpers.paths import ROOT

HOLD = """
import sys, time
from pathlib import Path
from flallm_ds.files import locked
with locked(Path(sys.argv[1]), "the run", "use another"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path/run/.lock until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"SLURM_JOB_ID": "4711", "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(path: Path) -> None:
    with locked(path, "Run folder run", "use another --run=FOLDER"):
        pass


def test_a_second_process_is_told_who_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    lock = tmp_path / "run" / ".lock"
    before = lock.read_bytes(), lock.stat().st_mtime_ns
    with pytest.raises(UserError) as caught:
        take(lock)
    said = f"process {holder.pid} on {socket.gethostname()} (SLURM job 4711) since 20"
    assert str(caught.value).startswith(f"Run folder run is in use by {said}")
    assert str(caught.value).endswith("Wait for it or end it, or use another --run=FOLDER.")
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before, "it must touch nothing"


def test_it_is_free_again_after_kill_9(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """What the dead one wrote into the file is no reason to refuse."""
    lock = tmp_path / "run" / ".lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert "4711" in lock.read_text()
    take(lock)
    assert not lock.exists()


def test_it_leaves_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.communicate("")
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == [], "the folder was made for the lock"
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="failed"), locked(tmp_path / "mine" / ".lock", "it", "wait"):
        raise ValueError("failed")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": 1}'])
def test_what_the_file_says_is_for_the_message_alone(
    tmp_path: Path, holder: subprocess.Popen[str], content: bytes
) -> None:
    lock = tmp_path / "run" / ".lock"
    lock.write_bytes(content)
    with pytest.raises(UserError, match="Run folder run is in use by another process"):
        take(lock)
    other = tmp_path / "other"
    other.write_bytes(content)
    take(other)


def test_a_file_system_without_flock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that merely exists would outlive kill -9."""

    def unsupported(fd: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UserError, match=r"has no flock .*or use another --run=FOLDER on another file system"):
        take(tmp_path / "run" / ".lock")


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    world = World(0, 1, 0, 1)
    with (
        pytest.raises(UserError, match=r"Cannot read or write .*file"),
        locked_by_main(tmp_path / "file" / ".lock", "it", "wait", world),
    ):
        pass
