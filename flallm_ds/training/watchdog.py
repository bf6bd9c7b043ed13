"""Names the ranks that hold up a run, and ends a job that makes no progress.

Each rank has a thread that writes its state to RUN/heartbeats/rank-00003.json every few
seconds: step, phase, and since when. If a rank makes no progress for `warn_s` seconds, the
lowest rank whose own heartbeat is fresh prints which ranks are stuck where, and each rank
writes the Python stacks of its threads to RUN/heartbeats/rank-00003.stacks.txt. After
`limit_s` seconds the rank ends its process with the code that requeues a job.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flallm_ds.dist import World
from flallm_ds.errors import Preempted
from flallm_ds.files import write_file

FOLDER = "heartbeats"
WRITE_EVERY_S = 5.0
# A heartbeat that is older than this is from a process that is stopped, killed or cut off.
STALE_S = 2.5 * WRITE_EVERY_S


@dataclass
class Heartbeat:
    """The state of a rank. since, written: seconds since 1970."""

    rank: int
    host: str
    pid: int = 0
    step: int = 0
    phase: str = "start"
    since: float = 0.0
    written: float = 0.0

    def describe(self, now: float) -> str:
        """Return a sentence without its end about a rank that does not move."""
        place = f"rank {self.rank} on {self.host}"
        if now - self.written > STALE_S:
            seen = time.strftime("%H:%M:%S", time.localtime(self.written))
            return f"{place} has not been heard of since {seen}, in {self.phase}"
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"{place} is in {self.phase} since {since}"


class Watchdog:
    """`with Watchdog(...) as watchdog`, and `watchdog.beat(phase, step)` at each change.

    warn_s, limit_s: seconds without a beat until the report and until the end of the
    process; 0 disables the end.
    """

    def __init__(self, run: Path, world: World, warn_s: float, limit_s: float) -> None:
        self.folder, self.world = run / FOLDER, world
        self.warn_s, self.limit_s = warn_s, limit_s
        self._own = Heartbeat(world.rank, socket.gethostname(), os.getpid())
        self._own.since = time.time()
        self._ended = threading.Event()
        self._reported = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, phase: str, step: int) -> None:
        """Record progress. Cheap: the thread writes the file."""
        self._own.phase, self._own.step, self._own.since = phase, step, time.time()
        self._reported = False

    # --- the thread

    def _watch(self) -> None:
        while not self._ended.wait(min(WRITE_EVERY_S, self.warn_s)):
            now = time.time()
            self._own.written = now
            # A full disk must not end the watch; training reports it.
            with suppress(OSError):
                write_file(
                    self._path(self.world.rank), json.dumps(asdict(self._own)).encode()
                )
            waited = now - self._own.since
            if waited > self.warn_s and not self._reported:
                self._reported = True
                self._report(now, waited)
            if self.limit_s and waited > self.limit_s:
                self._end(waited)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _report(self, now: float, waited: float) -> None:
        """Write the stacks of this rank; one rank names those that hold up the others."""
        with suppress(OSError):
            path = self.folder / f"rank-{self.world.rank:05d}.stacks.txt"
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        beats = self._heartbeats()
        fresh = [beat.rank for beat in beats if now - beat.written <= STALE_S]
        if fresh and self.world.rank == min(fresh):
            print(self._sentence(beats, now, waited), flush=True)

    def _heartbeats(self) -> list[Heartbeat]:
        """Read the heartbeats of all ranks that can be read."""
        beats = []
        for rank in range(self.world.size):
            with suppress(OSError, ValueError, TypeError):
                content = self._path(rank).read_text(encoding="utf-8")
                beats.append(Heartbeat(**json.loads(content)))
        return beats

    def _sentence(self, beats: list[Heartbeat], now: float, waited: float) -> str:
        """Name the ranks that the others wait for.

        These are ranks without a fresh heartbeat; else ranks that are behind, in step or
        phase; if all are alike, their common phase.
        """
        suspects = [beat for beat in beats if now - beat.written > STALE_S]
        if not suspects:
            # The rank that stopped first is where the others are not: in a phase of few.
            phases = [(beat.step, beat.phase) for beat in beats]
            rarest = min(map(phases.count, phases))
            suspects = [b for b in beats if phases.count((b.step, b.phase)) == rarest]
        named = "; ".join(beat.describe(now) for beat in suspects[:3])
        more = f"; and {len(suspects) - 3} more ranks" if len(suspects) > 3 else ""
        return (
            f"warning: no progress for {waited:.0f} s: {named}{more}. Python stacks are in "
            f"{self.folder}."
        )

    def _end(self, waited: float) -> None:
        print(
            f"rank {self.world.rank}: no progress for {waited:.0f} s, the limit of "
            "train.stall_limit_s. The job ends; run the same command again to resume.",
            flush=True,
        )
        os._exit(Preempted.exit_code)
