"""Reads the state of a run from its folder, without disturbing the run."""

import json
import os
import shutil
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.terminal import one_line
from flallm_ds.training.heartbeats import ENDED, FOLDER, Heartbeat, read_heartbeats
from flallm_ds.training.records import METRICS, parse_records

RECENT = 100  # steps over which speeds and losses are averaged
# Longer than STALE_S of the watchdog: a network disk shows a file up to a minute late.
SILENT_S = 75.0
GONE_S = 180.0  # after which a run without any sign has ended
_LOG_BYTES = 4096
_TIME_COLUMNS = 20  # of a line of log.txt


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint. saved: seconds since 1970."""

    name: str
    saved: float
    num_bytes: int


@dataclass(frozen=True)
class RunState:
    """The state of a run at one time. Times are in seconds since 1970.

    steps: the last 2 * RECENT steps. best, last_score: records of eval.split. beats: of
    the ranks of the last start. started: when that was; 0 if unknown. last_line: of
    log.txt. disk_free: bytes.
    """

    now: float
    run: Path
    config: RunConfig
    steps: list[dict[str, Any]]
    best: dict[str, Any] | None
    last_score: dict[str, Any] | None
    beats: list[Heartbeat]
    started: float
    checkpoint: Checkpoint | None
    disk_free: int
    last_line: str

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The last RECENT steps."""
        return self.steps[-RECENT:]

    @property
    def silent(self) -> list[Heartbeat]:
        """The ranks that should write heartbeats, but do not."""
        found = []
        for beat in self.beats:
            if beat.phase != ENDED and self.now - beat.written > SILENT_S:
                found.append(beat)
        return found

    @property
    def has_ended(self) -> bool:
        """Whether all ranks have ended, or none has given a sign for GONE_S, or the start
        ended with an error."""
        if not self.beats:
            return self.last_line[_TIME_COLUMNS:].startswith("error: ")
        newest = max(beat.written for beat in self.beats)
        all_ended = all(beat.phase == ENDED for beat in self.beats)
        return all_ended or self.now - newest > GONE_S

    @property
    def is_running(self) -> bool:
        """Whether the run makes steps; False while it starts and after its end."""
        return bool(self.beats) and not self.has_ended


class RunReader:
    """Reads the folder of a run repeatedly; of metrics.jsonl only what is new.

    Raises UserError if the folder is not that of a run.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "config.json").is_file():
            raise UserError(
                f"Cannot watch {run}: it has no config.json. Give the folder of a run."
            )
        self.run = run
        self.config = RunConfig.load(run / "config.json")
        self._forget()

    def _forget(self) -> None:
        self._offset, self._inode = 0, 0
        self._steps: deque[dict[str, Any]] = deque(maxlen=2 * RECENT)
        self._best: dict[str, Any] | None = None
        self._last_score: dict[str, Any] | None = None

    def read(self, now: float) -> RunState:
        """Return the state of the run. now: seconds since 1970."""
        self._read_metrics()
        started, beats = self._beats()
        return RunState(
            now=now,
            run=self.run,
            config=self.config,
            steps=list(self._steps),
            best=self._best,
            last_score=self._last_score,
            beats=beats,
            started=started,
            checkpoint=_newest_checkpoint(self.run),
            disk_free=shutil.disk_usage(self.run).free,
            last_line=_last_line(self.run / "log.txt"),
        )

    def _read_metrics(self) -> None:
        """Read the lines that were added to metrics.jsonl."""
        with suppress(FileNotFoundError), (self.run / METRICS).open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            # A resumed run replaces the file by one without the steps that it repeats.
            if inode != self._inode:
                self._forget()
                self._inode = inode
            file.seek(self._offset)
            # Of the last line, a part may be missing: it is read again.
            added = file.read()
            complete = added[: added.rfind(b"\n") + 1]
            self._offset += len(complete)
            for record in parse_records(complete.decode().splitlines(keepends=True)):
                self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self._steps.append(record)
        elif record["kind"] == self.config.eval.split:
            self._last_score = record
            if self._best is None or record["bleu4"] > self._best["bleu4"]:
                self._best = record

    def _beats(self) -> tuple[float, list[Heartbeat]]:
        """Return when the last start was, and the heartbeats of its ranks."""
        started, num_ranks = 0.0, None
        with suppress(OSError, ValueError, KeyError, IndexError):
            versions = self.run / "versions.json"
            starts = json.loads(versions.read_text(encoding="utf-8"))["starts"]
            num_ranks = int(starts[-1]["ranks"])
            started = versions.stat().st_mtime
        if num_ranks is None:
            num_ranks = len(list((self.run / FOLDER).glob("rank-*.json")))
        beats = read_heartbeats(self.run, range(num_ranks))
        # Older ones are of the start before.
        return started, [beat for beat in beats if beat.written >= started]


def _newest_checkpoint(run: Path) -> Checkpoint | None:
    paths = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    # An old checkpoint may be removed at any time.
    with suppress(OSError, IndexError):
        folder = paths[-1].parent
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        return Checkpoint(folder.name, paths[-1].stat().st_mtime, num_bytes)
    return None


def _last_line(log: Path) -> str:
    """Return the last line of log.txt; empty if there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return one_line(lines[-1]) if lines else ""
    return ""
