"""Lines of progress while a run trains or is scored: loss, frames/s, waiting, time left."""

import time

from flallm_ds.terminal import clock


class Progress:
    """Print a line every `every_s` seconds, on rank 0 alone."""

    def __init__(self, every_s: float, enabled: bool, stage: str) -> None:
        self.every_s, self.enabled, self.stage = every_s, enabled, stage
        self._epochs = 0
        self._reset()
        self._last_print = time.perf_counter()
        self._fraction_done = 0.0
        self._first_fraction: float | None = None
        self._busy_s = 0.0

    def _reset(self) -> None:
        self._frames = self._seconds = self._waited = self._loss = 0.0
        self._steps = 0

    def start(self, epochs: int) -> None:
        self._epochs = epochs

    def say(self, line: str) -> None:
        if self.enabled:
            print(line, flush=True)

    def pause(self, seconds: float) -> None:
        """Count seconds that scoring or a checkpoint took, for the estimate of the time left."""
        self._busy_s += seconds

    def step(
        self,
        epoch: int,
        step: int,
        num_steps: int,
        loss: float,
        frames: float,
        seconds: float,
        waited: float,
    ) -> None:
        """Count a step that took `seconds`, `waited` of them for data.

        frames: number of kept frames over all ranks.
        """
        if self._first_fraction is None:
            self._first_fraction = (epoch + (step - 1) / num_steps) / self._epochs
        self._fraction_done = (epoch + step / num_steps) / self._epochs
        self._busy_s += seconds
        self._frames += frames
        self._seconds += seconds
        self._waited += waited
        self._loss += loss
        self._steps += 1
        now = time.perf_counter()
        last = step == num_steps and epoch == self._epochs - 1
        if now - self._last_print >= self.every_s or last:
            done = self._fraction_done - self._first_fraction
            left = self._busy_s * (1 - self._fraction_done) / done if done else 0.0
            speed = self._frames / self._seconds
            waiting = 100 * self._waited / self._seconds
            self.say(
                f"stage {self.stage}  epoch {epoch + 1}/{self._epochs}  step "
                f"{step}/{num_steps}  loss {self._loss / self._steps:.3f}  {speed:,.0f} "
                f"frames/s  waiting {waiting:.1f} %  left {clock(left)}"
            )
            self._last_print = now
            self._reset()


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
