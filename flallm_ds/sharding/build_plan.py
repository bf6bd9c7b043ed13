"""Describe the input and the options of a build, to compare two builds."""

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

# The entries of a plan that index.json stores.
_IN_THE_INDEX = ("importer", "corpus", "options", "source")


def make_plan(
    importer: str, corpus: Corpus, clips: dict[str, list[Clip]], options: dict[str, Any]
) -> dict[str, Any]:
    """Return the plan of a build as plain values.

    The path of the source and the times of its files are left out: they do not change the
    shards.
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
        # Other versions of the libraries may decode or encode to other bytes.
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
    """Return the key and the row of a clip, without the path."""
    # The same corpus in another folder gives the same shards.
    return [clip.key, vars(clip.row) | {"path": None}]


def _facts_and_sizes(clip: Clip) -> list[Any]:
    """Return the facts of a clip and the sizes of its source files."""
    # A stamp is "sizes times". Times do not count: a copy of the corpus has new ones.
    sizes, _ = clip.stamp.split()
    return [_facts(clip), sizes]


def plain(content: Any) -> Any:
    """Return the content as JSON stores it: tuples become lists, paths become strings."""
    return json.loads(json.dumps(content, default=str))


def is_built(out: Path, plan: dict[str, Any]) -> bool:
    """Return whether `out` has the shards of this plan; if so, print that.

    Raises UserError if `out` has shards of another plan, or if some are missing.
    """
    found = earlier_build(out)
    if found is None:
        return False
    # Library versions are not compared: finished shards stay valid after an update.
    wanted = {name: plan[name] for name in _IN_THE_INDEX}
    changes = differences(found, wanted)
    if changes:
        raise UserError(
            f"--out {out} belongs to another build ({'; '.join(changes)}). Remove the "
            "folder, or use another --out."
        )
    # Compare sizes only: reading terabytes again is the work of verify.py.
    shards = []
    for entry in found["splits"].values():
        shards += entry["shards"]
    for shard in shards:
        path = out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"Cannot use the earlier build in {out}: {shard['file']} is missing or "
                "truncated. Run shards/verify.py, or remove the folder and build it again."
            )
    print(
        f"already built: {len(shards):,} shards of this source and these options are in "
        f"{out}"
    )
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each difference of two plans, such as "--fps none, got 25.0".

    A build may continue with another --max_skipped, so that option is not compared.
    """
    changes = []
    for name in ("importer", "corpus"):
        if old.get(name) != new.get(name):
            changes.append(f"{name} {_shown(old.get(name))}, got {_shown(new.get(name))}")
    for section, prefix in (("options", "--"), ("made_by", "version of ")):
        for name, before, now in _changed(old, new, section):
            if name != "max_skipped":
                changes.append(f"{prefix}{name} {_shown(before)}, got {_shown(now)}")
    for section, what in (("rows", "rows"), ("source", "rows or videos")):
        # Another --limit, for example, also gives other rows: name the option alone.
        if changes:
            break
        for split, _, _ in _changed(old, new, section):
            changes.append(f"other {what} in {split}")
    return changes


def _changed(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    section: str,
) -> list[tuple[str, Any, Any]]:
    """Return (name, old value, new value) for each difference in a section of two plans."""
    before, now = old.get(section, {}), new.get(section, {})
    changed = []
    # The names of both plans, each once.
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            changed.append((name, before.get(name), now.get(name)))
    return changed


def _shown(value: Any) -> str:
    """Return a value as a user writes it on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
