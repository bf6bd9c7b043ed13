"""Record each start of a run in versions.json: commit, command, devices and versions.

The values of the first start are at the top level; `starts` contains those of every start,
because a run may be resumed on another machine.
"""

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flallm_ds import __version__
from flallm_ds.commit import REPOSITORY, commit_of
from flallm_ds.dist import World, gather_objects, main_first
from flallm_ds.errors import UserError
from flallm_ds.files import replace_file

VERSIONS = "versions.json"
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "webdataset",
    "torchaudio",
    "sacrebleu",
    "simplejpeg",
    "numpy",
)
DRIVER = Path("/proc/driver/nvidia/version")


def record_start(folder: Path, world: World) -> None:
    """Add this start to versions.json.

    Every rank must call it. Raises UserError on every rank if it fails.
    """
    device = "cpu"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    devices = gather_objects(device, world)
    main_first(lambda: _append(folder / VERSIONS, facts(devices)), world)


def _append(path: Path, start: dict[str, Any]) -> None:
    content, starts = start, []
    if path.is_file():
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
            # An older version recorded only the first start.
            starts = list(content.get("starts", [content]))
        except (ValueError, RecursionError, TypeError) as error:
            raise UserError(
                f"Cannot read {path}: {error}. Delete it; the run resumes without it."
            ) from error
    # The values of the first start stay at the top level.
    content = {**content, "starts": [*starts, start]}
    replace_file(path, json.dumps(content, indent=2) + "\n")


def facts(devices: list[str]) -> dict[str, Any]:
    """Return plain values that describe this start.

    devices: the name of the device of each rank.
    """
    on_gpu = torch.cuda.is_available()
    commit, dirty = commit_of(REPOSITORY)
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "commit": commit,
        "dirty": dirty,
        **versions(),
        "ranks": len(devices),
        "devices": dict(Counter(devices)),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn() if on_gpu else None,
        "nccl": _nccl() if on_gpu else None,
        "driver": driver_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the package, of Python and of `PACKAGES`."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"flallm_ds": __version__, "python": platform.python_version(), **packages}


def code_digest() -> str:
    """Return the sha256 of all Python files of the package and of their names, in hex."""
    package = REPOSITORY / "flallm_ds"
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def driver_version() -> str | None:
    """Return the version of the kernel module of NVIDIA, or None if there is none."""
    if not DRIVER.is_file():
        return None
    text = DRIVER.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else None
