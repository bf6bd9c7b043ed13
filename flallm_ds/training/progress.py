"""Lines of progress while a run trains or is scored: loss, speed, slowest rank, time left."""

import time
from collections.abc import Sequence

from flallm_ds.terminal import clock
from flallm_ds.training.ranks import slowest
from flallm_ds.training.records import StepRecord


class Progress:
    """Print a line every `every_s` seconds, on rank 0 alone."""

    def __init__(self, every_s: float, enabled: bool, stage: str) -> None:
        self.every_s, self.enabled, self.stage = every_s, enabled, stage
        self._epochs = 0
        # Of the steps since the last line.
        self._records: list[StepRecord] = []
        self._own_s: list[float] = []
        self._last_print = time.perf_counter()
        self._fraction_done = 0.0
        self._first_fraction: float | None = None
        self._busy_s = 0.0

    def start(self, epochs: int) -> None:
        self._epochs = epochs

    def say(self, line: str) -> None:
        if self.enabled:
            print(line, flush=True)

    def pause(self, seconds: float) -> None:
        """Count seconds that scoring or a checkpoint took, for the estimate of the time left."""
        self._busy_s += seconds

    def advance(self, epoch: int, step: int, num_steps: int, seconds: float) -> float:
        """Count a step that took `seconds`; return the estimated seconds to the end."""
        if self._first_fraction is None:
            self._first_fraction = (epoch + (step - 1) / num_steps) / self._epochs
        self._fraction_done = (epoch + step / num_steps) / self._epochs
        self._busy_s += seconds
        done = self._fraction_done - self._first_fraction
        return self._busy_s * (1 - self._fraction_done) / done if done else 0.0

    def step(self, record: StepRecord, own_s: Sequence[float], hosts: list[str]) -> None:
        """Print a line if it is time, of all steps since the last line.

        own_s, hosts: own time in this step, and machine of each rank.
        """
        self._records.append(record)
        self._own_s = [a + b for a, b in zip(self._own_s or own_s, own_s, strict=True)]
        now = time.perf_counter()
        last = record.step == record.num_steps and record.epoch == self._epochs - 1
        if now - self._last_print >= self.every_s or last:
            self.say(self._line(hosts))
            self._last_print = now
            self._records, self._own_s = [], []

    def _line(self, hosts: list[str]) -> str:
        """Return the line of the steps since the last line, of about 160 columns at most."""
        last, num = self._records[-1], len(self._records)
        seconds = sum(record.seconds for record in self._records)
        waited = sum(record.waiting_s for record in self._records)
        frames = sum(record.frames for record in self._records)
        tokens = sum(record.tokens for record in self._records)
        loss = sum(record.loss for record in self._records) / num
        line = (
            f"{self.stage}  epoch {last.epoch + 1}/{self._epochs}  step "
            f"{last.step}/{last.num_steps}  loss {loss:.3f}  {_speed(frames / seconds)} "
            f"frames/s  {_speed(tokens / seconds)} tokens/s"
        )
        if last.mfu is not None:
            used = sum((record.mfu or 0) * record.seconds for record in self._records)
            line += f"  MFU {100 * used / seconds:.0f} %"
        line += f"  waiting {100 * waited / seconds:.1f} %  memory {_memory(last)} GB"
        if len(hosts) > 1:
            rank = slowest(self._own_s)
            mean = sum(self._own_s) / len(self._own_s)
            above = 100 * (self._own_s[rank] / mean - 1) if mean else 0.0
            host = hosts[rank].split(".")[0]
            line += f"  slowest {rank} ({host}) +{above:.0f} %"
        return f"{line}  left {clock(last.left_s)}"


def _speed(per_second: float) -> str:
    """Return a number of at most 5 characters."""
    return f"{per_second:,.0f}" if per_second < 9999.5 else f"{per_second / 1000:,.0f}k"


def _memory(record: StepRecord) -> str:
    """Return the peak memory in GB, of device and host if there is a device."""
    values = [record.host_gb]
    if record.device_gb is not None:
        values.insert(0, record.device_gb)
    return "+".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values)


class ScoringProgress:
    """Print how many clips of a split are scored every `every_s` seconds, on rank 0 alone.

    Call it with the number of scored clips and the number of all clips.
    """

    def __init__(self, split: str, every_s: float, enabled: bool) -> None:
        self.split, self.every_s, self.enabled = split, every_s, enabled
        self._begin = self._last_print = time.perf_counter()

    def __call__(self, done: int, clips: int) -> None:
        now = time.perf_counter()
        if not self.enabled or now - self._last_print < self.every_s:
            return
        self._last_print, seconds = now, now - self._begin
        left = seconds * (clips / done - 1)
        print(
            f"{self.split}: {done}/{clips} clips  {done / seconds:.1f} clips/s  left "
            f"{clock(left)}",
            flush=True,
        )
