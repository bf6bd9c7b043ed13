"""The files RUN/heartbeats/rank-00003.json: what each rank does; no slow import."""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flallm_ds.files import write_file

FOLDER = "heartbeats"
WRITE_EVERY_S = 5.0
# A heartbeat that is older than this is from a process that is stopped, killed or cut off.
STALE_S = 2.5 * WRITE_EVERY_S
ENDED = "ended"  # the phase after the last step, also after an error


@dataclass
class Heartbeat:
    """The state of a rank.

    since, written: seconds since 1970. own_s, waited_s: own time of its last step, and how
    much of it the rank waited for data (see `RankReport`).
    """

    rank: int
    host: str
    pid: int = 0
    step: int = 0
    phase: str = "start"
    since: float = 0.0
    written: float = 0.0
    own_s: float = 0.0
    waited_s: float = 0.0

    def describe(self, now: float) -> str:
        """Return a sentence without its end about a rank that does not move."""
        place = f"rank {self.rank} on {self.host}"
        if now - self.written > STALE_S:
            seen = time.strftime("%H:%M:%S", time.localtime(self.written))
            return f"{place} has not been heard of since {seen}, in {self.phase}"
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"{place} is in {self.phase} since {since}"

    def write(self, run: Path) -> None:
        """Write the file of this rank. Raises OSError."""
        write_file(path_of(run, self.rank), json.dumps(asdict(self)).encode())


def path_of(run: Path, rank: int) -> Path:
    """Return the file of a rank."""
    return run / FOLDER / f"rank-{rank:05d}.json"


def read_heartbeats(run: Path, ranks: Iterable[int]) -> list[Heartbeat]:
    """Return the heartbeats of these ranks that can be read, in their order."""
    beats = []
    for rank in ranks:
        with suppress(OSError, ValueError, TypeError):
            content = path_of(run, rank).read_text(encoding="utf-8")
            beats.append(Heartbeat(**json.loads(content)))
    return beats
