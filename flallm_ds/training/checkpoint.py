"""Checkpoints that are whole or absent: every rank writes, all agree, then one rename commits.

checkpoints/step-00001200/  engine/ (DeepSpeed's shards)  manifest.json (state, and sha256
of each file)
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
    """Commit `checkpoints/step-…`: `write(folder)` runs on every rank, then rank 0 adds
    `state` and renames.

    keep: how many committed checkpoints stay. Raises UserError on every rank if any rank
    could not write.
    """
    final = folder / f"step-{step:08d}"
    partial = partial_of(final)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit() -> None:
        files: dict[str, str] = {}
        for path in sorted(partial.rglob("*"), key=Path.as_posix):
            if path.is_file():
                files[path.relative_to(partial).as_posix()] = file_sha256(path)
        _write_manifest(partial, files, state)
        put_folder(partial, final)
        sync(folder)
        # Only now: at each moment of a save, a complete checkpoint is on the disk.
        for old in committed(folder)[:-keep]:
            shutil.rmtree(old)

    _together(begin if world.is_main else None, final, world)
    _together(lambda: write(partial), final, world)
    _together(commit if world.is_main else None, final, world)
    return final


def replace_state(folder: Path, step: int, state: dict[str, Any], world: World) -> None:
    """Give the committed checkpoint of that step another state, where the engine is as it was.

    Raises UserError on every rank if it could not be written.
    """
    final = folder / f"step-{step:08d}"

    def replace() -> None:
        _write_manifest(final, _read_manifest(final)["files"], state)

    _together(replace if world.is_main else None, final, world)


def _together(action: Callable[[], None] | None, final: Path, world: World) -> None:
    """Run a part of a save and wait for all ranks; raises UserError on every rank if any
    could not write."""
    problem = None
    try:
        if action is not None:
            action()
    # on a full disk torch.save raises a RuntimeError
    except (OSError, RuntimeError) as error:
        problem = f"rank {world.rank}: {error}"
    problems = list(filter(None, gather_objects(problem, world)))
    if problems:
        raise UserError(
            f"the checkpoint {final} could not be written ({problems[0]}). Earlier "
            "checkpoints are whole; free some space and run the same command again."
        )


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint that is whole. damaged: those that are newer, each with what
    is wrong with it."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint of which every file has its checksum; None where there never was one.

    Raises UserError where none of several is whole: a run must not start from scratch
    unasked.
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
            f"Cannot resume from {folder}: no checkpoint is whole. "
            f"{next(iter(damaged.values()))} Put a copy of a whole checkpoint there, or "
            "start another run with --run=FOLDER."
        )
    return None


def resumable(run: Path) -> Saved | None:
    """Find what a run resumes from, once its folders are whole again; None for a run
    without checkpoints.

    Every file of the checkpoint is read, so call it once at a start. Raises UserError as
    `newest`.
    """
    checkpoints = run / "checkpoints"
    for parent in (run, checkpoints):
        recover_folders(parent)
    return newest(checkpoints)


def set_aside(damaged: Iterable[Path]) -> None:
    """Give damaged checkpoints names under which they neither count as checkpoints nor
    hide newer ones."""
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        # One of the same step, from an earlier resume.
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    # A folder without a manifest is the copy of a checkpoint that was cut off.
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved next to the engine's shards, after every file was checked against
    its checksum.

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
    return hashlib.sha256(json.dumps([files, state], sort_keys=True).encode()).hexdigest()


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise _broken(checkpoint, MANIFEST, "is missing")
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        is_whole = manifest["sha256"] == _sha256(manifest["files"], manifest["state"])
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise _broken(checkpoint, MANIFEST, "was changed")
    return manifest


def _broken(checkpoint: Path, name: str, what: str) -> UserError:
    return UserError(f"The checkpoint {checkpoint} is damaged: {name} {what}.")
