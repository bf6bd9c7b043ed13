"""Writing a shard folder: clips into ordinary WebDataset tars, their places into the index.

    with ShardWriter(folder / "train-000000.tar", shard=0) as tar:
        rows.append(tar.add(key, jpegs, fps=25.0, height=256, width=256, id=..., text=..., ...))
    write_index(folder, ..., splits={"train": (rows, [tar.shard_entry])})
    publish_folder(folder, out)                            # appears whole at `out`, or not at all

The bytes depend on nothing but the clips: no time, owner, or number of workers is in
them.
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
    """One tar, written front to back: `<key>.avi` (or `.mp4`) and then `<key>.json` for
    each clip.

    shard: the tar's row in its split's list, for the index. `shard_entry` is what that
    list says of the tar, once it is closed.
    """

    def __init__(self, path: Path, shard: int) -> None:
        self._path, self._shard = path, shard
        # "x": never write over a file of somebody else.
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
        """End the tar; it is on the disk then."""
        # Two empty blocks end a tar. Then it is padded to whole records.
        self._write(b"\0" * 2 * _BLOCK)
        self._write(b"\0" * (-self._position % _RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is, whether or not the disk still takes it."""
        with suppress(OSError):
            self._file.close()

    def bytes_with(self, clip_bytes: int) -> int:
        """Return how large the tar would be, at most, with one more clip of that size."""
        # Five blocks: two headers, the padding of the clip, and the two empty blocks at the
        # end of the tar.
        end = self._position + 5 * _BLOCK + clip_bytes + _JSON_BYTES
        return end + -end % _RECORD

    @property
    def shard_entry(self) -> index.Shard:
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
        """Append a clip of JPEGs and return its row for the index.

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
        """Append a stored clip and return its row for the index.

        more: goes into its JSON only (gloss, for one). Raises ValueError for a key that
        WebDataset would cut.
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
        """Append a member and a JSON of facts behind it; return where the member's bytes begin.

        Raises ValueError for a key that WebDataset would cut.
        """
        if not key or "." in key or "/" in key:
            why = "WebDataset cuts names there"
            raise ValueError(f"a key must be dot-free ({why}), but is {key!r}.")
        offset = self._add_member(f"{key}.{extension}", content)
        self._add_member(f"{key}.json", json.dumps(facts, ensure_ascii=False).encode())
        self._num_clips += 1
        return offset

    def _add_member(self, name: str, content: bytes) -> int:
        """Write one member and return where its bytes begin."""
        # Mode 0644, owner 0 and time 0 are the defaults of tarfile: the bytes depend on the
        # content alone.
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(content)
        # Members are padded to whole blocks.
        self._write(b"\0" * (-len(content) % _BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._position += len(content)


def earlier_build(out: Path) -> dict[str, Any] | None:
    """Return the index.json of the build that lies at `out`; None where a new one may go.

    Raises UserError if something else lies there.
    """
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        raise UserError(
            f"--out must be a new folder, but is a file: {out}. Name another folder."
        )
    if os.path.ismount(out):
        raise UserError(
            f"--out must be a new folder, but a disk is mounted there: {out}. Name a "
            "folder in it."
        )
    # An empty folder may be used. The error names one file of any other.
    first = min(out.iterdir(), default=None)
    if first is None:
        return None
    try:
        return index.read_manifest(out)
    except UserError:
        raise UserError(
            f"--out must be a new or empty folder, but {out} holds what no build of ours "
            f"made ({first.name}). Name another folder."
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
    """Write each split's table and index.json. splits: (rows in stored order, tars) of
    each split.

    more: what else index.json says. Raises OSError if the disk refuses.
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
