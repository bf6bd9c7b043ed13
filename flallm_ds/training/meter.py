"""Measures each step: speeds, MFU, memory, waiting for data, and the slowest rank."""

from collections.abc import Iterable
from typing import NamedTuple

from flallm_ds.batch import Batch
from flallm_ds.dist import gather_objects
from flallm_ds.training.flops import StepFlops, peak_flops, step_flops
from flallm_ds.training.ranks import RankReport, hosts, slowest
from flallm_ds.training.records import StepRecord
from flallm_ds.training.task import Task


class Counts(NamedTuple):
    """What a step processes: kept frames, target tokens and micro-batches, without
    dummies."""

    frames: int
    tokens: int
    micro_batches: int

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "Counts":
        """Count the micro-batches of one rank."""
        real = [batch for batch in batches if batch.real_B[0]]
        frames = sum(int(batch.num_frames_B.sum()) for batch in real)
        return cls(frames, sum(batch.num_target_tokens for batch in real), len(real))


class Meter:
    """Turns what is known of a step into its record. Every rank must create one."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.hosts = hosts(task.world)
        peaks = gather_objects(peak_flops(task.world.device), task.world)
        # Without the peak of every device, the MFU would be a guess.
        self._peak: float | None = None if None in peaks else sum(peaks)
        self._flops: StepFlops | None = None
        if self._peak is not None:
            self._flops = step_flops(task)

    def mfu(self, counts: Counts, seconds: float) -> float | None:
        """Return the share of the peak FLOPS that a step used; None if it is unknown."""
        if self._peak is None or self._flops is None:
            return None
        return self._flops.of(counts.frames, counts.tokens) / (seconds * self._peak)

    def record(
        self,
        position: tuple[int, int, int],
        counts: Counts,
        reports: list[RankReport],
        lr: float,
        loss: float,
        seconds: float,
        left_s: float,
    ) -> StepRecord:
        """Return the record of a step.

        position: epoch, step in it, and its number of steps. counts, reports: of all ranks.
        seconds: from the end of the step before, without checkpoints and scoring.
        """
        engine, broken = self.task.engine, self.task.train.broken
        own_s = [report.own_s for report in reports]
        rank = slowest(own_s)
        device_bytes = max(report.device_bytes for report in reports)
        epoch, step, num_steps = position
        return StepRecord(
            epoch=epoch,
            step=step,
            num_steps=num_steps,
            loss=loss,
            lr=lr,
            grad_norm=engine.grad_norm(),
            skipped_steps=engine.skipped_steps,
            frames=counts.frames,
            tokens=counts.tokens,
            seconds=seconds,
            waiting_s=max(report.waited_s for report in reports),
            frames_per_s=counts.frames / seconds,
            tokens_per_s=counts.tokens / seconds,
            mfu=self.mfu(counts, seconds),
            slowest_rank=rank,
            slowest_host=self.hosts[rank],
            slowest_s=own_s[rank],
            mean_s=sum(own_s) / len(own_s),
            device_gb=device_bytes / 1e9 if device_bytes else None,
            host_gb=max(report.host_bytes for report in reports) / 1e9,
            broken_clips=len(broken.reasons),
            left_s=left_s,
        )
