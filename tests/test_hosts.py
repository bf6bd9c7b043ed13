import os
import time
from pathlib import Path

import pytest

from flallm_ds.errors import UserError
from flallm_ds.hosts import check_hostfile, read_hostfile
from tests.helpers.early import flallm

# 192.0.2.0/24 is reserved for documentation: nothing answers there.
UNREACHABLE = "192.0.2.1"


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_the_launcher_reads_it(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# nodes\nnode1 slots=8\n\nuser@node-2.x\tslots=4  # half\n")
    assert read_hostfile(path) == {"node1": 8, "user@node-2.x": 4}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "a slots=8\nb slot=8\n",
            r"Line 2 of \S+ must be HOST slots=GPUS.* got 'b slot=8'",
        ),
        ("a slots=0\n", r"Line 1 of \S+ must be HOST slots=GPUS"),
        ("-oProxyCommand=id slots=1\n", r"Line 1 of \S+ must be HOST slots=GPUS"),
        (
            "a slots=1\n#\na slots=2\n",
            r"Line 3 of \S+ must name another host .*got a again",
        ),
        ("# nothing\n", "must have a line HOST slots=GPUS, got none"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_hostfile(hostfile(tmp_path, text))


def test_a_missing_hostfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the hostfile"):
        read_hostfile(tmp_path / "no")


def test_a_single_host_needs_no_ssh(tmp_path: Path) -> None:
    assert check_hostfile(hostfile(tmp_path, f"{UNREACHABLE} slots=2"), 0.1)


@pytest.mark.parametrize("has_ssh", [True, False])
def test_hosts_that_do_not_answer_end_the_command_with_one_sentence(
    tmp_path: Path, has_ssh: bool
) -> None:
    """127.0.0.99 is this machine: without a server on the port of ssh, it refuses."""
    path = hostfile(tmp_path, f"{UNREACHABLE} slots=8\n127.0.0.99 slots=8\n")
    found = os.environ["PATH"] if has_ssh else str(tmp_path)
    begun_s = time.monotonic()
    done = flallm("hosts", path, "--timeout_s=1", PATH=found)
    assert time.monotonic() - begun_s < 60, "the launcher alone waits for minutes"
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"Cannot reach 2 of 2 hosts of {path}: {UNREACHABLE} (" in done.stderr
    assert "127.0.0.99 (" in done.stderr
