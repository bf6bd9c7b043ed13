"""Write cached features: run a frozen visual encoder once over a shard folder.

The writing may be killed at any moment: the same command resumes it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from flallm_ds import dist
from flallm_ds.batch import Batch
from flallm_ds.config import RunConfig
from flallm_ds.data.device import on_device
from flallm_ds.data.index import Index, check_video, read_manifest
from flallm_ds.data.loader import BrokenClips, Loader
from flallm_ds.data.plan import EpochPlan
from flallm_ds.data.readers import Clip, VideoReader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import Preempted, RankError, UserError
from flallm_ds.features.checks import feature_options
from flallm_ds.features.folder import TRAINING, FeatureFolder, FeatureTar, share
from flallm_ds.models.encode import encode
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.terminal import clock
from flallm_ds.training.build.data import decode_threads, make_preprocess, open_index
from flallm_ds.training.build.visual import feature_extractor, stage_1_export
from flallm_ds.training.stop import StopRequest

BATCH_FRAMES = 256  # frames that the encoder reads at once; a longer clip is read whole
PATIENCE = timedelta(hours=12)  # how long a rank that has finished waits for the others


def write_features(
    config: RunConfig,
    out: Path,
    views: int,
    dtype: Literal["float32", "float16"],
    splits: tuple[str, ...],
) -> None:
    """Write the features of a frozen visual encoder to `out`, with all ranks.

    config: of the run of stage llm that will train on the features. views: number of views
    of each training clip; each has other random frames and augmentations. The caller has
    checked these arguments (cli/features.py). Raises UserError for files that do not fit,
    Preempted when asked to stop.
    """
    # Created before `dist.start`, so that no signal during the start is lost.
    stop = StopRequest()
    world = dist.start(PATIENCE)
    try:
        Writing.begin(config, world, out, views, dtype, splits).run(stop)
    finally:
        dist.stop()


def _written(out: Path, write: Callable[[], None]) -> None:
    """Call `write`. Raises UserError for an OSError."""
    try:
        write()
    except OSError as error:
        raise UserError(
            f"Cannot write to --out={out}: {error}. Use another folder, or free some space."
        ) from error


@dataclass(frozen=True)
class Writing:
    """Writes the part of one rank."""

    config: RunConfig
    world: dist.World
    extractor: FeatureExtractor
    folder: FeatureFolder
    facts: Mapping[str, Any]
    manifest: Mapping[str, Any]  # index.json of the video

    @classmethod
    def begin(
        cls,
        config: RunConfig,
        world: dist.World,
        out: Path,
        views: int,
        dtype: str,
        splits: tuple[str, ...],
    ) -> "Writing":
        """Load the encoder and create or continue the folder. Every rank must call it.

        Raises UserError if the options, the video and the folder do not fit each other.
        """
        # Fail early if there is no stage-1 result.
        if config.visual_run != "none":
            stage_1_export(config)
        sources: dict[str, Index] = {}
        for split in splits:
            sources[split] = open_index(config.data, split, world)
        manifest = dist.main_first(lambda: read_manifest(sources[splits[0]].store), world)
        check_video(manifest, config.data.shards[0], "launch/features.py")
        # Seed as stage llm does, because parts of the encoder may be random.
        torch.manual_seed(config.train.seed)
        extractor = feature_extractor(config, world).to(world.device)
        options = feature_options(config.data)
        facts = {
            "source": sources[splits[0]].root,
            "encoder": extractor.fingerprint(),
            "made_by": config.visual_run,
            "width": extractor.feature_width,
            "dtype": dtype,
            "options": options,
            "seed": config.train.seed,
        }
        # Training draws random frames and augmentations; evaluation has a single view.
        views_of = dict.fromkeys(splits, 1)
        if TRAINING in splits:
            views_of[TRAINING] = views
        folder = FeatureFolder(out, sources, views_of)

        # Collect all that decides the bytes of the features, by the names for messages.
        plan = {
            "the encoder": facts["encoder"],
            "--views": views,
            "--dtype": dtype,
            "--splits": ",".join(splits),
            "train.seed": config.train.seed,
        }
        for name, value in options.items():
            plan[f"data.{name}"] = value
        for split, index in sources.items():
            plan[f"the source of {split}"] = index.fingerprint
        dist.main_first(lambda: _written(out, lambda: folder.begin(plan)), world)
        dist.on_each_machine(folder.check_shared, world)
        return cls(config, world, extractor, folder, facts, manifest)

    def run(self, stop: StopRequest) -> None:
        """Write the remaining tars of this rank. Raises Preempted when asked to stop."""
        stop.begin()
        try:
            self._write(stop)
        finally:
            self.folder.end()

    def _write(self, stop: StopRequest) -> None:
        readers: dict[str, TolerantReader] = {}
        sizes: dict[str, np.ndarray] = {}
        for split in self.folder.sources:
            readers[split] = self.reader(split)
            sizes[split] = readers[split].num_places()

        # Rank 0 alone looks which tars are left: ranks that look at different times could
        # divide different lists.
        left = dist.main_first(lambda: [job.name for job in self.folder.left()], self.world)
        names = set(left)
        jobs = [job for job in self.folder.jobs() if job.name in names]
        mine = share(jobs, sizes, self.world.rank, self.world.size)
        progress = Progress(len(mine), self.world.is_main)
        for split, reader in readers.items():
            part = [job for job in mine if job.split == split]
            for job, clips in self.encoded(part, reader, stop):
                try:
                    self.folder.write(job, clips)
                except OSError as error:
                    raise RankError(
                        f"Cannot write {job.name} to {self.folder.out}: {error}. Free some "
                        "space and run the same command again."
                    ) from error
                progress.tar(sum(map(len, clips)))

        # Wait for all ranks: each has written its last tar, or was asked to stop.
        if any(dist.gather_objects(bool(stop), self.world)):
            raise Preempted("stopped; the same command continues with the remaining tars.")
        finish = partial(self.folder.finish, self.facts, self.manifest)
        dist.main_first(lambda: _written(self.folder.out, finish), self.world)
        if self.world.is_main:
            out = self.folder.out
            print(
                f"features are in {out}\nnext: stage llm with --data.shards={out}",
                flush=True,
            )

    def reader(self, split: str) -> "TolerantReader":
        """Return the reader of the video of a split."""
        data, index = self.config.data, self.folder.sources[split]
        # A broken clip of training may be replaced; evaluation scores all clips.
        training = split == TRAINING
        budget = math.ceil(data.max_broken * len(index)) if training else 0
        sampling = FrameSampling.of(data)
        return TolerantReader(
            index, sampling, self.config.train.seed, training, broken=BrokenClips(budget)
        )

    def encoded(
        self, jobs: list[FeatureTar], reader: "TolerantReader", stop: StopRequest
    ) -> Iterator[tuple[FeatureTar, list[np.ndarray]]]:
        """Yield each job with features_SD of its clips: NaN for a broken clip.

        jobs: of the split of the reader; the order is kept. Ends early when this rank is
        asked to stop. Raises RankError for features that are not finite.
        """
        if not jobs:
            return
        plan, last_steps = plan_of(jobs, reader.num_places())
        threads = decode_threads(self.config.data.threads, self.world)
        loader = Loader(reader, plan, threads=threads)
        found: dict[int, np.ndarray] = {}  # by row: the features of the current job
        for step, (batch,) in enumerate(on_device(loader.steps(), self.world.device)):
            if stop:
                return
            view = int(plan.passes[plan.places_of(step)[0][0]])
            rows = plan.micro_batches_of(step)[0].tolist()
            features = self.features_of(batch, reader.train)
            for row, features_SD in zip(rows, features, strict=True):
                # NaN marks a broken clip, which training replaces as it does with video.
                if (row, view) in reader.lost:
                    features_SD = np.full_like(features_SD, np.nan)
                elif not np.isfinite(features_SD).all():
                    key = reader.index.strings("key")[row]
                    raise RankError(
                        f"Cannot store the features of {key} as {features_SD.dtype}: a "
                        "value is not finite. Use --dtype=float32, or check the encoder."
                    )
                found[row] = features_SD
            if step in last_steps:
                job = last_steps[step]
                yield job, [found[row] for row in job.rows.tolist()]
                found = {}

    def features_of(self, batch: Batch, train: bool) -> list[np.ndarray]:
        """Return features_SD of each clip of a batch, in the dtype of the folder."""
        preprocess = make_preprocess(self.config.data)
        encoded_ND = encode(
            batch, self.extractor, preprocess, train=train, device=self.world.device
        )
        # `encoded` checks for values that are not finite.
        with np.errstate(over="ignore"):
            features_ND = encoded_ND.cpu().numpy().astype(self.facts["dtype"])
        return np.split(features_ND, np.cumsum(batch.num_frames_B.numpy())[:-1])


@dataclass(frozen=True)
class TolerantReader(VideoReader):
    """Reads a clip that does not decode as black frames, and records it in `lost`.

    broken: raises RankError after too many broken clips. lost: (row, view) of each broken
    clip.
    """

    broken: BrokenClips = field(default_factory=lambda: BrokenClips(0))
    lost: set[tuple[int, int]] = field(default_factory=set)

    def load(self, row: int, epoch: int, part: torch.Tensor) -> Clip:
        try:
            return super().load(row, epoch, part)
        except (ValueError, OSError) as error:
            self.broken.add(
                self.index.tar(row).file, self.index.strings("key")[row], str(error)
            )
            self.lost.add((row, epoch))
            # Any frames will do: `Writing.encoded` replaces the features by NaN.
            part.zero_()
            return Clip(self.draws(row, epoch)[0])


def plan_of(
    jobs: Sequence[FeatureTar],
    num_kept: np.ndarray,
) -> tuple[EpochPlan, dict[int, FeatureTar]]:
    """Return the batches of the jobs, and for each last batch of a job, that job.

    num_kept: frames of each clip. No batch has clips of two jobs: which clips are encoded
    together depends on the job alone, and so do the bytes of a tar. They depend neither on
    the number of ranks nor on the tars that were written before.
    """
    batches: list[np.ndarray] = []
    views: list[int] = []
    last_steps = {}
    for job in jobs:
        # Count the frames of the job in blocks of BATCH_FRAMES. A batch has the clips
        # whose last frame is in the same block.
        sums = np.cumsum(num_kept[job.rows])
        cuts = np.flatnonzero(np.diff((sums - 1) // BATCH_FRAMES)) + 1
        parts = np.split(job.rows, cuts)
        batches += parts
        views += [job.view] * len(parts)
        last_steps[len(batches) - 1] = job
    sizes = list(map(len, batches))
    order, passes = np.concatenate(batches), np.repeat(views, sizes)
    plan = EpochPlan(order, passes, np.cumsum(sizes), num_kept, num_micro_batches=1)
    return plan, last_steps


class Progress:
    """Prints the progress of rank 0: one line per 10 s, and one after its last tar."""

    def __init__(self, num_tars: int, enabled: bool) -> None:
        self._num_tars, self._enabled = num_tars, enabled
        self._begin = self._said = time.perf_counter()
        self._done = self._frames = 0

    def tar(self, frames: int) -> None:
        """Count a tar that was written, with this number of frames."""
        self._done, self._frames = self._done + 1, self._frames + frames
        now = time.perf_counter()
        if not self._enabled or (now - self._said < 10 and self._done < self._num_tars):
            return
        self._said = now
        seconds = now - self._begin
        left = clock(seconds * (self._num_tars / self._done - 1))
        rate = self._frames / seconds
        print(
            f"features: tar {self._done}/{self._num_tars}  {rate:.0f} frames/s  left "
            f"{left}",
            flush=True,
        )
