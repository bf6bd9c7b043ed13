"""Keep the results of an unfinished build, so that the same command can continue it.

    <out>.partial/
      lock        locked while a build is running
      plan.json   describes the build; a build with another plan cannot continue here
      work/       a finished tar and its record for each job, and other results to keep
      shards/     becomes <out> at the end

A file gets its final name only after it is complete and on the disk. So a build may be
killed at any time.
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

# The files and folders of a build, besides temporary files (*.tmp).
_NAMES = {"lock", "plan.json", "work", "shards"}
# A full disk, a full quota, a limit on the size of files.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InUse(UserError):
    """Another process builds the same output."""


class Partial:
    """Manage the folder of an unfinished build. `hold` creates it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = partial_folder(out)
        self.work, self.shards = self.folder / "work", self.folder / "shards"
        self.begun = False
        self._plan = self.folder / "plan.json"

    def begin(self, plan: Mapping[str, Any], restart: bool) -> None:
        """Continue the build in the folder if it has the same plan, or start a new one.

        restart: delete the results in the folder. Raises UserError if the folder has
        results of another plan.
        """
        # Compare plans as JSON stores them, with lists instead of tuples.
        plan = plain(plan)
        found = None
        if self._plan.is_file() and not restart:
            found = json.loads(self._plan.read_text(encoding="utf-8"))
        if found != plan:
            # With another --max_skipped the plans differ, but all results can be used:
            # `changes` is empty.
            changes = differences(found or {}, plan)
            if found is not None and self.num_kept() and changes:
                raise UserError(
                    f"The unfinished build in {self.folder} was made with other settings "
                    f"({'; '.join(changes)}). Use the same settings, or delete its "
                    f"{self.num_kept():,} results with --restart=true."
                )
            if found is None or changes:
                self.discard()
            self.folder.mkdir(exist_ok=True)
            write_json(self._plan, plan)
        self.work.mkdir(exist_ok=True)
        self.shards.mkdir(exist_ok=True)
        # Killed workers leave temporary files.
        for path in self.work.glob("*.tmp"):
            path.unlink()
        self.begun = True

    def num_kept(self) -> int:
        """Return the number of results in work/."""
        return len(list(self.work.glob("*.json")))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the data in work/{name}.json, which the first call gets from `make`."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def finish(self) -> None:
        """Publish shards/ as the output folder, and remove the other files."""
        publish_folder(self.shards, self.out)
        self.discard()

    def discard(self) -> None:
        """Remove all results.

        The plan is removed first: without it, no build continues the remaining results.
        """
        self._plan.unlink(missing_ok=True)
        for path in (self.work, self.shards):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder, the lock last: the lock marks the folder as one of a build."""
        self.discard()
        with suppress(OSError):
            for path in self.folder.glob("*.tmp"):
                path.unlink()
            # Keep the folder if it has other files.
            lock = self.folder / "lock"
            if list(self.folder.iterdir()) == [lock]:
                lock.unlink()
                self.folder.rmdir()

    def check_ours(self) -> None:
        """Raise UserError if the folder has files that no build made."""
        names = {path.name for path in self.folder.iterdir()}
        strange = names - _NAMES - set(fnmatch.filter(names, "*.tmp"))
        # Every build creates the lock first. A folder without one is not of a build.
        if strange or (names and "lock" not in names):
            raise UserError(
                f"{self.folder} must have only files of an unfinished build, got "
                f"{min(strange or names)}. Move it away, or use another --out."
            )


def partial_folder(out: Path) -> Path:
    """Return the folder of the unfinished build of `out`."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def hold(out: Path) -> Iterator[Partial]:
    """Lock the unfinished build of `out` for this process, and yield it.

    If the build ends early, finished results are kept, and a line on stderr says so. A
    folder without results is removed. Raises UserError if another build is running there,
    or if the folder cannot be written.
    """
    # The outer `try` also covers the lock and the removal of the folder: all can fail on a
    # full or read-only disk.
    partial = Partial(out)
    try:
        with _lock(partial):
            try:
                yield partial
            # BaseException: also for Ctrl-C and SIGTERM.
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt | SystemExit)
                count = partial.num_kept() if partial.begun else 0
                if count:
                    begin = "stopped: " if stopped else ""
                    kept = f"{begin}{count:,} results are kept in {partial.folder}"
                    _say(f"{kept}; run the same command again to continue")
                elif stopped:
                    _say("stopped before the first result; nothing is kept")
                raise
            finally:
                if not partial.num_kept():
                    partial.remove()
    except OSError as error:
        advice = "Use an --out that you may write to."
        if error.errno in _NO_ROOM:
            advice = "Free some space and run the same command again to continue."
        raise UserError(
            f"Cannot write shards to {out}: {error.strerror or error} "
            f"({error.filename or partial.folder}). {advice}"
        ) from error


@contextmanager
def _lock(partial: Partial) -> Iterator[None]:
    """Hold the lock of a build. Raises UserError if another process has it."""
    lock = _take_lock(partial)
    if lock is None:
        raise InUse(
            f"--out {partial.out} is in use by another build. Wait for it, or stop it."
        )
    try:
        yield
    finally:
        lock.release()


def _take_lock(partial: Partial) -> FileLock | None:
    """Create the folder and take its lock. Returns None if another process has the lock."""
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
