"""Build the operators of DeepSpeed that are compiled at their first use: once per machine.

They are built in a folder of this machine before the ranks meet, because a home folder on
a network disk is slow and is shared by machines with other processors. torch's lock of a
build contains no process, and torch waits for it without a limit. So a build here also
holds a flock, and a lock of torch that no process has open is that of a killed build.
"""

import os
import platform
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch

from flallm_ds.errors import RankError, UserError, file_problem
from flallm_ds.files import take_lock
from flallm_ds.local_disk import own_folder, own_path, temporary_folder

VARIABLE = "TORCH_EXTENSIONS_DIR"
POLL_S = 0.5
# pip installs ninja next to Python, which need not be in PATH.
PROGRAMS = Path(sys.executable).parent


def set_folder(env: MutableMapping[str, str] = os.environ) -> Path:
    """Return the folder of compiled operators; set TORCH_EXTENSIONS_DIR unless the user did.

    Every rank must call it before it loads an operator: also adds ninja to PATH.

    The default is private to the user and to this machine, and its name has the versions
    that a compiled operator depends on. Raises UserError or OSError if it cannot be used.
    """
    if not env.get(VARIABLE):
        # TMPDIR may be on a network disk, so the name of the machine is needed.
        name = (
            f"{platform.node()}-python{platform.python_version()}-torch"
            f"{torch.__version__}-deepspeed{metadata.version('deepspeed')}"
        )
        own = own_folder(temporary_folder(env))
        env[VARIABLE] = str(own / "torch_extensions" / name)
    # torch calls ninja to load an operator, too, and looks for it in PATH only.
    if shutil.which("ninja", path=env.get("PATH", "")) is None:
        env["PATH"] = f"{env.get('PATH', '')}:{PROGRAMS}"
    return Path(env[VARIABLE])


def build(names: Iterable[str], load: Callable[[str], None]) -> None:
    """Build operators that this machine lacks; call it on one rank per machine.

    load: builds an operator if necessary, and loads it. Raises RankError if an operator
    cannot be built, because only this machine may have the problem.
    """
    host = socket.gethostname()
    try:
        folder = set_folder()
        is_ours = folder.is_relative_to(own_path(temporary_folder(os.environ)))
        with _only_build(folder):
            for name in names:
                wait_for_lock(folder / name / "lock", remove=is_ours)
                _build(name, load, folder, host)
    except UserError as error:
        raise RankError(f"{error} (On {host}.)") from error
    except OSError as error:
        raise RankError(f"{file_problem(error)} (On {host}.)") from error


def _build(name: str, load: Callable[[str], None], folder: Path, host: str) -> None:
    """Load an operator, with lines of progress if it must be built."""
    is_built = any((folder / name).glob("*.so"))
    if not is_built:
        problem = compiler_problem(os.environ)
        if problem is not None:
            raise UserError(f"Cannot build {name} of DeepSpeed: {problem}.")
        print(
            f"building {name} of DeepSpeed on {host}, once, in {folder / name} (1 to 3 "
            "minutes)",
            flush=True,
        )
    began = time.monotonic()
    try:
        load(name)
    # ImportError: a library that does not fit this machine. RuntimeError: of the compiler.
    except (RuntimeError, ImportError) as error:
        raise UserError(
            f"Cannot build {name} of DeepSpeed in {folder / name}: {_reason(error)}. Fix "
            "this, delete that folder, and run the same command again; or use a DeepSpeed "
            "JSON without offload."
        ) from error
    if not is_built:
        print(f"built {name} in {time.monotonic() - began:.0f} s", flush=True)


def _reason(error: Exception) -> str:
    """Return what DeepSpeed lacks, or the line of a compiler's output that says it."""
    if "JIT load the async_io op due to it not being compatible" in str(error):
        return "libaio or its headers are missing; install libaio-dev"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    for sign in ("No space left on device", "error:", "Error"):
        # The first line of torch's error only names the operator.
        found = [line for line in lines[1:] if sign in line]
        if found:
            return found[0].strip().rstrip(".")
    return lines[-1].strip().rstrip(".")


def compiler_problem(env: Mapping[str, str]) -> str | None:
    """Return what is missing to compile C++ for Python, and the remedy; None if nothing is."""
    compiler = env.get("CXX") or "c++"
    if shutil.which(compiler.split()[0], path=env.get("PATH")) is None:
        return f"there is no C++ compiler {compiler}. Install g++, or load its module"
    if shutil.which("ninja", path=f"{env.get('PATH', '')}:{PROGRAMS}") is None:
        return "there is no ninja. Run pip install ninja"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"there is no {header}. Install the headers of Python (python3-dev)"
    return None


@contextmanager
def _only_build(folder: Path) -> Iterator[None]:
    """Wait until no other run builds in this folder, and hold its lock for a block.

    The kernel releases the lock when its process ends.
    """
    path = folder / "flallm_ds.lock"
    is_told = False
    try:
        while (lock := take_lock(path)) is None:
            if not is_told:
                print(f"waiting for another run that builds in {folder}", flush=True)
                is_told = True
            time.sleep(POLL_S)
    except OSError as error:
        if error.filename is not None:
            raise  # the file cannot be opened
        raise UserError(
            f"Cannot lock {path}: its file system has no flock ({error.strerror}). Set "
            f"{VARIABLE} to a folder on another disk."
        ) from error
    try:
        yield
    finally:
        lock.release()


def wait_for_lock(lock: Path, remove: bool) -> None:
    """Wait until no process holds torch's lock of a build.

    A lock that no process has open is that of a killed build. remove: remove it, because
    no other machine uses the folder; otherwise raise UserError.
    """
    while lock.exists():
        if is_open(lock):
            time.sleep(POLL_S)
            continue
        if not lock.exists():  # released meanwhile
            return
        if not remove:
            raise UserError(
                f"Cannot build operators of DeepSpeed: {lock} was left by a build that no "
                f"process of {socket.gethostname()} runs. Delete it, unless another machine "
                "is building there."
            )
        lock.unlink(missing_ok=True)
        print(f"removed {lock}, which a killed build left", flush=True)


def is_open(path: Path) -> bool:
    """Return whether a process of this machine has a file open.

    Processes of other users cannot be seen.
    """
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return False
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        # A process may end, or belong to another user.
        with suppress(OSError):
            found = handle.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
