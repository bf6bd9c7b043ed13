"""Write a folder of cached features: its tars, and its tables and index.json at the end.

    <out>/
      train-000012.view3.tar        complete: a tar gets this name when it is on the disk
      .begun/                       plan.json, lock, and a record of each finished tar
      {split}.safetensors, index.json   written last

The writing may be killed at any moment: the same command then continues with the
remaining tars. The same command also writes a tar again that was deleted.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from flallm_ds.data import index as index_file
from flallm_ds.data.index import COLUMNS, STRING_COLUMNS, Index
from flallm_ds.errors import UserError
from flallm_ds.features.facts import FeatureFacts, to_npy
from flallm_ds.files import move, take_lock, write_file
from flallm_ds.sharding.writer import SHARD_NAME, ShardWriter, index_json

BEGUN = ".begun"
TRAINING = "train"  # the split with training views: random frames, augmentations
# Columns that are stored as JSON after the features of a clip.
_FACTS = ("id", "text", "signer", "video", "language")


@dataclass(frozen=True)
class FeatureTar:
    """One tar to write: a view of the clips of one shard of the video.

    view: from 0; each view has other random frames and augmentations. rows: the clips, in
    stored order.
    """

    split: str
    shard: int
    view: int
    rows: np.ndarray

    @property
    def name(self) -> str:
        plain = SHARD_NAME.format(split=self.split, number=self.shard)
        return f"{plain.removesuffix('.tar')}.view{self.view}.tar"


class FeatureFolder:
    """Writes the features of several splits to the folder `out`.

    sources: the index of the video, by split. views: the number of views, by split.
    """

    def __init__(
        self, out: Path, sources: Mapping[str, Index], views: Mapping[str, int]
    ) -> None:
        self.out, self.sources, self.views = out, sources, views
        self._begun = out / BEGUN
        self._lock: FileLock | None = None

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Create the folder or continue with it, and lock it until `end`.

        plan: plain values that decide every byte, by the names of their options. Raises
        UserError if the folder has other content, belongs to another plan, or is in use.
        """
        # Convert to what the file returns when it is read: a tuple becomes a list.
        plan = json.loads(json.dumps(plan))
        path = self._begun / "plan.json"
        if not path.is_file() and not _is_free(self.out):
            raise UserError(
                "--out must be a new folder, an empty one, or one of unfinished features, "
                f"got {self.out} with other content. Use another folder."
            )
        self._begun.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self._begun / "lock")
        if lock is None:
            raise UserError(
                f"Folder {self.out} is in use by another command. Wait for it to end, or "
                "use another --out."
            )
        try:
            self._compare(plan, path)
        except UserError:
            lock.release()
            raise
        self._lock = lock

    def _compare(self, plan: Mapping[str, Any], path: Path) -> None:
        """Raise UserError if the plan differs from the one in `path`; write a first one."""
        if not path.is_file():
            write_file(path, index_json(plan))
        before = _read(path)
        for name in before | plan:
            if before.get(name) != plan.get(name):
                raise UserError(
                    f"Folder {self.out} belongs to other features ({name} "
                    f"{before.get(name)}, got {plan.get(name)}). Use the same value, or "
                    "another --out."
                )

    def check_shared(self) -> None:
        """Raise UserError on a machine without access to the folder of `begin`."""
        if not self._begun.is_dir():
            raise UserError(
                f"--out must be on a disk that all machines share, got {self.out}. Use a "
                "folder of a shared disk."
            )

    def end(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()

    def jobs(self) -> list[FeatureTar]:
        """Return all tars; those of one shard of the video are next to each other."""
        found: list[FeatureTar] = []
        for split in self.sources:
            found += self._jobs_of(split)
        return found

    def _jobs_of(self, split: str) -> list[FeatureTar]:
        """Return the tars of a split, ordered by shard and then by view."""
        # Group the rows by their shard; rows of one shard keep their order.
        source = self.sources[split]
        shards = source.arrays["shard"]
        order = np.argsort(shards, kind="stable")
        ends = np.cumsum(np.bincount(shards, minlength=source.num_shards))

        found = []
        for shard, rows in enumerate(np.split(order, ends[:-1])):
            for view in range(self.views[split]):
                found.append(FeatureTar(split, shard, view, rows))
        return found

    def left(self) -> list[FeatureTar]:
        """Return the tars that are not finished."""
        return [job for job in self.jobs() if not self._is_done(job)]

    def _is_done(self, job: FeatureTar) -> bool:
        # Both must be there, because a user may delete a tar to have it written again.
        path, record = self.out / job.name, self._record(job)
        return (
            record.is_file()
            and path.is_file()
            and path.stat().st_size == _read(record)["shard"]["bytes"]
        )

    def _record(self, job: FeatureTar) -> Path:
        return self._begun / f"{job.name}.json"

    def write(self, job: FeatureTar, features: Sequence[np.ndarray]) -> None:
        """Write a tar and its record.

        features: (S, D) of each clip, in the order of the rows. Raises OSError.
        """
        source = self.sources[job.split]
        strings = {name: source.strings(name) for name in ("key", *_FACTS)}
        # A writing that was killed may have left a part of this tar.
        temporary = self._begun / f"{job.name}.tmp"
        temporary.unlink(missing_ok=True)
        places = []
        with ShardWriter(temporary, job.shard) as tar:
            for row, features_SD in zip(job.rows.tolist(), features, strict=True):
                facts: dict[str, Any] = {name: strings[name][row] for name in _FACTS}
                facts["fps"] = float(source.arrays["fps"][row])
                member = to_npy(features_SD)
                offset = tar.add_sample(strings["key"][row], "npy", member, facts)
                places.append((offset, len(member)))
        entry = vars(tar.shard_entry) | {"file": job.name}
        # Write the record last: a tar without a record is written again.
        move(temporary, self.out / job.name)
        write_file(self._record(job), index_json({"shard": entry, "places": places}))

    def finish(self, facts: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Write the tables and index.json.

        facts: the fields of `FeatureFacts` that all splits share. manifest: index.json of
        the video.
        """
        entries: dict[str, Any] = {}
        for split, source in self.sources.items():
            # Copy the table of the video, so that each clip keeps its row.
            names = [*COLUMNS, *STRING_COLUMNS]
            for name in STRING_COLUMNS:
                names.append(f"{name}_ends")
            arrays = {name: source.arrays[name] for name in names}

            # Replace the places of the video by those of the features. All views of a shard
            # have the same places, because a view changes neither lengths nor texts.
            for name in ("offset", "size"):
                arrays[name] = np.zeros(len(source), COLUMNS[name])
            tars = []
            for job in self._jobs_of(split):
                record = _read(self._record(job))
                places = np.array(record["places"], np.int64).reshape(-1, 2)
                arrays["offset"][job.rows], arrays["size"][job.rows] = places.T
                tars.append(record["shard"])

            table = self._begun / f"{split}.safetensors"
            entry = index_file.write_arrays(table, arrays)
            move(table, self.out / table.name)
            entries[split] = entry | {
                "shards": tars,
                "views": self.views[split],
                "training": split == TRAINING,
                "source_fingerprint": source.fingerprint,
            }
        content: dict[str, Any] = {"format": index_file.FORMAT, "kind": FeatureFacts.KIND}
        for name in ("corpus", "language", "options", "notes"):
            if name in manifest:
                content[name] = manifest[name]
        content |= {"splits": entries, "features": dict(facts)}
        # Write index.json last: a folder with it is complete.
        write_file(self.out / "index.json", index_json(content))


def share(
    jobs: Sequence[FeatureTar],
    sizes: Mapping[str, np.ndarray],
    rank: int,
    world_size: int,
) -> list[FeatureTar]:
    """Return the tars that a rank writes: consecutive ones, with about as many frames as
    those of the other ranks.

    sizes: frames of each clip, by split. Consecutive tars read the same shard of the video,
    so that few ranks read the same shard.
    """
    frames = np.zeros(len(jobs))
    for number, job in enumerate(jobs):
        frames[number] = sizes[job.split][job.rows].sum()

    # Divide the frames of all jobs into equal parts, one for each rank; a job belongs to
    # the rank in whose part its middle frame is.
    middles = np.cumsum(frames) - frames / 2
    owners = (middles / max(frames.sum(), 1) * world_size).astype(int)
    return list(compress(jobs, owners == rank))


def _is_free(out: Path) -> bool:
    """Return whether a new writing may use `out`: it is absent, or empty."""
    if not out.exists():
        return True
    # A writing that was killed at its start leaves .begun alone.
    return out.is_dir() and all(path.name == BEGUN for path in out.iterdir())


def _read(path: Path) -> Any:
    with suppress(ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    raise UserError(
        f"Cannot read {path}: it is not JSON. Delete it; its tar is then written again."
    )
