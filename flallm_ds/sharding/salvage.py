"""Copy the undamaged clips of a broken tar, in a worker process of a repair."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flallm_ds.data.index import Shard
from flallm_ds.sharding import pool
from flallm_ds.sharding.check import TarCheck, check_clip, clip_span, read_only
from flallm_ds.sharding.writer import ShardWriter


@dataclass(frozen=True)
class Salvage:
    """Hold a broken tar, and the folder for the new tar."""

    tar: TarCheck
    scratch: Path


@dataclass
class Salvaged:
    """Hold the result for one tar.

    rows: rows of the index. shard: entry of the new tar in index.json, None if no clip is
    left. lost: one sentence for each lost clip.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    shard: Shard | None = None
    lost: list[str] = field(default_factory=list)


def salvage(todo: Salvage) -> Salvaged:
    """Copy the undamaged clips of a tar into a new tar.

    The new tar is named after its content, unless it is identical to the original.
    """
    # A lost clip is named with its split and id, as the user finds it in the corpus.
    source, made = todo.tar, Salvaged()
    names = [f"{source.split} {row['id']} ({row['key']})" for row in source.rows]
    try:
        content = read_only(source.path)
    except OSError as error:
        why = f"was in a tar that cannot be read: {error.strerror}"
        made.lost = [f"{name} {why}" for name in names]
        return made
    # Copy the bytes of the clips, without encoding them again, in the order of the index.
    path = todo.scratch / source.shard.file
    with ShardWriter(path, 0) as tar:
        for name, row in zip(names, source.rows, strict=True):
            faults = check_clip(content, row)
            if faults:
                made.lost.append(f"{name} {faults[0]}")
            else:
                made.rows.append(_copy(content, row, tar))
            pool.check_stop()
            pool.tick()
    if not made.rows:
        path.unlink()
        return made
    # A tar with other content gets another name: the broken file is needed until index.json
    # changes. The name of a tar from an earlier repair already has a digest, which is
    # replaced.
    made.shard = tar.shard_entry
    if made.shard != source.shard:
        base = re.sub(r"-[0-9a-f]{8}$", "", path.stem)
        new_name = f"{base}-{made.shard.sha256[:8]}.tar"
        made.shard = Shard(**vars(made.shard) | {"file": new_name})
        path.rename(path.with_name(new_name))
    return made


def _copy(content: memoryview, row: dict[str, Any], tar: ShardWriter) -> dict[str, Any]:
    """Append an undamaged clip to a tar, and return the row for the index."""
    _, begin, json_begin, json_end = clip_span(content, row)
    clip = bytes(content[begin : begin + row["size"]])
    facts = json.loads(bytes(content[json_begin:json_end]))
    return tar.add_clip(row["key"], clip, **facts)
