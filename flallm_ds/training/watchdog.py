"""Names the ranks that hold up a run, and ends a job that makes no progress.

Each rank has a thread that writes its state to RUN/heartbeats/rank-00003.json every few
seconds: step, phase, and since when. If a rank makes no progress for `warn_s` seconds, the
lowest rank whose own heartbeat is fresh prints which ranks are stuck where, and each rank
writes the Python stacks of its threads to RUN/heartbeats/rank-00003.stacks.txt. After
`limit_s` seconds the rank ends its process with code 124. Under SLURM this counts as a crash,
which restarts the job a limited number of times: a hang may happen again. A rank whose
launcher has ended does so after `warn_s`: nobody else would end it.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flallm_ds.dist import World
from flallm_ds.training.heartbeats import (
    ENDED,
    FOLDER,
    STALE_S,
    WRITE_EVERY_S,
    Heartbeat,
    read_heartbeats,
)

# As of the program `timeout`. Not that of Preempted, which requeues a job without a limit.
STALL_CODE = 124


class Watchdog:
    """`with Watchdog(...) as watchdog`, and `watchdog.beat(phase, step)` at each change.

    warn_s, limit_s: seconds without a beat until the report and until the end of the
    process; 0 disables the end. is_orphan: whether a launcher of this process has ended.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        warn_s: float,
        limit_s: float,
        is_orphan: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run, self.folder, self.world = run, run / FOLDER, world
        self.warn_s, self.limit_s, self.is_orphan = warn_s, limit_s, is_orphan
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
        self._own.phase, self._own.since = ENDED, time.time()
        self._write()

    def beat(self, phase: str, step: int) -> None:
        """Record progress. Cheap: the thread writes the file."""
        self._own.phase, self._own.step, self._own.since = phase, step, time.time()
        self._reported = False

    def measured(self, own_s: float, waited_s: float) -> None:
        """Record the own time of the last step, and how much of it was waiting for data."""
        self._own.own_s, self._own.waited_s = own_s, waited_s

    # --- the thread

    def _watch(self) -> None:
        while not self._ended.wait(min(WRITE_EVERY_S, self.warn_s)):
            self._write()
            now = self._own.written
            waited = now - self._own.since
            if waited > self.warn_s and not self._reported:
                self._reported = True
                self._report(now, waited)
            if self.is_orphan() and waited > self.warn_s:
                self._end(waited, "train.stall_warn_s without a launcher")
            if self.limit_s and waited > self.limit_s:
                self._end(waited, "train.stall_limit_s")

    def _write(self) -> None:
        self._own.written = time.time()
        # A full disk must not end the watch; training reports it.
        with suppress(OSError):
            self._own.write(self.run)

    def _report(self, now: float, waited: float) -> None:
        """Write the stacks of this rank; one rank names those that hold up the others."""
        with suppress(OSError):
            path = self.folder / f"rank-{self.world.rank:05d}.stacks.txt"
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        beats = read_heartbeats(self.run, range(self.world.size))
        fresh = [beat.rank for beat in beats if now - beat.written <= STALE_S]
        if fresh and self.world.rank == min(fresh):
            print(self._sentence(beats, now, waited), flush=True)

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

    def _end(self, waited: float, limit: str) -> None:
        print(
            f"rank {self.world.rank}: no progress for {waited:.0f} s, the limit of "
            f"{limit}. The job ends; run the same command again to resume.",
            flush=True,
        )
        os._exit(STALL_CODE)
