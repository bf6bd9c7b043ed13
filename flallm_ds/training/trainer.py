"""Training loop: steps, evaluation, checkpoints, resume."""

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from flallm_ds import export
from flallm_ds.batch import Batch, Hypothesis
from flallm_ds.config import steps_of
from flallm_ds.data.device import on_device
from flallm_ds.data.plan import PlanState
from flallm_ds.dist import (
    all_reduce_sum,
    gather_objects,
    host_memory_of_rank,
    main_first,
)
from flallm_ds.errors import Preempted, UserError
from flallm_ds.metrics.columns import CEILING
from flallm_ds.metrics.scoring import ceiling_of, perfect, scores_of
from flallm_ds.models.llm.tuning import merged
from flallm_ds.run_check import is_over
from flallm_ds.terminal import one_line
from flallm_ds.training import checkpoint
from flallm_ds.training.exporting import Exportable
from flallm_ds.training.hypotheses import Evaluation
from flallm_ds.training.intake import Intake
from flallm_ds.training.meter import Counts, Meter
from flallm_ds.training.probe import last_layers
from flallm_ds.training.profiler import StepProfiler
from flallm_ds.training.progress import Progress, ScoringProgress
from flallm_ds.training.run_folder import Metrics, shown
from flallm_ds.training.run_log import RunLog
from flallm_ds.training.schedule import lr_factor
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.task import Task
from flallm_ds.training.trackers import Trackers
from flallm_ds.training.watchdog import Watchdog


@dataclass
class Position:
    """The position of a run between two steps."""

    epoch: int = 0
    step: int = 0  # within the epoch
    global_step: int = 0
    best_bleu4: float = -1.0
    best_chrf: float = -1.0  # decides between equal BLEU-4, as of very short texts
    scorings_since_best: int = 0  # of the dev split, in a row without a better score


