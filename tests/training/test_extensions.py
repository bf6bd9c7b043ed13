"""Builds of operators: private folder, locks of dead and living builds, failures."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flallm_ds.errors import RankError, UserError
from flallm_ds.training import extensions
from flallm_ds.training.deepspeed_json import operators
from flallm_ds.training.extensions import build, compiler_problem, set_folder, wait_for_lock
from tests.helpers.launching import environment, kill_session
from tests.helpers.paths import ROOT

# Builds a library of one function with the compiler and the lock that DeepSpeed uses.
SCRIPT = """
import sys
from torch.utils.cpp_extension import load
from flallm_ds.command import main
from flallm_ds.training.extensions import build

source = sys.argv.pop()
main(lambda: build(["toy"], lambda name: load(name, [source], is_python_module=False)))
"""
SLOW = """#!/bin/sh
case "$*" in *" -c "*) sleep 600;; esac
exec c++ "$@"
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, and no folder for extensions from the user."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    return tmp_path


def own(temporary: Path) -> Path:
    return temporary / f"flallm_ds-{os.getuid()}"


def start(source: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source)],
        cwd=ROOT,
        env=environment() | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.fixture
def killed_build(temporary: Path) -> Iterator[Path]:
    """The folder of a build that kill -9 ended while it compiled; yields its lock."""
    compiler = temporary / "slow"
    compiler.write_text(SLOW)
    compiler.chmod(0o755)
    source = temporary / "toy.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    process = start(source, CXX=str(compiler))
    try:
        locks: list[Path] = []
        deadline = time.monotonic() + 120
        while not locks and time.monotonic() < deadline and process.poll() is None:
            locks = list(own(temporary).glob("torch_extensions/*/toy/lock"))
            time.sleep(0.05)
        (lock,) = locks
        assert extensions.is_open(lock)
        process.kill()
        process.wait()
        yield lock
    finally:
        kill_session(process.pid)  # ninja starts each compiler in a group of its own
        process.communicate()


def test_the_next_build_does_not_wait_for_the_lock_of_a_killed_one(
    killed_build: Path, temporary: Path
) -> None:
    assert killed_build.exists() and not extensions.is_open(killed_build)
    process = start(temporary / "toy.cpp")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"removed {killed_build}, which a killed build left\nbuilding toy" in output
    assert "once, in" in output and "built toy in" in output
    assert list(killed_build.parent.glob("*.so")) and not killed_build.exists()


def test_a_lock_of_a_living_process_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen(["sleep", "600"], stdin=lock.open("a"))
    waiting = threading.Thread(target=wait_for_lock, args=(lock, True))
    try:
        waiting.start()
        waiting.join(timeout=2)
        assert waiting.is_alive() and lock.exists()
    finally:
        holder.kill()
        holder.wait()
    waiting.join(timeout=60)
    assert not waiting.is_alive() and not lock.exists()


def test_a_dead_lock_in_a_folder_that_the_user_named_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may be building there."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(temporary / "shared"))
    lock = temporary / "shared" / "toy" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with pytest.raises(RankError, match=r"Cannot build .*toy/lock was left .* Delete it"):
        build(["toy"], lambda name: None)
    lock.unlink()
    loaded: list[str] = []
    build(["toy"], loaded.append)
    assert loaded == ["toy"] and not own(temporary).exists()


def test_the_default_folder_is_private_and_named_after_versions(temporary: Path) -> None:
    env = {"TMPDIR": str(temporary)}
    folder = set_folder(env)
    assert env["TORCH_EXTENSIONS_DIR"] == str(folder)
    assert folder.is_relative_to(own(temporary) / "torch_extensions")
    assert "-torch2." in folder.name and "-deepspeed" in folder.name
    assert own(temporary).stat().st_mode & 0o777 == 0o700
    assert set_folder({"TORCH_EXTENSIONS_DIR": "mine"}) == Path("mine")


@pytest.mark.parametrize("kind", ["writable", "link"])
def test_a_folder_that_another_user_may_have_made_is_refused(
    temporary: Path, kind: str
) -> None:
    """It could contain libraries that this process would load."""
    if kind == "link":
        (temporary / "elsewhere").mkdir()
        own(temporary).symlink_to(temporary / "elsewhere")
    else:
        own(temporary).mkdir()
        own(temporary).chmod(0o777)
    with pytest.raises(UserError, match="must be a folder of this user that nobody else"):
        set_folder({"TMPDIR": str(temporary)})


def test_the_error_of_a_compiler_is_one_sentence(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.cpp_extension import load

    source = temporary / "broken.cpp"
    source.write_text("int one() { return nothing; }\n")
    with pytest.raises(RankError) as caught:
        build(["broken"], lambda name: load(name, [str(source)], is_python_module=False))
    assert "broken.cpp:1:20: error: 'nothing' was not declared" in ascii_of(caught.value)
    assert "\n" not in str(caught.value) and "(On " in str(caught.value)
    assert "building broken of DeepSpeed on" in capsys.readouterr().out


def ascii_of(error: Exception) -> str:
    """The text of an error, in which a compiler may use typographic quotes."""
    return str(error).replace("\u2018", "'").replace("\u2019", "'")


def test_a_full_disk_is_one_sentence(
    temporary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from torch.utils.cpp_extension import load

    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        source = temporary / "large.cpp"
        source.write_text("char many[1 << 20] = {1};\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(disk))
            patch.setenv("CXX", "env TMPDIR=/tmp c++")  # of the compiler's own files
            with pytest.raises(RankError, match="No space left on device") as caught:
                build(
                    ["large"],
                    lambda name: load(name, [str(source)], is_python_module=False),
                )
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("Cannot build large of DeepSpeed in")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_missing_compiler_is_named_before_the_build(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RankError, match=r"no C\+\+ compiler no-such-compiler\. Install g"):
        build(["toy"], lambda name: None)
    monkeypatch.delenv("CXX")
    assert compiler_problem(os.environ) is None


def test_offload_to_nvme_without_libaio_names_its_package(temporary: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from flallm_ds.training.engine import load_operator

    if AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is installed")
    with pytest.raises(RankError, match="libaio or its headers are missing; install lib"):
        build(["async_io"], load_operator)


def test_the_ninja_next_to_python_is_found_without_an_active_environment(
    temporary: Path,
) -> None:
    """srun starts .venv/bin/python with the PATH of the system."""
    env = {"TMPDIR": str(temporary), "PATH": str(temporary)}
    set_folder(env)
    assert env["PATH"] == f"{temporary}:{Path(sys.executable).parent}"
    set_folder(env)
    assert env["PATH"].count(":") == 1


OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}


@pytest.mark.parametrize(
    ("config", "optimizer", "found"),
    [
        ({}, "adamw", []),
        (OFFLOAD, "adamw", ["cpu_adam"]),
        (OFFLOAD, "sgd", []),
        (NVME, "adamw", ["async_io"]),
    ],
)
def test_only_operators_that_a_run_uses_are_built(
    monkeypatch: pytest.MonkeyPatch, config: dict, optimizer: str, found: list[str]
) -> None:
    assert operators(config, optimizer) == []  # on a CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert operators(config, optimizer) == found
