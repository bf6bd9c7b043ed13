"""Find the commit of the code that runs, and copy the code to the folder of a run.

A job in a queue starts from such a copy, so that a change of the checkout does not disturb
it. Needs no torch.
"""

import json
import shutil
import subprocess
from pathlib import Path

from flallm_ds.files import replace_folder, write_json

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent
# The folders of the repository that a run depends on.
CODE = ("flallm_ds", "launch", "shards", "ds_configs")
# In a copy of the code: the commit that it was made at.
COMMIT = "commit.json"


def commit_of(repository: Path) -> tuple[str | None, bool | None]:
    """Return the commit and whether the code differs from it; (None, None) if unknown.

    repository: the root of a checkout, or a copy of the code.
    """
    copied = repository / COMMIT
    if copied.is_file():
        content = json.loads(copied.read_text(encoding="utf-8"))
        return content["commit"], content["dirty"]
    # Git also finds a repository of a user around site-packages, which is not this one.
    if not (repository / ".git").exists():
        return None, None
    # Git refuses a checkout of another owner, as root in a container has it.
    git = ["git", "-C", str(repository), "-c", f"safe.directory={repository}"]
    try:
        head = _output([*git, "rev-parse", "HEAD"])
        changes = _output([*git, "status", "--porcelain", "--", *CODE])
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head, bool(changes)


def _output(command: list[str]) -> str:
    """Return what a command prints. Raises OSError or SubprocessError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def copy_code(folder: Path) -> None:
    """Copy the package to a folder, which is replaced; about 2 MB. Raises OSError."""
    commit, dirty = commit_of(REPOSITORY)

    def write(new: Path) -> None:
        # Links become files: the DeepSpeed JSONs and the job scripts are next to the
        # package in a checkout, and inside it in a wheel.
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, new / PACKAGE.name, ignore=caches)
        write_json(new / COMMIT, {"commit": commit, "dirty": dirty})

    replace_folder(folder, write)
