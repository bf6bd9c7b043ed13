"""The loop: steps, progress, dev scores, checkpoints, and going on where a run was."""

import itertools
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
from flallm_ds.data.device import on_device
from flallm_ds.data.plan import PlanState
from flallm_ds.dist import all_reduce_sum, gather_objects, main_first
from flallm_ds.errors import Preempted, UserError
from flallm_ds.files import replace_folder
from flallm_ds.metrics.columns import CEILING
from flallm_ds.metrics.scoring import ceiling_of, perfect, scores_of
from flallm_ds.models.llm.tuning import merged
from flallm_ds.models.weights import named_state
from flallm_ds.terminal import one_line
from flallm_ds.training import checkpoint
from flallm_ds.training.hypotheses import Evaluation
from flallm_ds.training.probe import last_layers
from flallm_ds.training.progress import Progress, ScoringProgress
from flallm_ds.training.run_folder import Metrics, shown
from flallm_ds.training.run_log import RunLog
from flallm_ds.training.schedule import rate_factor
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.task import Task
from flallm_ds.training.weights_record import read_weights


@dataclass
class Position:
    """Where a run is, between two steps."""

    epoch: int = 0
    step: int = 0  # within the epoch
    global_step: int = 0
    best_bleu4: float = -1.0


class Trainer:
    """Runs a task to its end, or to a stop that the next start goes on from."""

    def __init__(
        self, task: Task, folder: Path, stop: StopRequest, log: RunLog | None = None
    ) -> None:
        """log: what rank 0 prints goes there; a line that is lost ends the run."""
        self.task, self.folder, self.log = task, folder, log
        self.config, self.world = task.config, task.world
        self.at = Position()
        self._saved: int | None = None  # the global step of the newest checkpoint
        self.stop = stop
        self.progress = Progress(
            self.config.train.log_every_s,
            enabled=self.world.is_main,
            stage=self.config.stage,
        )
        self.metrics: Metrics | None = None

    def run(self, saved: checkpoint.Saved | None) -> None:
        """Train what is left. Raises Preempted when asked to stop, after saving.

        saved: what to resume from, the same on every rank, as `checkpoint.resumable`
        finds it.
        """
        if saved is not None:
            self._resume(saved)
        main_first(self._open_metrics, self.world)
        try:
            self._train()
        finally:
            if self.metrics is not None:
                self.metrics.close()
        main_first(self._check_records, self.world)

    def _train(self) -> None:
        epochs = self.config.train.epochs
        self.progress.start(epochs)
        self.stop.begin()
        while self.at.epoch < epochs:
            loader = self.task.train_loader(self.at.epoch)
            self._epoch(loader)
            if self.at.step < len(loader):
                break  # at train.max_steps
            self._end_of_epoch()

    def _open_metrics(self) -> None:
        self.metrics = Metrics(self.folder, self.at.global_step, self.at.epoch)

    @property
    def _lost_records(self) -> bool:
        """Whether something could not be written here; on rank 0 alone."""
        return any(
            files is not None and files.problem is not None
            for files in (self.metrics, self.log)
        )

    def _check_records(self) -> None:
        """Raise UserError where something was not written. On rank 0, by `main_first`."""
        if self.metrics is not None:
            self.metrics.flush()
            self.metrics.check()
        if self.log is not None:
            self.log.check()

    def _epoch(self, loader: Any) -> None:
        """Steps from where the run is to the epoch's end, the step limit or a stop."""
        if self._out_of_steps():
            return
        self.task.engine.module.train()
        num_steps = len(loader)
        waiting_since = time.perf_counter()
        for batches in on_device(loader.steps(self.at.step), self.world.device):
            waited = time.perf_counter() - waiting_since
            stop = self._step(batches, num_steps, waited)
            every = self.config.train.save_every_steps
            due = (
                every is not None
                and self.at.global_step % every == 0
                and self.at.step < num_steps
            )
            if stop or due or self._out_of_steps():
                self._save()
            if stop:
                raise Preempted(
                    f"stopped after step {self.at.global_step}; the same command goes on "
                    f"from there ({self.folder})."
                )
            if self._out_of_steps():
                return
            waiting_since = time.perf_counter()

    def _step(self, batches: list[Batch], num_steps: int, waited: float) -> bool:
        """Make one step on this rank's micro-batches and log it; True if any rank was
        asked to stop."""
        begin = time.perf_counter()
        task, at = self.task, self.at
        counts = [
            sum(batch.num_target_tokens for batch in batches),
            sum(int(batch.num_frames_B.sum()) for batch in batches),
            bool(self.stop),
            self._lost_records,
        ]
        tokens, frames, stops, lost = all_reduce_sum(counts, self.world)
        if lost:
            main_first(self._check_records, self.world)
        done = (at.epoch + at.step / num_steps) / self.config.train.epochs
        factor = rate_factor(done, self.config.optim.warmup)
        rates = [rate * factor for rate in task.rates]
        loss = task.step(batches, at.epoch, at.step, tokens, rates, self._before_update)
        if task.engine.is_stuck:
            self._must_be_finite("gradient norm", task.engine.grad_norm())
        at.step, at.global_step = at.step + 1, at.global_step + 1
        seconds = waited + time.perf_counter() - begin
        self._write_step(loss, rates[-1], int(frames), seconds, waited)
        self.progress.step(at.epoch, at.step, num_steps, loss, frames, seconds, waited)
        return stops > 0

    def _before_update(self, loss: float) -> None:
        """Look at a step's loss and gradients. What is not finite must not enter the
        optimizer's moments."""
        self._must_be_finite("loss", loss)
        self._probe()

    def _write_step(
        self, loss: float, rate: float, frames: int, seconds: float, waited: float
    ) -> None:
        """Write a line of metrics.jsonl about the step that was made."""
        if self.metrics is None:
            return
        task = self.task
        values = {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": task.engine.grad_norm(),
            "skipped_steps": task.engine.skipped_steps,
            "frames": frames,
            "seconds": seconds,
            "waiting_s": waited,
            "broken_clips": len(task.train.broken.reasons),
        }
        self.metrics.write("train", self.at.global_step, values)

    def _must_be_finite(self, what: str, value: float) -> None:
        """Raise UserError on every rank for a step that must not be made."""
        if np.isfinite(value):
            return
        saved = (
            f"The last checkpoint is of step {self._saved}."
            if self._saved
            else "There is no checkpoint."
        )
        raise UserError(
            f"The {what} must be finite, got {value} at step {self.at.global_step + 1}, "
            f"which was not made. {saved} Try a lower --optim.lr or --optim.clip in "
            "another run."
        )

    def _probe(self) -> None:
        """Log the gradients of the last layers, before the optimizer takes the step that
        they are of."""
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
                self._save()  # scoring takes minutes, and may fail
            self._evaluate(done)
        self.at.epoch, self.at.step = done, 0
        if self._saved == self.at.global_step:
            main_first(self._check_records, self.world)
            state = self._state()
            checkpoint.replace_state(
                self.folder / "checkpoints", self._saved, state, self.world
            )
        else:
            self._save()

    def _evaluate(self, epoch: int) -> None:
        """Score the dev split and keep the export if it is the best so far."""
        task, split = self.task, self.config.eval.split
        begin = time.perf_counter()
        task.engine.module.eval()
        evaluation = Evaluation(task.dev_loader(), task.generate, task.codec, self.world)
        progress = ScoringProgress(split, self.config.train.log_every_s, self.world.is_main)
        with task.engine.gathered(self.config.eval.gather):
            hypotheses = evaluation.hypotheses(progress, self.stop)
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
        if scores.bleu4 > self.at.best_bleu4:
            self.at.best_bleu4 = scores.bleu4
            exported = scores.as_dict() | {CEILING.key: ceiling.bleu4}
            self._export({split: exported, "epoch": epoch})

    def _show(self, epoch: int, hypotheses: list[Hypothesis]) -> None:
        split = self.config.eval.split
        for one in hypotheses:
            self.progress.say(f"  clip        {one_line(one.key)}")
            self.progress.say(f"  hypothesis  {one_line(one.hypothesis)}")
            self.progress.say(f"  reference   {one_line(one.reference)}")
        if self.metrics is not None:
            self.metrics.write_hypotheses(split, epoch, self.at.global_step, hypotheses)

    def _export(self, scores: dict[str, Any]) -> None:
        """Write best/, tensor by tensor. Raises UserError on every rank where it cannot
        be written."""
        task = self.task
        base = export.base_of(self.config)
        # Every rank must drive it to its end, whatever becomes of the files.
        whole = task.engine.state(trained_of="language_model" if base else None)
        # the LLM's additions stay apart
        state = merged(whole, nn.ModuleDict({"visual": task.extractor}))
        problem = None
        if self.world.is_main:
            frozen = named_state(task.frozen) if task.frozen is not None else ()
            tensors = itertools.chain(
                ((name, tensor) for name, tensor in state if tensor is not None),
                ((f"visual.{name}", tensor) for name, tensor in frozen),
            )
            parts = task.extractor.settings(), task.extractor.visual.settings()
            settings = export.settings_of(self.config, task.train.index, scores, *parts)
            settings["weights"] = read_weights(self.folder)
            llm = task.engine.module.language_model
            try:
                replace_folder(
                    self.folder / "best",
                    lambda out: export.write(out, settings, tensors, llm, task.codec),
                )
            except (OSError, SafetensorError) as error:
                problem = str(error)
        for _ in state:
            pass
        problems = [p for p in gather_objects(problem, self.world) if p]
        if problems:
            raise UserError(
                f"the export must be written to {self.folder / 'best'}, but was not "
                f"({problems[0]}). The run is whole; free some space and run the same "
                "command again."
            )

    def _save(self) -> None:
        begin = time.perf_counter()
        # a resume would not write again what is lost from before
        main_first(self._check_records, self.world)
        if all_reduce_sum([not self.task.engine.is_finite()], self.world)[0]:
            raise UserError(
                "Weights and optimizer state must be finite to be saved, but are not at "
                f"step {self.at.global_step}. Earlier checkpoints are whole. Try a lower "
                "--optim.lr or --optim.clip in another run."
            )
        checkpoint.save(
            self.folder / "checkpoints",
            self.at.global_step,
            self._state(),
            self.task.engine.save,
            self.world,
            self.config.train.keep_checkpoints,
        )
        self._saved = self.at.global_step
        self.progress.pause(time.perf_counter() - begin)

    def _state(self) -> dict[str, Any]:
        plan_state = self.task.train.plan.state(self.at.epoch, self.at.step)
        return {
            "position": asdict(self.at),
            "plan": asdict(plan_state),
            "world_size": self.world.size,
            "frozen_encoder": self._frozen_encoder,
        }

    def _resume(self, found: checkpoint.Saved) -> None:
        """Load a checkpoint. Raises UserError where it is of another plan, world size or
        encoder."""
        newest, state = found.path, found.state
        position = Position(**state["position"])
        saved = PlanState.load(state["plan"])
        self.task.train.plan.state(saved.epoch, saved.step).check_same_plan(saved)
        if state["world_size"] != self.world.size:
            raise UserError(
                "a run must be resumed with the ranks it was saved by "
                f"({state['world_size']}), but there are {self.world.size}: {newest}. "
                "Start that many ranks, or another run folder."
            )
        if state["frozen_encoder"] != self._frozen_encoder:
            raise UserError(
                f"the frozen visual encoder must be the one with which {newest} was saved, "
                "but is another. Give the --visual_run of then (has its stage 1 gone on "
                "since?), or another run folder."
            )
        self.task.engine.load(newest)
        for problem in found.damaged.values():
            self.progress.say(f"warning: {problem} The run resumes from {newest.name}.")
        main_first(lambda: checkpoint.set_aside(found.damaged), self.world)
        self.at, self._saved = position, position.global_step
        self.progress.say(
            f"resumed at epoch {position.epoch}, step {position.step} from {newest}"
        )

    @cached_property
    def _frozen_encoder(self) -> str:
        """Fingerprint of the encoder outside the engine, which no checkpoint holds; or
        nothing."""
        return self.task.frozen.fingerprint() if self.task.frozen is not None else ""

    def _out_of_steps(self) -> bool:
        limit = self.config.train.max_steps
        return limit is not None and self.at.global_step >= limit
