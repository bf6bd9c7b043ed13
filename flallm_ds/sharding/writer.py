"""Write a shard folder: clips as WebDataset tars, and an index with the place of each clip.

    with ShardWriter(folder / "train-000000.tar", shard=0) as tar:
        rows.append(tar.add(key, jpegs, fps=25.0, height=256, width=256, id=..., text=..., ...))
    write_index(folder, ..., splits={"train": (rows, [tar.shard_entry])})
    publish_folder(folder, out)                            # `out` is complete or does not exist

The bytes depend on the clips alone, not on the time, the owner or the number of workers.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flallm_ds.data import index
from flallm_ds.data.codecs.avi import pack_frames
from flallm_ds.data.codecs.decode import extension_of
from flallm_ds.errors import UserError

SHARD_NAME = "{split}-{number:06d}.tar"
_BLOCK = tarfile.BLOCKSIZE
# By convention, the size of a tar file is a multiple of this.
_RECORD = tarfile.RECORDSIZE
# An upper estimate of the size of a clip's JSON, to predict the size of a tar.
_JSON_BYTES = 8192


class ShardWriter:
    """Write one tar: `<key>.avi` (or `.mp4`) and then `<key>.json` for each clip.

    shard: the number of the tar in its split, for the rows of the index. After `close`,
    `shard_entry` is the entry of the tar in index.json.
    """

    def __init__(self, path: Path, shard: int) -> None:
        self._path, self._shard = path, shard
        # Mode "x" never overwrites a file.
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._position = 0
        self._num_clips = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self.abandon()

    def close(self) -> None:
        """Write the end of the tar and flush it to the disk."""
        # Two empty blocks end a tar. It is padded to whole records.
        self._write(b"\0" * 2 * _BLOCK)
        self._write(b"\0" * (-self._position % _RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file without writing the end of the tar. Ignores a full disk."""
        with suppress(OSError):
            self._file.close()

    def bytes_with(self, clip_bytes: int) -> int:
        """Return the maximum size of the tar with one more clip of `clip_bytes`."""
        # Five blocks: two headers, the padding of the clip, and the two empty blocks at the
        # end of the tar.
        end = self._position + 5 * _BLOCK + clip_bytes + _JSON_BYTES
        return end + -end % _RECORD

    @property
    def shard_entry(self) -> index.Shard:
        """The entry of the tar in index.json."""
        return index.Shard(
            self._path.name, self._position, self._hash.hexdigest(), self._num_clips
        )

    def add(
        self,
        key: str,
        jpegs: Sequence[bytes],
        *,
        fps: float,
        height: int,
        width: int,
        **facts: Any,
    ) -> dict[str, Any]:
        """Append a clip of JPEGs and return the row for the index.

        facts: the other arguments of `add_clip`.
        """
        clip = pack_frames(jpegs, fps, width, height)
        facts |= {"num_frames": len(jpegs), "fps": fps, "height": height, "width": width}
        return self.add_clip(key, clip, **facts)

    def add_clip(
        self,
        key: str,
        clip: bytes,
        *,
        num_frames: int,
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
        """Append an encoded clip and return the row for the index.

        more: facts for the JSON alone, such as the gloss. Raises ValueError for a key that
        WebDataset cannot read.
        """
        facts = {
            "id": id,
            "text": text,
            "signer": signer,
            "video": video,
            "language": language,
            "num_frames": num_frames,
            "fps": fps,
            "width": width,
            "height": height,
        }
        offset = self.add_sample(key, extension_of(clip), clip, facts | more)
        return facts | {
            "key": key,
            "shard": self._shard,
            "offset": offset,
            "size": len(clip),
        }

    def add_sample(
        self, key: str, extension: str, content: bytes, facts: Mapping[str, Any]
    ) -> int:
        """Append a member and a JSON of facts, and return the offset of the member's bytes.

        Raises ValueError for a key that WebDataset cannot read.
        """
        # WebDataset cuts a name at the first dot after the last slash.
        if not key or "." in key or "/" in key:
            raise ValueError(f"key must be a name without '.' and '/', got {key!r}.")
        offset = self._add_member(f"{key}.{extension}", content)
        self._add_member(f"{key}.json", json.dumps(facts, ensure_ascii=False).encode())
        self._num_clips += 1
        return offset

    def _add_member(self, name: str, content: bytes) -> int:
        """Write one member and return the offset of its bytes."""
        # tarfile sets mode 0644, owner 0 and time 0: the bytes depend on the content alone.
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(content)
        # Members are padded to whole blocks.
        self._write(b"\0" * (-len(content) % _BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        """Write bytes, and update the checksum and the position."""
        self._file.write(content)
        self._hash.update(content)
        self._position += len(content)


def earlier_build(out: Path) -> dict[str, Any] | None:
    """Return the index.json of an earlier build in `out`.

    Returns None if `out` is empty or does not exist. Raises UserError if it has other
    content.
    """
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        raise UserError(
            f"--out must be a new folder, got the file {out}. Use another folder."
        )
    if os.path.ismount(out):
        raise UserError(
            f"--out must be a new folder, got the mount point {out}. Use a folder in it."
        )
    # An empty folder may be used.
    first = min(out.iterdir(), default=None)
    if first is None:
        return None
    try:
        return index.read_manifest(out)
    except UserError:
        raise UserError(
            f"--out must be a new or empty folder, got {out} with other files "
            f"({first.name}). Use another folder."
        ) from None


def write_index(
    folder: Path,
    *,
    corpus: str,
    language: str,
    options: Mapping[str, Any],
    splits: Mapping[str, tuple[list[dict[str, Any]], list[index.Shard]]],
    skipped: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    **more: Any,
) -> None:
    """Write the table of each split, and index.json.

    splits: (rows in stored order, tars) of each split. more: further entries of index.json.
    Raises OSError if the files cannot be written.
    """
    entries = {}
    for split, (rows, tars) in splits.items():
        table = index.write_table(folder / f"{split}.safetensors", rows)
        entries[split] = table | {"shards": [vars(tar) for tar in tars]}
    manifest = {
        "format": index.FORMAT,
        "corpus": corpus,
        "language": language,
        "options": dict(options),
        "splits": entries,
        "skipped": dict(skipped or {}),
        "notes": list(notes),
        **more,
    }
    (folder / "index.json").write_bytes(index_json(manifest))


def index_json(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of an index.json."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
