"""versions.json: on what and with what a run was started, each time.

The first start's facts are at the top; `starts` holds those of every start, also on other
machines.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flallm_ds import __version__
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
REPOSITORY = Path(__file__).resolve().parents[2]
# what of the repository a run depends on
CODE = ("flallm_ds", "launch", "shards", "ds_configs")
DRIVER = Path("/proc/driver/nvidia/version")


def record_start(folder: Path, world: World) -> None:
    """Add this start to versions.json.

    Every rank must call it. Raises UserError on every rank where it fails.
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
            # An older version wrote the first start alone.
            starts = list(content.get("starts", [content]))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"Cannot read {path}: {error}. Delete it; the run resumes without it."
            ) from error
    content = {**content, "starts": [*starts, start]}
    replace_file(path, json.dumps(content, indent=2) + "\n")


def facts(devices: list[str]) -> dict[str, Any]:
    """Plain values about this start. devices: the name of each rank's device."""
    on_gpu = torch.cuda.is_available()
    commit, dirty = _commit(REPOSITORY)
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "commit": commit,
        "dirty": dirty,
        "flallm_ds": __version__,
        "python": platform.python_version(),
        **packages,
        "ranks": len(devices),
        "devices": dict(Counter(devices)),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn() if on_gpu else None,
        "nccl": _nccl() if on_gpu else None,
        "driver": _driver(),
    }


def _commit(repository: Path) -> tuple[str | None, bool | None]:
    """(commit, whether the code was changed since); (None, None) without a checkout."""
    # a repository around site-packages is not ours
    if not (repository / ".git").exists():
        return None, None
    # A container's root may not be the owner of a mounted checkout.
    git = ["git", "-C", str(repository), "-c", f"safe.directory={repository}"]
    try:
        head = _output([*git, "rev-parse", "HEAD"])
        changes = _output([*git, "status", "--porcelain", "--", *CODE])
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head, bool(changes)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    if not DRIVER.is_file():
        return None
    text = DRIVER.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else None
