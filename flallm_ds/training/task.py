"""One training step and one search, for each stage; trainer.py is the loop around them.

A step: `Task.step` iterates over the micro-batches of this rank. For each, `Task.loss`
passes `Task.inputs`, `Task.wordings` and the target ids to the engine, and gradients
accumulate. Then the optimizer makes one step. A search is `Task.generate`.

B clips, N frames packed over the batch, L text tokens, D feature dimension.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import record_function

from flallm_ds.batch import Batch, VideoBatch
from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.loader import BrokenClips, Loader
from flallm_ds.data.plan import EpochPlan, Plan, micro_batches_of_rank
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.data.readers import ClipReader
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Wording
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.features.sequences import FeatureMasks
from flallm_ds.models.encode import encode
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.pretrained import first_line
from flallm_ds.models.sign_translator import Beam, Candidate
from flallm_ds.training.batch_statistics import BatchStatistics, KeptStatistics
from flallm_ds.training.engine import Engine
from flallm_ds.training.ranks import RankReport, exchange, report

NUM_CHECKED = 8  # frames of the dummy clip of `check_generation`


class StepResult(NamedTuple):
    """The loss of the global batch, the mean over its target tokens, and a report of each
    rank."""

    loss: float
    reports: list[RankReport]


@dataclass(frozen=True)
class Split:
    """One split: its clips, their order, and how this rank loads them.

    threads: decoding threads. broken: counts the clips that were replaced; its budget is
    0 in evaluation, where no clip may be replaced.
    """

    reader: ClipReader
    plan: Plan
    codec: TextCodec
    world: World
    threads: int
    broken: BrokenClips

    @property
    def index(self) -> Index:
        return self.reader.index

    @cached_property
    def micro_batches(self) -> range:
        """The micro-batches of a global batch that this rank computes."""
        num = self.plan.num_micro_batches
        return micro_batches_of_rank(num, self.world.rank, self.world.size)

    def loader(self, order: EpochPlan) -> Loader:
        """Return a loader of the clips in the order of an epoch of the plan."""
        return Loader(
            self.reader,
            order,
            self.codec,
            rank=self.world.rank,
            world_size=self.world.size,
            threads=self.threads,
            broken=self.broken,
        )


@dataclass(frozen=True)
class Task:
    """One stage, ready to run on this rank.

    masks: of frozen features in training. beam: the search on the dev split. frozen: the
    visual encoder of stage llm, outside the engine; None if the engine trains the encoder.
    lrs: the base learning rate of each parameter group. statistics: of the BatchNorm
    modules in train mode. kept: of the frozen BatchNorm modules in the engine.
    """

    config: RunConfig
    world: World
    train: Split
    dev: Split
    codec: TextCodec
    preprocess: Preprocess
    masks: FeatureMasks
    beam: Beam
    frozen: FeatureExtractor | None
    engine: Engine
    lrs: tuple[float, ...]
    statistics: BatchStatistics
    kept: KeptStatistics

    def train_loader(self, epoch: int) -> Loader:
        return self.train.loader(self.train.plan.epoch(epoch))

    def dev_loader(self) -> Loader:
        return self.dev.loader(self.dev.plan.in_length_order())

    # --- a step

    def step(
        self,
        batches: Sequence[Batch],
        epoch: int,
        step: int,
        num_tokens: float,
        share: float,
        lrs: Sequence[float],
        waited_s: float,
        before_update: Callable[[float], None],
    ) -> StepResult:
        """Make one optimizer step on the micro-batches of this rank.

        epoch, step: the position in the run. num_tokens: target tokens of the global
        batch, over all ranks. share: the micro-batches of this rank, without dummies, as
        a multiple of the mean over the ranks. lrs: the learning rate of each parameter
        group. waited_s: for the data of this step.
        before_update: called with the loss after the last backward pass.
        """
        loss_sum, own_s = 0.0, waited_s
        self.statistics.share = share
        # BatchNorm statistics of all micro-batches count as one update.
        with self.statistics:
            for number, batch in enumerate(batches):
                micro_batch = self.train.micro_batches.start + number
                seed_micro_batch(self.config.train.seed, epoch, step, micro_batch)
                with self.statistics.ignored(is_dummy=not batch.real_B[0]):
                    begin = time.perf_counter()
                    with record_function("forward"):
                        loss = self.loss(batch)
                        loss_sum += loss.item()
                    own_s += time.perf_counter() - begin
                    # DeepSpeed averages over ranks; times the world size, this is the
                    # mean over all tokens.
                    with record_function("backward"):
                        self.engine.backward(loss * (self.world.size / num_tokens))
                # Gradients are complete now; the optimizer steps in `micro_step_done`.
                if number == len(batches) - 1:
                    own = report(loss_sum, waited_s, own_s, self.world)
                    reports = exchange(own, self.world)
                    loss_mean = sum(one.loss_sum for one in reports) / num_tokens
                    before_update(loss_mean)
                with record_function("optimizer"):
                    self.engine.micro_step_done(lrs)
        self.kept.check()
        return StepResult(loss_mean, reports)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the cross entropy of a micro-batch, summed over its target tokens."""
        # Copies are asynchronous: the host memory of the batch is pinned.
        inputs = self.inputs(batch, train=True)
        target_ids_BL = batch.target_ids_BL.to(self.world.device, non_blocking=True)
        smoothing = self.config.train.label_smoothing
        return self.engine(
            inputs, batch.num_frames_B, self.wordings(batch), target_ids_BL, smoothing
        )

    def inputs(self, batch: Batch, train: bool) -> torch.Tensor:
        """Return the input of the module in the engine: pixels_NCHW, or features_ND of a
        frozen encoder."""
        device = self.world.device
        if self.frozen is None:
            assert isinstance(batch, VideoBatch)  # `check_stage` refuses cached features
            return self.preprocess(batch, train, device)
        features_ND = encode(
            batch, self.frozen, self.preprocess, train=train, device=device
        )
        if not train:
            return features_ND
        return self.masks(features_ND, batch.num_frames_B, batch.draws_B9)

    def wordings(self, batch: Batch) -> list[Wording]:
        """Return the ids around each clip's visual tokens."""
        return list(map(self.codec.wording, batch.languages, batch.corpora))

    # --- a search

    def generate(self, batch: Batch) -> list[list[Candidate]]:
        """Return the hypotheses of each clip, best first, by the search on the dev split.

        All ranks must make the same number of calls.
        """
        inputs = self.inputs(batch, train=False)
        return self._search(inputs, batch.num_frames_B, self.wordings(batch), self.beam)

    def _search(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        wordings: list[Wording],
        beam: Beam,
    ) -> list[list[Candidate]]:
        synced = self.engine.searches_in_step
        found: list[list[Candidate]] = self.engine.module.generate(
            inputs, num_frames_B, wordings, beam, synced
        )
        return found

    @torch.no_grad()
    def check_generation(self) -> None:
        """Generate two tokens for a dummy clip, so that an unsuitable LLM fails at the start.

        Every rank must call this. Random states, statistics and modes do not change.
        Raises UserError.
        """
        if self.config.stage == "visual":
            return
        module, device = self.engine.module, self.world.device
        crop = self.preprocess.crop_size
        shape = (3, crop, crop) if self.frozen is None else (self.frozen.feature_width,)
        inputs = torch.zeros((NUM_CHECKED, *shape), device=device)
        language = (*self.codec.instruction.languages, "")[0]
        wordings = [self.codec.wording(language)]
        # Two tokens: the second one uses the cache of keys and values.
        beam = replace(self.beam, max_new_tokens=2)
        was_training = module.training
        module.eval()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self._search(inputs, torch.tensor([NUM_CHECKED]), wordings, beam)
        except (torch.OutOfMemoryError, UserError):
            raise  # these name their own cause
        # Remote code and unusual architectures may raise anything.
        except Exception as error:
            raise UserError(
                f"Cannot generate from embeddings with the LLM {self.config.llm.name} (a "
                f"{type(module.language_model).__name__}): {type(error).__name__}: "
                f"{first_line(error)} Use another --llm.name."
            ) from error
        finally:
            module.train(was_training)

    @property
    def extractor(self) -> FeatureExtractor:
        """The visual encoder, inside or outside the engine."""
        return self.frozen or self.engine.module.visual


def seed_micro_batch(seed: int, epoch: int, step: int, micro_batch: int) -> None:
    """Seed dropout by the position of the micro-batch in the run.

    So a resumed run draws the same numbers, without stored random states.
    """
    sequence = np.random.SeedSequence([seed, epoch, step, micro_batch])
    (state,) = sequence.generate_state(1, np.uint64)
    torch.manual_seed(int(state) & (2**63 - 1))
