"""Save and read checkpoints, each complete or absent: every rank writes, then one rename
commits.

checkpoints/step-00001200/
  engine/        the shards of DeepSpeed
  manifest.json  the state of the trainer, and the sha256 of each file
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds.dist import World, gather_objects
from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import (
    file_sha256,
    partial_of,
    put_folder,
    recover_folders,
    replace_file,
    sync,
)

MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    write: Callable[[Path], None],
    world: World,
    keep: int,
) -> Path:
    """Save a checkpoint and return its folder, `step-00001200`.

    write: called on every rank with a temporary folder; rank 0 then adds the state and
    renames the folder. keep: number of checkpoints to keep; older ones are deleted. Raises
    UserError on every rank if any rank cannot write.
    """
    final = folder / f"step-{step:08d}"
    partial = partial_of(final)

    def begin() -> None:
        # A save that was killed may have left a part of this checkpoint.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit() -> None:
        # The order of the paths, because the digest of the manifest depends on it.
        files: dict[str, str] = {}
        for path in sorted(partial.rglob("*"), key=Path.as_posix):
            if path.is_file():
                files[path.relative_to(partial).as_posix()] = file_sha256(path)
        _write_manifest(partial, files, state)
        put_folder(partial, final)
        sync(folder)
        # Delete last: at each moment, a complete checkpoint is on the disk.
        for old in committed(folder)[:-keep]:
            shutil.rmtree(old)

    # Three parts with a barrier after each: no rank writes before the folder exists, and
    # rank 0 commits only after all ranks have written.
    _together(begin if world.is_main else None, final, world)
    _together(lambda: write(partial), final, world)
    _together(commit if world.is_main else None, final, world)
    return final


def replace_state(folder: Path, step: int, state: dict[str, Any], world: World) -> None:
    """Replace the state in the checkpoint of a step, whose engine has not changed since.

    Raises UserError on every rank if rank 0 cannot write.
    """
    final = folder / f"step-{step:08d}"

    def replace() -> None:
        _write_manifest(final, _read_manifest(final)["files"], state)

    _together(replace if world.is_main else None, final, world)


def _together(action: Callable[[], None] | None, final: Path, world: World) -> None:
    """Run one part of a save and wait for all ranks.

    action: None on a rank without work. Raises UserError on every rank if any cannot write.
    """
    problem = None
    try:
        if action is not None:
            action()
    # torch.save raises a RuntimeError on a full disk.
    except (OSError, RuntimeError) as error:
        problem = f"{error} (rank {world.rank})"
    # Collective also on ranks that failed: otherwise the others would wait for them.
    problems = list(filter(None, gather_objects(problem, world)))
    if problems:
        raise UserError(
            f"Cannot write checkpoint {final}: {problems[0]}. Earlier checkpoints are "
            "complete. Free some space and run the same command again."
        )


@dataclass(frozen=True)
class Saved:
    """The newest complete checkpoint. damaged: newer checkpoints, each with its error."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]


def newest(folder: Path) -> Saved | None:
    """Return the newest checkpoint whose files all match their checksums, or None if the
    folder has no checkpoint.

    Raises UserError if all checkpoints are damaged: a run must not start from scratch by
    accident.
    """
    damaged: dict[Path, str] = {}
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return Saved(path, read_state(path), damaged)
        except UserError as error:
            damaged[path] = str(error)
        except OSError as error:
            damaged[path] = file_problem(error)
    if damaged:
        raise UserError(
            f"Cannot resume from {folder}: no checkpoint is complete. "
            f"{next(iter(damaged.values()))} Put a copy of a complete checkpoint there, or "
            "start another run with --run=FOLDER."
        )
    return None


def resumable(run: Path) -> Saved | None:
    """Return the checkpoint that a run resumes from, or None if it has none.

    Every file of the checkpoint is read, so call it once per start. Raises UserError as
    `newest` does.
    """
    # A kill during the replacement of a folder leaves it under another name.
    checkpoints = run / "checkpoints"
    for parent in (run, checkpoints):
        recover_folders(parent)
    return newest(checkpoints)


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they no longer count as checkpoints.

    They are not deleted: a user may still get something out of them.
    """
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        # An earlier resume may have renamed one of the same step.
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    # A folder without a manifest is an incomplete copy of a checkpoint.
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state in a checkpoint after comparing every file with its checksum.

    Raises UserError that names a missing or changed file.
    """
    manifest = _read_manifest(checkpoint)
    for name, sha256 in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise _broken(checkpoint, name, "is missing")
        if file_sha256(path) != sha256:
            raise _broken(checkpoint, name, "was changed")
    return dict(manifest["state"])


def _write_manifest(checkpoint: Path, files: dict[str, str], state: dict[str, Any]) -> None:
    content = {"files": files, "state": state, "sha256": _sha256(files, state)}
    replace_file(checkpoint / MANIFEST, json.dumps(content, indent=1))


def _sha256(files: dict[str, str], state: dict[str, Any]) -> str:
    """Return the digest of a manifest, so that a changed state is found, too."""
    return hashlib.sha256(json.dumps([files, state], sort_keys=True).encode()).hexdigest()


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise _broken(checkpoint, MANIFEST, "is missing")
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        is_complete = manifest["sha256"] == _sha256(manifest["files"], manifest["state"])
    except (ValueError, KeyError, TypeError):
        is_complete = False
    if not is_complete:
        raise _broken(checkpoint, MANIFEST, "was changed")
    return manifest


def _broken(checkpoint: Path, name: str, what: str) -> UserError:
    return UserError(f"Cannot read checkpoint {checkpoint}: {name} {what}.")
