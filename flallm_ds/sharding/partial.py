"""A build that is not finished: what is kept of it, who may continue it, how it becomes
the shards.

    <out>.partial/
      lock        held while a build is at work there
      plan.json   what is built from what: a build of anything else may not continue here
      work/       finished tars under their jobs' names with a record each; other results to keep
      shards/     what becomes <out>

Whatever has its final name here is whole and on the disk, so a build may be killed at any
moment.
"""

import errno
import fnmatch
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from flallm_ds.errors import UserError
from flallm_ds.files import publish_folder, take_lock, write_json
from flallm_ds.sharding.build_plan import differences, plain

# All that a build puts into its folder, besides temporary files (*.tmp).
_NAMES = {"lock", "plan.json", "work", "shards"}
# A full disk, a full quota, a limit on the size of files.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Partial:
    """The folder of a build that is not finished yet; made by `hold`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = partial_folder(out)
        self.work, self.shards = self.folder / "work", self.folder / "shards"
        self.begun = False
        self._plan = self.folder / "plan.json"

    def begin(self, plan: Mapping[str, Any], restart: bool) -> None:
        """Continue what is there if it has the same plan, else begin from nothing.

        restart: throw away what is there. Raises UserError if another plan's results are
        there.
        """
        # Compare plans as they come back from JSON: a tuple has become a list there.
        plan = plain(plan)
        found = None
        if self._plan.is_file() and not restart:
            found = json.loads(self._plan.read_text(encoding="utf-8"))
        if found != plan:
            # Plans may differ without a change: another --max_skipped keeps all results.
            changes = differences(found or {}, plan)
            if found is not None and self.num_kept() and changes:
                raise UserError(
                    "an unfinished build must be gone on with as it was begun, but "
                    f"{'; '.join(changes)}: {self.folder}. Give what was given then, or "
                    f"throw its {self.num_kept():,} results away with --restart=true."
                )
            if found is None or changes:
                self.discard()
            self.folder.mkdir(exist_ok=True)
            write_json(self._plan, plan)
        self.work.mkdir(exist_ok=True)
        self.shards.mkdir(exist_ok=True)
        # Left by workers that were killed.
        for path in self.work.glob("*.tmp"):
            path.unlink()
        self.begun = True

    def num_kept(self) -> int:
        """Return how many results lie in work/."""
        return len(list(self.work.glob("*.json")))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the plain data that the first call of `make` gave, from work/{name}.json."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def finish(self) -> None:
        """Make shards/ the output folder, and remove the rest."""
        publish_folder(self.shards, self.out)
        self.discard()

    def discard(self) -> None:
        """Remove all results; the plan first, so that what is half removed is not continued."""
        self._plan.unlink(missing_ok=True)
        for path in (self.work, self.shards):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder; the lock last, by which it is known as a build's."""
        self.discard()
        with suppress(OSError):
            for path in self.folder.glob("*.tmp"):
                path.unlink()
            # Leave the folder if anything else is in it.
            lock = self.folder / "lock"
            if list(self.folder.iterdir()) == [lock]:
                lock.unlink()
                self.folder.rmdir()

    def check_ours(self) -> None:
        """Raise UserError if the folder holds what no build made."""
        names = {path.name for path in self.folder.iterdir()}
        strange = names - _NAMES - set(fnmatch.filter(names, "*.tmp"))
        # Every build creates the lock first. A work/ without a lock is somebody else's.
        if strange or (names and "lock" not in names):
            raise UserError(
                f"a build needs {self.folder} for itself, but it holds what no build of "
                f"ours made ({min(strange or names)}). Move that, or name another --out."
            )


def partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@contextmanager
def hold(out: Path) -> Iterator[Partial]:
    """The unfinished build of `out`, for this process alone.

    What was finished stays for the next time when the build ends early, for whatever
    reason, which a line on stderr says; a folder that holds nothing is removed. Raises
    UserError if another build is at work there or the disk refuses.
    """
    partial = Partial(out)
    try:
        with _lock(partial):
            try:
                yield partial
            # Also for Ctrl-C and SIGTERM: say what is kept, then let the error pass.
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt | SystemExit)
                count = partial.num_kept() if partial.begun else 0
                if count:
                    begin = "stopped: " if stopped else ""
                    kept = f"{begin}{count:,} results are kept in {partial.folder}"
                    _say(f"{kept}; the same command goes on")
                elif stopped:
                    _say("stopped before anything was finished; nothing is kept")
                raise
            finally:
                if not partial.num_kept():
                    partial.remove()
    except OSError as error:
        advice = "Give --out a place that you may write to."
        if error.errno in _NO_ROOM:
            advice = "Make room; the same command then goes on where it was."
        raise UserError(
            f"shards must be written to {out}, but {error.strerror or error} "
            f"({error.filename or partial.folder}). {advice}"
        ) from error


@contextmanager
def _lock(partial: Partial) -> Iterator[None]:
    lock = _take_lock(partial)
    if lock is None:
        raise UserError(
            "one build at a time must write to an output folder, but another is at work on "
            f"{partial.out}. Wait for it, or end it."
        )
    try:
        yield
    finally:
        lock.release()


def _take_lock(partial: Partial) -> FileLock | None:
    while True:
        partial.folder.mkdir(parents=True, exist_ok=True)
        try:
            partial.check_ours()
            return take_lock(partial.folder / "lock")
        # Another build has just finished and removed the folder: create it again.
        except FileNotFoundError:
            continue


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
