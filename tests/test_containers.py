"""The definitions of images: what can be checked without building one."""

import os
import re
import subprocess
from pathlib import Path

from tests.helpers.paths import ROOT

FOLDER = ROOT / "launch" / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (FOLDER / "apptainer.def").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each as one line."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def test_the_dockerfile_has_known_instructions() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM" and set(names) == {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}


def test_both_images_have_what_the_package_is_installed_from() -> None:
    copied = set()
    for name, words in instructions():
        if name == "COPY":
            copied |= set(words.split()[:-1])
    (files,) = re.findall(r"%files\n((?:    .*\n)+)", APPTAINER)
    listed = dict(line.split() for line in files.splitlines())
    assert copied == set(listed)
    for name, target in listed.items():
        assert (ROOT / name).exists() and target == f"/opt/flallm_ds/{name}"


def test_both_images_have_the_tested_python_and_versions() -> None:
    (docker,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    (apptainer,) = re.findall(r"^From: (\S+)$", APPTAINER, re.MULTILINE)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"tested set \(Python ([\d.]+)\)", constraints)
    assert docker == apptainer and docker.startswith(f"python:{version}-")
    for text in (DOCKERFILE, APPTAINER):
        for command in re.findall(r"pip install .*", text):
            assert "--constraint constraints.txt" in command
            names = re.findall(r" ([a-z]+)(?= |$)", command.split("constraints.txt")[1])
            for name in names:
                assert re.search(rf"^{name}==", constraints, re.MULTILINE), name


def test_the_python_of_an_image_gets_the_words_of_a_job(tmp_path: Path) -> None:
    """A stand-in for apptainer prints its words."""
    (tmp_path / "apptainer").write_text("#!/bin/bash\nprintf '%s|' \"$@\"\n")
    (tmp_path / "apptainer").chmod(0o755)
    (tmp_path / "an image.sif").touch()
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(FOLDER / "python"), "-m", "flallm_ds", "--run=a b; $HOME"]
    image = {"FLALLM_IMAGE": str(tmp_path / "an image.sif")}
    done = subprocess.run(command, env=path | image, capture_output=True, text=True)
    words = done.stdout.split("|")[:-1]
    assert words[0] == "exec" and words[-4:] == ["python", *command[1:]]
    assert words[-5] == image["FLALLM_IMAGE"]
    done = subprocess.run(command, env=path, capture_output=True, text=True)
    assert done.returncode == 2 and "FLALLM_IMAGE must be an Apptainer image" in done.stderr