class Trainer:
    """Trains a task to its end, or until it is stopped; the next start resumes.

    log: receives the output of rank 0; a line that cannot be written ends the run.
    """

    def __init__(
        self, task: Task, folder: Path, stop: StopRequest, log: RunLog | None = None
    ) -> None:
        self.task, self.folder, self.log = task, folder, log
        self.config, self.world = task.config, task.world
        self.at = Position()
        self._saved: int | None = None  # the global step of the newest checkpoint
        self._saving: checkpoint.Save | None = None  # a checkpoint in the background
        self._saved_at = time.perf_counter()  # when the last save began
        self._save_is_due = False  # after the last step
        self.watchdog: Watchdog | None = None  # while `run` trains
        self.stop = stop
        self.progress = Progress(
            self.config.train.log_every_s,
            enabled=self.world.is_main,
            stage=self.config.stage,
        )
        self.metrics: Metrics | None = None
        self.meter = Meter(task)
        self.intake = Intake(task.train.broken, task.world)
        profiled = steps_of(self.config.train.profile)
        self.profiler = StepProfiler(profiled, folder, task.engine, task.world)

    def run(self, saved: checkpoint.Saved | None) -> None:
        """Train to the end of the run. Raises Preempted after a request to stop, with a
        checkpoint saved.

        saved: the checkpoint to resume from, as `checkpoint.resumable` finds it; the same
        on every rank.
        """
        if saved is not None:
            self._resume(saved)
        # After the resume: lines of metrics.jsonl behind the checkpoint are cut off.
        main_first(self._open_metrics, self.world)
        train = self.config.train
        try:
            with Watchdog(
                self.folder,
                self.world,
                train.stall_warn_s,
                train.stall_limit_s,
                self.stop.is_orphan,
            ) as self.watchdog:
                self._train()
        finally:
            self.profiler.close()
            if self.metrics is not None:
                self.metrics.close()
        main_first(self._check_records, self.world)

    def _train(self) -> None:
        self.progress.start(self.config.train.epochs)
        self.stop.begin()
        while not self.is_over:
            loader = self.task.train_loader(self.at.epoch)
            self._epoch(loader)
            if self.at.step < len(loader):
                break  # at train.max_steps
            self._end_of_epoch()

    @property
    def is_over(self) -> bool:
        """Whether no step is left. Every rank has the same scores, and so the same answer."""
        return is_over(self.config, asdict(self.at))

    def _open_metrics(self) -> None:
        names, folder, trackers = self.config.train.trackers, self.folder, None
        if names:
            trackers = Trackers(names, folder, self.config.options())
        self.metrics = Metrics(folder, self.at.global_step, self.at.epoch, trackers)

    def _beat(self, phase: str) -> None:
        """Tell the watchdog that this rank makes progress."""
        if self.watchdog is not None:
            self.watchdog.beat(phase, self.at.global_step)

    @property
    def _lost_records(self) -> bool:
        """Whether metrics or log could not be written; both are written by rank 0 alone."""
        metrics, log = self.metrics, self.log
        return bool(metrics and metrics.problem) or bool(log and log.problem)

    def _check_records(self) -> None:
        """Raise UserError if metrics or log could not be written. For `main_first`."""
        if self.metrics is not None:
            self.metrics.flush()
            self.metrics.check()
        if self.log is not None:
            self.log.check()

    def _epoch(self, loader: Any) -> None:
        """Train from the current step to the end of the epoch, the step limit or a stop."""
        if self._out_of_steps():
            return
        # Back to train mode after the last evaluation.
        self.task.engine.module.train()
        num_steps = len(loader)
        steps = on_device(loader.steps(self.at.step), self.world.device)
        while self.at.step < num_steps:
            self._beat("data loading")
            with self.profiler.step(self.at.global_step + 1):
                batches, waited = self.intake.take(steps)
                stop = self._step(batches, num_steps, waited)

            # Save between two steps: on request, every n steps, or at the step limit. The
            # end of an epoch saves after its evaluation.
            at_end = stop or self._out_of_steps()
            if at_end or (self._save_is_due and self.at.step < num_steps):
                self._save()
            if at_end:
                self._finish_save()
            if stop:
                raise Preempted(
                    f"Stopped after step {self.at.global_step}. Run the same command again "
                    f"to resume ({self.folder})."
                )
            if self._out_of_steps():
                return

    def _step(self, batches: list[Batch], num_steps: int, waited: float) -> bool:
        """Make one step on the micro-batches of this rank and log it.

        Returns whether any rank was asked to stop.
        """
        begin = time.perf_counter()
        task, at = self.task, self.at
        self._beat("step")

        # Sum over all ranks what the step needs to know of them, in one collective.
        own = Counts.of(batches)
        is_written = self._saving is not None and self._saving.is_written()
        values = [*own, self.intake.has_news, bool(self.stop), self._lost_records]
        values += [is_written, self.world.is_main and self._minutes_are_over()]
        sums = list(map(int, all_reduce_sum(values, self.world)))
        counts = Counts(*sums[:3])
        news, stops, lost, written, minutes_are_over = sums[3:]
        if news:
            self.intake.share_news()
        share = own.micro_batches * self.world.size / counts.micro_batches
        if lost:
            main_first(self._check_records, self.world)
        if written == self.world.size:
            self._finish_save()

        # The learning rates depend on the finished fraction of the run alone.
        done = (at.epoch + at.step / num_steps) / self.config.train.epochs
        factor = lr_factor(done, self.config.optim.warmup)
        lrs = [lr * factor for lr in task.lrs]
        place = at.epoch, at.step
        loss, reports = task.step(
            batches, *place, counts.tokens, share, lrs, waited, self._before_update
        )
        # Raises if gradients stay infinite or NaN, so that a run does not idle for hours.
        if task.engine.is_stuck:
            self._must_be_finite("gradient norm", task.engine.grad_norm())
        at.step, at.global_step = at.step + 1, at.global_step + 1
        seconds = waited + time.perf_counter() - begin
        left_s = self.progress.advance(at.epoch, at.step, num_steps, seconds)
        position = at.epoch, at.step, num_steps
        record = self.meter.record(
            position, counts, reports, lrs[-1], loss, seconds, left_s
        )
        if self.metrics is not None:
            self.metrics.write("train", at.global_step, record.values())
        if self.watchdog is not None:
            of_rank = reports[self.world.rank]
            self.watchdog.measured(of_rank.own_s, of_rank.waited_s)
        self.progress.step(record, [one.own_s for one in reports], self.meter.hosts)
        every = self.config.train.save_every_steps
        steps_are_over = every is not None and at.global_step % every == 0
        self._save_is_due = steps_are_over or minutes_are_over > 0
        return stops > 0

    def _minutes_are_over(self) -> bool:
        """Whether rank 0 measures that the next checkpoint is due by time."""
        minutes = self.config.train.save_every_minutes
        return minutes > 0 and time.perf_counter() - self._saved_at > 60 * minutes

    def _before_update(self, loss: float) -> None:
        """Check the loss and log the gradients before the optimizer uses them: a loss that
        is not finite would spoil the moments of the optimizer."""
        self._must_be_finite("loss", loss)
        self._probe()

    def _must_be_finite(self, what: str, value: float) -> None:
        """Raise UserError on every rank, before the step, if the value is not finite."""
        if np.isfinite(value):
            return
        self._finish_save()
        saved = "There is no checkpoint."
        if self._saved:
            saved = f"The last checkpoint is of step {self._saved}."
        raise UserError(
            f"The {what} must be finite, got {value} at step {self.at.global_step + 1}, "
            f"which was not made. {saved} Try a lower --optim.lr or --optim.clip in "
            "another run."
        )

    def _probe(self) -> None:
        """Log the gradient norms of the last layers every `train.probe_every` steps."""
        every = self.config.train.probe_every
        if every and self.at.global_step % every == 0:
            norms = self.task.engine.grad_norms(last_layers(self.task.engine.module))
            if self.metrics is not None:
                self.metrics.write(
                    "probe", self.at.global_step + 1, {"epoch": self.at.epoch, **norms}
                )

    def _end_of_epoch(self) -> None:
        done, epochs = self.at.epoch + 1, self.config.train.epochs
        if done % self.config.eval.every_epochs == 0 or done == epochs:
            if self._saved != self.at.global_step:
                self._save()
            self._finish_save()  # the evaluation takes minutes, and may be killed
            self._evaluate(done)
        self.at.epoch, self.at.step = done, 0
        self._finish_save()
        # The weights of this step may be saved already; then only the position has changed.
        if self._saved == self.at.global_step:
            main_first(self._check_records, self.world)
            state = self._state()
            checkpoint.replace_state(
                self.folder / "checkpoints", self._saved, state, self.world
            )
        else:
            self._save()
            if self.is_over:
                self._finish_save()

    def _evaluate(self, epoch: int) -> None:
        """Score the dev split and write the export if the score is the best so far."""
        task, split = self.task, self.config.eval.split
        begin = time.perf_counter()
        task.engine.module.eval()
        # All ranks search their share of the clips; hypotheses are gathered on every rank.
        evaluation = Evaluation(task.dev_loader(), task.generate, task.codec, self.world)
        progress = ScoringProgress(split, self.config.train.log_every_s, self.world.is_main)

        def scored(done: int, clips: int) -> None:
            self._beat("evaluation")
            progress(done, clips)

        with task.engine.gathered(self.config.eval.gather):
            hypotheses = evaluation.hypotheses(scored, self.stop)
        # The score of a perfect model shows what the tokenizer alone costs.
        scores = scores_of(hypotheses)
        ceiling = ceiling_of(perfect(hypotheses, task.codec))
        seconds = time.perf_counter() - begin
        self.progress.pause(seconds)
        if self.metrics is not None:
            values = {"epoch": epoch, **scores.logged(), "seconds": seconds}
            values[CEILING.key] = ceiling.bleu4
            self.metrics.write(split, self.at.global_step, values)
        self.progress.say(
            f"epoch {epoch} {split}: BLEU-4 {scores.bleu4:.2f} {ceiling}".rstrip()
        )
        self._show(epoch, shown(hypotheses))
        at, chrf = self.at, scores.values["chrf"]
        if (scores.bleu4, chrf) > (at.best_bleu4, at.best_chrf):
            at.best_bleu4, at.best_chrf, at.scorings_since_best = scores.bleu4, chrf, 0
            exported = scores.as_dict() | {CEILING.key: ceiling.bleu4}
            self._export({split: exported, "epoch": epoch})
        else:
            at.scorings_since_best += 1

    def _show(self, epoch: int, hypotheses: list[Hypothesis]) -> None:
        split = self.config.eval.split
        for one in hypotheses:
            self.progress.say(f"  clip        {one_line(one.key)}")
            self.progress.say(f"  hypothesis  {one_line(one.hypothesis)}")
            self.progress.say(f"  reference   {one_line(one.reference)}")
        if self.metrics is not None:
            self.metrics.write_hypotheses(split, epoch, self.at.global_step, hypotheses)

    def _export(self, scores: dict[str, Any]) -> None:
        """Write best/, one tensor at a time. Raises UserError on every rank if it cannot be
        written."""
        task = self.task
        base = export.base_of(self.config)
        # Every rank must exhaust this iterator, even if the files cannot be written.
        whole = task.engine.state(trained_of="language_model" if base else None)
        # Merge LoRA layers of the visual encoder; those of the LLM are stored separately.
        state = merged(whole, nn.ModuleDict({"visual": task.extractor}))
        index, module = task.train.index, task.engine.module
        parts = Exportable(self.config, index, task.codec, task.extractor, module)
        problem = None
        if self.world.is_main:
            # A full disk must not hang the other ranks.
            try:
                parts.write(self.folder, self.folder / "best", scores, state)
            except (OSError, SafetensorError) as error:
                problem = str(error)
        for _ in state:  # on the other ranks, and after an error
            pass
        problems = [p for p in gather_objects(problem, self.world) if p]
        if problems:
            raise UserError(
                f"Cannot write the export {self.folder / 'best'}: {problems[0]}. The "
                "checkpoints are complete; free some space and run the same command again."
            )

    def _save(self) -> None:
        self._beat("saving")
        self._finish_save()
        begin = time.perf_counter()
        # Lost records before a checkpoint would not be written again after a resume.
        main_first(self._check_records, self.world)
        if all_reduce_sum([not self.task.engine.is_finite()], self.world)[0]:
            raise UserError(
                f"Cannot save a checkpoint of step {self.at.global_step}: weights or optimizer "
                "state are not finite. Earlier checkpoints are complete. Try a lower "
                "--optim.lr or --optim.clip in another run."
            )
        # A copy on the host allows to train on while a thread writes it.
        engine = self.task.engine
        background = 2 * engine.num_fragment_bytes < host_memory_of_rank(self.world)
        fragments = engine.fragments()
        self._saving = checkpoint.Save(
            self.folder / "checkpoints",
            self.at.global_step,
            self._state(),
            list(fragments) if background else fragments,
            self.world,
            background=background,
        )
        self._saved_at = time.perf_counter()
        self.progress.pause(time.perf_counter() - begin)

    def _finish_save(self) -> None:
        """Commit the checkpoint that is being written, if any. Every rank must call this."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.commit(self.config.train.keep_checkpoints)
            self._saved = saving.step

    def _state(self) -> dict[str, Any]:
        plan_state = self.task.train.plan.state(self.at.epoch, self.at.step)
        return {
            "position": asdict(self.at),
            "plan": asdict(plan_state),
            "frozen_encoder": self._frozen_encoder,
            "engine": self.task.engine.checkpoint_state(),
        }

    def _resume(self, found: checkpoint.Saved) -> None:
        """Load a checkpoint. Raises UserError if its data or its frozen encoder differs from
        this run."""
        newest, state = found.path, found.state
        # Compare what must be equal before anything is loaded.
        position = Position(**state["position"])
        saved = PlanState.load(state["plan"])
        self.task.train.plan.state(saved.epoch, saved.step).check_same_plan(saved)
        if state["frozen_encoder"] != self._frozen_encoder:
            raise UserError(
                f"Checkpoint {newest} was saved with another frozen visual encoder. Use the "
                "original --visual_run (has its stage 1 been trained further?), or another "
                "run folder."
            )
        self.task.engine.load(found.reader(), state["engine"])
        # Report newer checkpoints that were damaged, and move them out of the way.
        for problem in found.damaged.values():
            self.progress.say(f"warning: {problem} The run resumes from {newest.name}.")
        main_first(lambda: checkpoint.set_aside(found.damaged), self.world)
        self.at, self._saved = position, position.global_step
        self.progress.say(
            f"resumed at epoch {position.epoch}, step {position.step} from {newest}"
        )

    @cached_property
    def _frozen_encoder(self) -> str:
        """The fingerprint of the encoder outside the engine, which is not part of a
        checkpoint; empty if there is none."""
        return self.task.frozen.fingerprint() if self.task.frozen is not None else ""

    def _out_of_steps(self) -> bool:
        limit = self.config.train.max_steps
        return limit is not None and self.at.global_step >= limit
