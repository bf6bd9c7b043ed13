"""Build a corpus in parts on several machines, and merge the parts.

    <out>.parts/
      1-of-3.partial/  an unfinished part, as the unfinished build of `partial.py`
      2-of-3/          a finished part: tars, their records, plan.json

A part is every third job of the build. To merge them, their tars and records become those
of an unfinished build of <out>, in which nothing is left to do: the result has the bytes of
a build without parts, and a merge that was killed continues.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flallm_ds.errors import UserError
from flallm_ds.files import publish_folder, write_json
from flallm_ds.sharding.build_plan import differences
from flallm_ds.sharding.partial import InUse, Partial, hold, partial_folder

_PLAN = "plan.json"
_NAME = re.compile(r"(?P<number>\d+)-of-(?P<count>\d+)")


def parts_folder(out: Path) -> Path:
    """Return the folder of the parts of `out`."""
    return out.with_name(f"{out.name}.parts")


def part_folder(out: Path, number: int, count: int) -> Path:
    """Return the folder of a finished part. number: from 1."""
    return parts_folder(out) / f"{number}-of-{count}"


def publish_part(partial: Partial, plan: Mapping[str, Any]) -> None:
    """Publish the work of a part, in which every job is finished. Raises OSError."""
    write_json(partial.work / _PLAN, plan)
    publish_folder(partial.work, partial.out)


def is_part_built(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Return whether a part is finished. Raises UserError if it is of another plan."""
    if not folder.is_dir():
        return False
    _check_plan(folder, plan)
    return True


def missing_parts(out: Path, count: int) -> list[str]:
    """Return the parts that are not finished, such as "2/3"."""
    missing: list[str] = []
    for number in range(1, count + 1):
        if not part_folder(out, number, count).is_dir():
            missing.append(f"{number}/{count}")
    return missing


def take_parts(out: Path, plan: Mapping[str, Any], partial: Partial) -> None:
    """Move the tars and the records of all parts to the unfinished build of `out`.

    Does nothing without parts. May be called again after an interruption. Raises UserError
    if parts are missing, or were made with other settings.
    """
    folder = parts_folder(out)
    finished = _finished(folder)
    # A part that is being built counts as one: its name has a suffix.
    started = list(folder.glob("*-of-*")) if folder.is_dir() else []
    if not started:
        return
    counts: set[str] = set()
    for path in started:
        counts.add(path.name.split("-of-")[1].removesuffix(".partial"))
    if len(counts) > 1:
        raise UserError(
            f"Cannot merge the parts in {folder}: the number of parts differs "
            f"({' and '.join(sorted(counts))}). Remove those that are not wanted."
        )
    missing = missing_parts(out, int(counts.pop()))
    if missing:
        raise UserError(
            f"Cannot merge the parts in {folder}: {', '.join(missing)} missing or "
            f"unfinished. Run with --part={missing[0]}, or remove the folder to build "
            "without parts."
        )
    for part in finished:
        _check_plan(part, plan)
    print(f"merging {len(finished)} parts", flush=True)
    for part in finished:
        # A tar before its record, as it was written: a record without a tar is an error.
        for path in sorted(part.iterdir(), key=lambda path: path.suffix == ".json"):
            if path.name != _PLAN:
                path.rename(partial.work / path.name)


def remove_parts(out: Path) -> None:
    """Remove the finished parts of a build that is published."""
    folder = parts_folder(out)
    for part in _finished(folder):
        # A process that was killed just after it published a part leaves a plan and a lock.
        if partial_folder(part).exists():
            with suppress(InUse), hold(part) as partial:
                partial.discard()
        shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):  # not empty, or there are no parts
        folder.rmdir()


def _finished(folder: Path) -> list[Path]:
    """Return the folders of the finished parts."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _check_plan(part: Path, plan: Mapping[str, Any]) -> None:
    """Raise UserError if a part was built with other settings."""
    found = json.loads((part / _PLAN).read_text(encoding="utf-8"))
    changes = differences(found, plan)
    if changes:
        raise UserError(
            f"The part in {part} was made with other settings ({'; '.join(changes)}). Use "
            "the same settings, or build the part again with --restart=true."
        )
