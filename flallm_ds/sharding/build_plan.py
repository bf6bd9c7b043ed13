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

# The entries of a plan that index.json keeps.
_IN_THE_INDEX = ("importer", "corpus", "options", "source")


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
        source[split] = digest(map(_facts_and_sizes, some))
    plan = {
        "importer": importer,
        "corpus": corpus.name,
        "options": options,
        "rows": rows,
        "source": source,
        # Another version may decode or encode to other bytes.
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
    # Without the path: the same corpus in another folder gives the same shards.
    return [clip.key, vars(clip.row) | {"path": None}]


def _facts_and_sizes(clip: Clip) -> list[Any]:
    """Return what the tables say of a clip, and the sizes of its source files."""
    # A stamp is "sizes times". Times do not count: a copy of the corpus has new ones.
    sizes, _ = clip.stamp.split()
    return [_facts(clip), sizes]


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
    wanted = {name: plan[name] for name in _IN_THE_INDEX}
    changes = differences(found, wanted)
    if changes:
        raise UserError(
            f"--out must be a new or empty folder, but {out} holds an earlier build: "
            f"{'; '.join(changes)}. Remove it, or name another folder."
        )
    # Compare sizes only: reading terabytes again is the work of verify.py.
    shards = []
    for entry in found["splits"].values():
        shards += entry["shards"]
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
        # Another option, such as --limit, also gives other rows: name the option alone.
        if changes:
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
    changed = []
    # All names of both, once each, those of the old plan first.
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            changed.append((name, before.get(name), now.get(name)))
    return changed


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    # None, true and false as a user writes them on the command line.
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
