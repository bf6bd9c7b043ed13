"""Writing a shard folder: clips into ordinary WebDataset tars, their places into the index.

    with new_folder(out) as folder:                        # appears whole at `out`, or not at all
        with ShardWriter(folder / "train-000000.tar", shard=0) as tar:
            rows.append(tar.add(key, jpegs, fps=25.0, height=256, width=256, id=..., text=..., ...))
        write_index(folder, ..., splits={"train": (rows, [tar.shard])})

The bytes depend on nothing but the clips: no time, owner, or number of workers is in them.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flallm_ds.data import index
from flallm_ds.data.clip_format import EXTENSION, pack_frames
from flallm_ds.errors import UserError

SHARD_NAME = "{split}-{number:06d}.tar"
_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar files end on a whole record, by convention


class ShardWriter:
    """One tar, written front to back: `<key>.avi` and then `<key>.json` for each clip.

    shard: the tar's row in its split's list, for the index. `shard_entry` is what the list says, once closed.
    """

    def __init__(self, path: Path, shard: int) -> None:
        self._path, self._shard = path, shard
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._position = 0
        self._num_clips = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write(b"\0" * 2 * _BLOCK)
            self._write(b"\0" * (-self._position % _RECORD))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    @property
    def shard_entry(self) -> index.Shard:
        return index.Shard(self._path.name, self._position, self._hash.hexdigest(), self._num_clips)

    def add(
        self,
        key: str,
        jpegs: Sequence[bytes],
        *,
        fps: float,
        height: int,
        width: int,
        id: str,
        text: str,
        signer: str,
        video: str,
        language: str,
        **more: Any,
    ) -> dict[str, Any]:
        """Append a clip and return its row for the index. `more` (gloss, for one) goes into its JSON only."""
        if not key or "." in key or "/" in key:
            raise ValueError(f"a key must be dot-free (WebDataset cuts names there), but is {key!r}.")
        facts = {"id": id, "text": text, "signer": signer, "video": video, "language": language} | {
            "num_frames": len(jpegs), "fps": fps, "width": width, "height": height
        }  # fmt: skip
        clip = pack_frames(jpegs, fps, width, height)
        offset = self._add_member(f"{key}.{EXTENSION}", clip)
        self._add_member(f"{key}.json", json.dumps(facts | more, ensure_ascii=False).encode())
        self._num_clips += 1
        return facts | {"key": key, "shard": self._shard, "offset": offset, "size": len(clip)}

    def _add_member(self, name: str, content: bytes) -> int:
        """Write one member and return where its bytes begin."""
        member = tarfile.TarInfo(name)  # mode 0644, owner 0, time 0: tarfile's own defaults
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(content)
        self._write(b"\0" * (-len(content) % _BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._position += len(content)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` to write into: it becomes `out` at the end, or is removed on any error.

    Raises UserError if `out` is a file or a folder that is not empty, or if the disk refuses.
    """
    out = out.resolve()
    check_free(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        partial.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise UserError(
            f"shards must be written to {out}, but {error.strerror or error} ({error.filename or out}). "
            "Nothing was left there; give --out a place with room that you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path) -> None:
    """Raise UserError unless `out` is absent or an empty folder that can be replaced."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"--out must be a new folder, but is a file: {out}. Name another folder.")
    if os.path.ismount(out):
        raise UserError(
            f"--out must be a new folder, but a disk is mounted there: {out}. Name a folder in it."
        )
    first = min((path.name for path in out.iterdir()), default=None)
    if first is None:
        return
    try:
        found = index.read_manifest(out)
    except UserError:
        raise UserError(
            f"--out must be a new or empty folder, but {out} holds what no build of ours made ({first}). "
            "Name another folder."
        ) from None
    raise UserError(
        f"--out must be a new or empty folder, but {out} holds an earlier build (corpus {found['corpus']}). "
        "Remove it, or name another folder."
    )


def write_index(
    folder: Path,
    *,
    corpus: str,
    language: str,
    options: Mapping[str, Any],
    splits: Mapping[str, tuple[list[dict[str, Any]], list[index.Shard]]],
    skipped: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write each split's table and index.json. splits: (rows in stored order, tars) of each split."""
    entries = {}
    for split, (rows, tars) in splits.items():
        path = folder / f"{split}.safetensors"
        table = index.write_table(path, rows)
        path.chmod(0o644)  # safetensors makes it private, but shards are read by whole groups
        entries[split] = table | {"shards": [vars(tar) for tar in tars]}
    manifest = {"format": index.FORMAT, "corpus": corpus, "language": language, "options": dict(options)} | {
        "splits": entries, "skipped": dict(skipped or {}), "notes": list(notes)
    }  # fmt: skip
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    (folder / "index.json").write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
