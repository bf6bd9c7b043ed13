"""Checkpoints that are complete or absent, and fit any number of ranks.

    checkpoints/step-00001200/
      rank-00000.000.safetensors ...  the fragments that each rank owns
      manifest.json                   the state of the run, and a checksum of each file

Every rank writes its own files, in a background thread where memory allows. When all have
finished, rank 0 writes the manifest and renames the folder: that commits the checkpoint.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flallm_ds.dist import World, gather_objects, main_first
from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import partial_of, put_folder, recover_folders, replace_file
from flallm_ds.training.fragment_files import (
    FragmentFile,
    FragmentReader,
    write_fragments,
)
from flallm_ds.training.fragments import Key

MANIFEST = "manifest.json"
FORMAT = 2  # 1: the files of DeepSpeed, of version 0.1

Fragments = Iterable[tuple[Key, torch.Tensor]]


class Save:
    """A checkpoint while it is written: `Save(...)`, steps in between, then `commit()`.

    Every rank must create it and commit it. folder: of all checkpoints. state: plain
    values of the run. fragments: of this rank. background: write in a thread; then
    `fragments` must be copies that nothing changes. Raises UserError on every rank if the
    folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        state: dict[str, Any],
        fragments: Fragments,
        world: World,
        *,
        background: bool,
    ) -> None:
        self.final = folder / f"step-{step:08d}"
        self.step, self.state, self.world = step, state, world
        self._partial = partial_of(self.final)
        self._files: list[FragmentFile] = []
        self._problem: str | None = None
        self._on_main(self._begin)
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(
                target=self._write, args=(fragments,), name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(fragments)

    def _begin(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def _write(self, fragments: Fragments) -> None:
        try:
            self._files = write_fragments(self._partial, self.world.rank, fragments)
        # On a full disk, safetensors raises an error of its own, a RuntimeError or OSError.
        except Exception as error:  # noqa: BLE001 - a thread; `commit` raises it
            self._problem = f"{error} (rank {self.world.rank})"

    def is_written(self) -> bool:
        """Whether this rank has written its files; then `commit` does not wait for it."""
        return self._thread is None or not self._thread.is_alive()

    def commit(self, keep: int) -> None:
        """Wait for the files of all ranks, then make them a checkpoint.

        keep: the number of checkpoints that stay. Raises UserError on every rank if any
        rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        # Rank 0 does not list the folder: on a network disk it may not see all files yet.
        reports = gather_objects((self._problem, self._files), self.world)
        problems = [problem for problem, _ in reports if problem]
        if problems:
            raise self._failed(problems[0])
        files: list[FragmentFile] = []
        for _, own in reports:
            files += own

        def commit() -> None:
            _write_manifest(self._partial, self.final.name, files, self.state)
            put_folder(self._partial, self.final)

        self._on_main(commit)
        if self.world.is_main:
            remove_old(self.final.parent, keep)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0; raise UserError on every rank if it fails."""

        def run() -> None:
            try:
                action()
            except OSError as error:
                raise self._failed(f"{error} (rank 0)") from error

        main_first(run, self.world)

    def _failed(self, problem: str) -> UserError:
        return UserError(
            f"Cannot write checkpoint {self.final}: {problem}. Earlier checkpoints are "
            "complete. Free some space and run the same command again."
        )


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, in the background; errors do not matter.

    Without its manifest, a folder is no checkpoint, even if a kill leaves its files.
    """
    for old in committed(folder)[:-keep]:
        (old / MANIFEST).unlink(missing_ok=True)
    kept = {path.name for path in committed(folder)}
    for path in folder.glob("step-*"):
        if path.name not in kept:
            threading.Thread(target=shutil.rmtree, args=(path, True)).start()


def replace_state(folder: Path, step: int, state: dict[str, Any], world: World) -> None:
    """Replace the state of a committed checkpoint, for the same weights and optimizer.

    Raises UserError on every rank if it cannot be written.
    """
    final = folder / f"step-{step:08d}"

    def replace() -> None:
        _write_manifest(final, final.name, read_manifest(final).files, state)

    main_first(replace, world)


@dataclass(frozen=True)
class Saved:
    """The newest complete checkpoint.

    damaged: newer checkpoints, each with what is wrong.
    """

    path: Path
    state: dict[str, Any]
    files: tuple[FragmentFile, ...]
    damaged: dict[Path, str]

    def reader(self) -> FragmentReader:
        return FragmentReader(self.path, self.files)


def newest(folder: Path, world: World) -> Saved | None:
    """Return the newest checkpoint in which every byte is as it was written.

    Each rank verifies its share of the files, so every rank must call this. Returns None
    if there was never a checkpoint. Raises UserError if all checkpoints are damaged: a run
    must not start from scratch without being asked to.
    """
    damaged: dict[Path, str] = {}
    paths = main_first(lambda: sorted(folder.glob("step-*"), reverse=True), world)
    for path in paths:
        manifest, problem = main_first(lambda path=path: _manifest_or_problem(path), world)
        if manifest is not None:
            reader = FragmentReader(path, manifest.files)
            for file in manifest.files[world.rank :: world.size]:
                fault = reader.verify(file)
                if fault is not None and problem is None:
                    problem = str(_damaged(path, file.name, fault))
            problems = [one for one in gather_objects(problem, world) if one]
            if not problems:
                return Saved(path, manifest.state, manifest.files, damaged)
            problem = problems[0]
        damaged[path] = problem
    if damaged:
        raise UserError(
            f"Cannot resume from {folder}: no checkpoint is complete. "
            f"{next(iter(damaged.values()))} Put a copy of a complete checkpoint there, or "
            "start another run with --run=FOLDER."
        )
    return None


def _manifest_or_problem(path: Path) -> tuple["Manifest | None", str | None]:
    try:
        return read_manifest(path), None
    except _DamagedError as error:
        return None, str(error)
    except OSError as error:
        return None, file_problem(error)


def resumable(run: Path, world: World) -> Saved | None:
    """Return the checkpoint to resume a run from, after repairing interrupted renames.

    Every rank must call this. Every byte of the checkpoint is read once, by one of the
    ranks. Raises UserError as `newest` does.
    """
    checkpoints = run / "checkpoints"

    def recover() -> None:
        for parent in (run, checkpoints):
            recover_folders(parent)

    main_first(recover, world)
    return newest(checkpoints, world)


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they neither count as checkpoints nor hide newer
    ones."""
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / MANIFEST).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state of a checkpoint; its files are not read. Raises UserError."""
    return read_manifest(checkpoint).state


# --- the manifest


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    files: tuple[FragmentFile, ...]
    state: dict[str, Any]


class _DamagedError(UserError):
    """A damaged checkpoint: an earlier one may be complete."""


def _write_manifest(
    folder: Path, name: str, files: Iterable[FragmentFile], state: dict[str, Any]
) -> None:
    """Write the manifest to a folder. name: of the checkpoint, when it is committed."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "files": [file.as_json() for file in files],
        "state": state,
    }
    content["sha256"] = _sha256(content)
    replace_file(folder / MANIFEST, json.dumps(content, indent=1))


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises UserError if it is missing or damaged."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise _damaged(checkpoint, MANIFEST, "is missing")
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        is_first_format = "format" not in content and "files" in content
        sha256 = content.pop("sha256")
        is_complete = sha256 == _sha256(content)
        # A copy in the place of another step would hide newer checkpoints.
        name = content.get("name", checkpoint.name)
        if is_complete and name == checkpoint.name:
            files = tuple(map(FragmentFile.from_json, content["files"]))
            return Manifest(files, dict(content["state"]))
    except (ValueError, KeyError, TypeError):
        is_first_format = False
        is_complete = False
    if is_complete:
        raise _damaged(checkpoint, MANIFEST, f"is that of {name}")
    if is_first_format:
        raise UserError(
            f"Checkpoint {checkpoint} was written by version 0.1 of flallm_ds. Resume with "
            "that version, or start another run with --run=FOLDER."
        )
    raise _damaged(checkpoint, MANIFEST, "was changed")


def _damaged(checkpoint: Path, name: str, what: str) -> _DamagedError:
    return _DamagedError(f"Cannot read checkpoint {checkpoint}: {name} {what}.")
