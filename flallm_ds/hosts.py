"""Check the hosts of a hostfile before the `deepspeed` launcher needs them.

The launcher tries the first host alone, waits minutes for one that does not answer, and
then prints a traceback. Needs no torch.
"""

import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from flallm_ds.errors import UserError, require

# As the launcher reads it: the name, then the number of GPUs.
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
# Names that ssh would take for an option, or a shell for more than a name.
_HOST = re.compile(r"[A-Za-z0-9_][\w.:@%-]*", re.ASCII)
_SSH_PORT = 22


def check_hostfile(path: Path, timeout_s: float = 10.0) -> dict[str, int]:
    """Return the number of GPUs of each host, after every host has answered.

    With several hosts, each one must let ssh in without a password, and ssh and pdsh must
    be installed here, as the launcher needs them. Hosts are tried at the same time. Raises
    UserError for a wrong line, for a missing program, and for hosts that do not answer in
    time.
    """
    require(timeout_s > 0, f"--timeout_s must be above 0, got {timeout_s}.")
    hosts = read_hostfile(path)
    # The launcher starts a single host without ssh.
    if len(hosts) == 1:
        return hosts
    reach = _log_in if shutil.which("ssh") is not None else _connect
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        answers = list(pool.map(reach, hosts, repeat(timeout_s)))
    problems: list[str] = []
    for host, problem in zip(hosts, answers, strict=True):
        if problem is not None:
            problems.append(f"{host} ({problem})")
    if problems:
        raise UserError(
            f"Cannot reach {len(problems)} of {len(hosts)} hosts of {path}: "
            f"{', '.join(problems)}. Check that `ssh HOST` works without a password, or "
            "remove the line."
        )
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise UserError(
                f"Cannot start on the hosts of {path}: {program} is not installed here, and "
                "the deepspeed launcher needs it. Install it, or use SLURM or torchrun."
            )
    return hosts


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of GPUs (slots) of each host. Raises UserError for a wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the hostfile {path}: {error}. Check --hostfile."
        ) from error
    hosts: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        place = f"Line {number} of {path}"
        found = _LINE.fullmatch(line)
        if found is None or not _HOST.fullmatch(found["host"]) or int(found["slots"]) < 1:
            raise UserError(
                f"{place} must be HOST slots=GPUS, such as node1 slots=8, got {line!r}."
            )
        host = found["host"]
        require(
            host not in hosts,
            f"{place} must name another host than the lines before, got {host} again.",
        )
        hosts[host] = int(found["slots"])
    require(bool(hosts), f"{path} must have a line HOST slots=GPUS, got none.")
    return hosts


def _log_in(host: str, timeout_s: float) -> str | None:
    """Return why ssh cannot log in to a host without a password; None if it can."""
    # BatchMode never asks. ConnectTimeout does not limit the log-in itself.
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(timeout_s))}")
    try:
        done = subprocess.run(
            ["ssh", *options, host, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {2 * timeout_s:g} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"ssh ended with {done.returncode}"


def _connect(host: str, timeout_s: float) -> str | None:
    """Return why the port of ssh of a host cannot be reached; None if it can."""
    try:
        # USER@HOST is a name of ssh.
        name = host.rpartition("@")[2]
        socket.create_connection((name, _SSH_PORT), timeout=timeout_s).close()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return f"port {_SSH_PORT}: {error.strerror or error}"
    return None
