"""Checkpoints that are whole or absent: every rank writes, all agree, then one rename commits.

checkpoints/step-00001200/  engine/ (DeepSpeed's shards)  manifest.json (state, and sha256 of each file)
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds.data.storage.store import file_sha256
from flallm_ds.dist import World, gather_objects
from flallm_ds.errors import UserError, file_problem

MANIFEST = "manifest.json"


def save(
    folder: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], world: World, keep: int
) -> Path:
    """Commit `checkpoints/step-…`: `write(folder)` runs on every rank, then rank 0 adds `state` and renames.

    keep: how many committed checkpoints stay. Raises UserError on every rank if any rank could not write.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit() -> None:
        names = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
        files = {name: file_sha256(partial / name) for name in names}
        _write_synced(partial / MANIFEST, _manifest(files, state))
        _put(partial, final)
        _sync_folder(folder)
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
        partial = final / f".partial-{MANIFEST}"
        _write_synced(partial, _manifest(_read_manifest(final)["files"], state))
        partial.replace(final / MANIFEST)

    _together(replace if world.is_main else None, final, world)


def _together(action: Callable[[], None] | None, final: Path, world: World) -> None:
    """Run a part of a save and wait for all ranks; raises UserError on every rank if any could not write."""
    problem = None
    try:
        if action is not None:
            action()
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises a RuntimeError
        problem = f"rank {world.rank}: {error}"
    problems = [p for p in gather_objects(problem, world) if p]
    if problems:
        raise UserError(
            f"the checkpoint {final} could not be written ({problems[0]}). Earlier checkpoints are whole; "
            "free some space and run the same command again."
        )


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint that is whole. damaged: those that are newer, each with what is wrong with it."""

    path: Path
    state: dict[str, Any]
    damaged: dict[Path, str]


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint of which every file has its checksum; None where there never was one.

    Raises UserError where none of several is whole: a run must not start from scratch unasked.
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
            f"Cannot resume from {folder}: no checkpoint is whole. {next(iter(damaged.values()))} "
            "Put a copy of a whole checkpoint there, or start another run with --run=FOLDER."
        )
    return None


def set_aside(damaged: Iterable[Path]) -> None:
    """Give damaged checkpoints names under which they neither count as checkpoints nor hide newer ones."""
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / MANIFEST).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved next to the engine's shards, after every file was checked against its checksum.

    Raises UserError that names a missing or changed file.
    """
    manifest = _read_manifest(checkpoint)
    for name, sha256 in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise _broken(checkpoint, name, "was changed" if path.is_file() else "is missing")
    return dict(manifest["state"])


def _manifest(files: dict[str, str], state: dict[str, Any]) -> dict[str, Any]:
    return {"files": files, "state": state, "sha256": _sha256(files, state)}


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


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError that names a file."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has none
        raise


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all; one that is there gives way only when the new one is complete."""
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except Exception as error:
        # The tokenizers library raises a bare Exception for what is an OSError.
        found = re.fullmatch(r"(.*) \(os error (\d+)\)", str(error)) if type(error) is Exception else None
        if found is None:
            raise
        raise OSError(int(found[2]), found[1]) from error
    share_files(partial)
    _put(partial, path)


def share_files(folder: Path) -> None:
    """Give each file of a new folder the permissions that the umask allows.

    safetensors makes its files private (0600), which would lock out the rest of a group.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def recover_folders(parent: Path) -> None:
    """Put every old folder back whose replacement was killed between its two renames."""
    for old in parent.glob(".old-*"):
        _recover(old)


def _recover(old: Path) -> None:
    path = old.with_name(old.name.removeprefix(".old-"))
    if path.exists():
        shutil.rmtree(old)
    else:
        old.rename(path)


def _put(partial: Path, path: Path) -> None:
    """Give a complete folder its name; one that has it stands aside until then."""
    old = path.with_name(f".old-{path.name}")
    if old.exists():
        _recover(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write_synced(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
