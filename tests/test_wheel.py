"""An installed wheel is complete: it trains outside the checkout, without the checkout on
its path."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from flallm_ds import __version__
from flallm_ds.cli import FLALLM
from flallm_ds.dist import free_port
from tests.helpers.launching import losses, tiny_options
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that nothing else of the checkout gets
    into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (
        "flallm_ds",
        "ds_configs",
        "launch",
        "shards",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        more = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")}
        copy(
            ROOT / name,
            folder / "source" / name,
            **(more if (ROOT / name).is_dir() else {}),
        )
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    run(sys.executable, "-m", "pip", *build, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel; only its dependencies are those of
    this environment."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"), cwd=folder)
    bin_folder = folder / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python")]
    run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    # A path in a .pth file is searched, but .pth files in it are not read: the checkout's
    # own is one.
    site_packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return bin_folder


def run(*words: str, cwd: Path) -> str:
    """Run a command that must end well; its output."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_wheel_holds_one_package_with_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"flallm_ds"}
    jsons = {name for name in names if name.endswith(".json")}
    expected = (ROOT / "ds_configs").glob("*.json")
    assert jsons == {f"flallm_ds/ds_configs/{path.name}" for path in expected}
    # The job scripts, which `flallm submit` copies.
    for path in (ROOT / "launch" / "slurm").glob("*.*"):
        assert f"flallm_ds/slurm/{path.name}" in names
    pages = {name for name in names if name.startswith("flallm_ds/reporting/page.")}
    assert {Path(name).suffix for name in pages} == {".py", ".html", ".css", ".js"}
    assert {f"flallm_ds/demo/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert {f"flallm_ds/inference/heat_map.{kind}" for kind in ("css", "js")} <= set(names)


def test_the_wheel_holds_the_license_and_names_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        license_text = archive.read(f"{info}/licenses/LICENSE").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert license_text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0\n" in metadata
    assert f"Version: {__version__}\n" in metadata


def test_every_verb_is_listed_and_has_help(installed: Path, tmp_path: Path) -> None:
    flallm = str(installed / "flallm")
    listed = run(flallm, "--help", cwd=tmp_path)
    for name, verb in FLALLM.verbs.items():
        assert f"  {name:11}  {verb.summary}\n" in listed
        assert f"usage: flallm {name}" in run(flallm, name, "--help", cwd=tmp_path)
    assert run(flallm, "--version", cwd=tmp_path) == f"flallm_ds {__version__}\n"
    assert "train.epochs" in run(flallm, "options", "train", cwd=tmp_path)
    where = run(
        str(installed / "python"),
        "-c",
        "import flallm_ds; print(flallm_ds.__file__)",
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_an_installed_wheel_makes_shards_and_trains_both_stages(
    installed: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    flallm = str(installed / "flallm")
    run(
        flallm,
        "signsim",
        "corpus",
        "--out=corpus",
        "--clips=12",
        "--monolingual=0",
        "--workers=1",
        cwd=tmp_path,
    )
    build = [
        "build",
        "signsim",
        "--source=corpus",
        "--out=shards",
        "--short_side=32",
        "--workers=1",
    ]
    run(flallm, "shards", *build, cwd=tmp_path)
    assert "12" in run(flallm, "shards", "verify", "shards", cwd=tmp_path)
    run(flallm, "shards", "stats", "shards", cwd=tmp_path)
    run(flallm, "shards", "preview", "shards", "--out=look", cwd=tmp_path)
    more = {"train.epochs": 1, "eval.every_epochs": 1}
    launcher = [
        str(installed / "python"),
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus=1",
    ]
    launcher += [f"--master_port={free_port()}", "--module", "flallm_ds.cli.train"]
    for stage in ("visual", "llm"):
        options = tiny_options(tiny_corpus, stage, tmp_path / stage, **more)
        words = [f"--{name}={value}" for name, value in options.items()]
        run(*launcher, f"--stage={stage}", *words, cwd=tmp_path)
        assert len(losses(tmp_path / stage)) == 5
