"""The plan of a build: what is built from what, to tell whether two builds are the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import cv2
import simplejpeg

from flallm_ds.data.index import FORMAT
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import Corpus
from flallm_ds.sharding.rows import Clip, digest
from flallm_ds.sharding.writer import earlier_build

_IN_THE_INDEX = ("importer", "corpus", "options", "source")  # of a plan


def plan_of(
    importer: str, corpus: Corpus, clips: dict[str, list[Clip]], options: dict[str, Any]
) -> dict[str, Any]:
    """Return the plan as plain values.

    It holds neither where the source lies nor its times: they do not decide what is in
    the shards.
    """
    rows, source = {}, {}
    for split, some in clips.items():
        rows[split] = digest(map(_facts, some))
        source[split] = digest((_facts(clip), clip.stamp.split()[0]) for clip in some)
    plan = {
        "importer": importer,
        "corpus": corpus.name,
        "options": options,
        "rows": rows,
        "source": source,
        "made_by": {
            "shards": FORMAT,
            "av": av.__version__,
            "simplejpeg": simplejpeg.__version__,
            "opencv": cv2.__version__,
        },
    }
    found: dict[str, Any] = plain(plan)
    return found


def _facts(clip: Clip) -> list[Any]:
    """Return what the tables say of a clip."""
    return [clip.key, vars(clip.row) | {"path": None}]


def plain(content: Any) -> Any:
    """Return the content as it comes back from a JSON file: without tuples and paths."""
    return json.loads(json.dumps(content, default=str))


def is_built(out: Path, plan: dict[str, Any]) -> bool:
    """Whether `out` holds the shards of this plan already; prints that it does.

    Raises UserError if it holds others, or if some are missing.
    """
    found = earlier_build(out)
    if found is None:
        return False
    changes = differences(found, {name: plan[name] for name in _IN_THE_INDEX})
    if changes:
        raise UserError(
            f"--out must be a new or empty folder, but {out} holds an earlier build: "
            f"{'; '.join(changes)}. Remove it, or name another folder."
        )
    shards = [shard for entry in found["splits"].values() for shard in entry["shards"]]
    for shard in shards:
        path = out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"an earlier build must be whole, but {shard['file']} is missing or cut "
                f"short in {out}. Run shards/verify.py, or remove the folder and build it "
                "again."
            )
    print(
        f"already built: {len(shards):,} shards of this source and these options are in "
        f"{out}"
    )
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in words what two plans do not have in common.

    A bound on what is skipped is no part of a plan.
    """
    changes = []
    for name in ("importer", "corpus"):
        if old.get(name) != new.get(name):
            changes.append(
                f"the {name} was {_word(old.get(name))}, is {_word(new.get(name))}"
            )
    for section, prefix in (("options", "--"), ("made_by", "the version of ")):
        for name, before, now in _changed(old, new, section):
            if name != "max_skipped":
                changes.append(f"{prefix}{name} was {_word(before)}, is {_word(now)}")
    for section, what in (("rows", "rows"), ("source", "rows or videos")):
        if changes:  # another option may mean other rows
            break
        for split, _, _ in _changed(old, new, section):
            changes.append(f"{split} has other {what} than then")
    return changes


def _changed(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    section: str,
) -> list[tuple[str, Any, Any]]:
    """Return (name, old value, new value) of what differs in one section of two plans."""
    before, now = old.get(section, {}), new.get(section, {})
    names = dict.fromkeys([*before, *now])
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
