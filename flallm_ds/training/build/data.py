"""Build the data of a run: indexes, plans, readers, and checks of the clips."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from flallm_ds.config import DataConfig, RunConfig
from flallm_ds.data import mixture
from flallm_ds.data.device import check_nvjpeg
from flallm_ds.data.index import Index, read_manifest
from flallm_ds.data.loader import BrokenClips
from flallm_ds.data.overlap import overlap
from flallm_ds.data.plan import Plan, micro_batches_of_rank, temperature_weights
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.data.readers import ClipReader, open_reader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.storage.store import CacheOptions, open_store
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.dist import World, cores_of_rank, main_first, on_each_machine, on_every_rank
from flallm_ds.errors import UserError, require
from flallm_ds.features.checks import check_stage
from flallm_ds.features.sequences import FeatureMasks
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.llm.load import longest_input
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.training.task import Split

# The split whose scores are published; compared with the training clips.
TEST = "test"


def open_indexes(config: RunConfig, world: World) -> tuple[Index, Index]:
    """Open the training and the dev index. Raises UserError if they do not fit the run."""
    # Check the options that need no data first.
    data = config.data
    micro_batches_of_rank(data.micro_batches, world.rank, world.size)
    if data.decoder == "nvjpeg":
        check_nvjpeg(world.device)
        check_jpegs(data)
    train_index = open_index(data, "train", world)
    dev_index = open_index(data, config.eval.split, world)
    check_stage(config, train_index)
    if data.same_clips == "refuse":
        main_first(lambda: check_same_clips(data, train_index, dev_index), world)
    return train_index, dev_index


def check_same_clips(data: DataConfig, train: Index, dev: Index) -> None:
    """Raise UserError if a clip of the dev or the test split is also a training clip.

    Nothing is compared if the run is scored on the training split.
    """
    if dev.split == train.split:
        return
    indexes = [dev]
    if dev.split != TEST:
        with suppress(UserError):  # not every corpus has a test split
            indexes.append(
                mixture.open_indexes(data.shards, TEST, CacheOptions.of_run(data))
            )
    for index in indexes:
        found = overlap(train, index)
        require(
            not found.same_clips,
            f"Clips of split {index.split} must not be training clips, got "
            f"{len(found.same_clips):,} that are ({found.examples}). Build shards without "
            "them, or set --data.same_clips=allow.",
        )


def open_index(data: DataConfig, split: str, world: World) -> Index:
    """Open the index of a split of data.shards, and check the shards on every machine.

    Raises UserError on every rank if a machine lacks a shard, or has an incomplete one.
    """
    options = CacheOptions.of_run(data)
    index: Index = on_every_rank(
        lambda: mixture.open_indexes(data.shards, split, options), world
    )
    on_each_machine(lambda: index.store.check(index.shards, data.check_shards), world)
    return index


def check_jpegs(data: DataConfig) -> None:
    """Raise UserError if shards contain H.264, which the JPEG decoder of the GPU cannot
    decode."""
    for folder in data.shards:
        manifest = read_manifest(open_store(folder, CacheOptions.of_run(data)))
        options = manifest.get("options", {})
        require(
            options.get("clip_format") != "h264",
            f"data.decoder must be cpu where shards contain H.264, got {data.decoder} for "
            f"{folder}. Set --data.decoder=cpu.",
        )


def make_split(
    index: Index, config: RunConfig, codec: TextCodec, world: World, train: bool
) -> Split:
    """Plan the batches of a split and the part of this rank.

    train: shuffled, with random frames; otherwise as for evaluation.
    """
    data = config.data
    reader = make_reader(index, config, train)
    # Evaluation replaces no broken clip, because a score is of all clips of the split.
    max_broken = math.ceil(data.max_broken * len(index)) if train else 0
    return Split(
        reader,
        make_plan(reader, config),
        codec,
        world,
        threads=decode_threads(data.threads, world),
        broken=BrokenClips(max_broken),
    )


def make_reader(index: Index, config: RunConfig, train: bool) -> ClipReader:
    """Return the reader of a split. Only training decodes JPEGs on the GPU."""
    # The pixels of the GPU decoder differ by a few levels; scores always use the CPU.
    data = config.data
    return open_reader(
        index,
        FrameSampling.of(data),
        config.train.seed,
        train,
        feature_fps=data.feature_fps,
        keep_jpegs=train and data.decoder == "nvjpeg",
    )


def make_plan(reader: ClipReader, config: RunConfig) -> Plan:
    """Return the plan of the batches, with the share of each corpus in an epoch."""
    data = config.data
    weights = data.weights
    # A temperature above 1 gives small corpora a larger share.
    if data.temperature != 1 and len(data.shards) > 1:
        num_clips = np.bincount(reader.index.arrays["corpus"]).tolist()
        weights = temperature_weights(num_clips, data.temperature)
    return reader.plan(
        data.batch_clips,
        data.micro_batches,
        batch_frames=data.batch_frames,
        weights=weights,
    )


def decode_threads(asked: int, world: World) -> int:
    """Return the number of data-loading threads; 0 means one per core, up to 8."""
    return asked or min(8, cores_of_rank(world.local_size, os.environ))


def make_preprocess(data: DataConfig) -> Preprocess:
    """Return the preprocessing of frames on the device."""
    return Preprocess(data.frame_size, data.crop_size, data.augment)


def make_masks(data: DataConfig) -> FeatureMasks:
    """Return the masks for frozen features, which are applied in training."""
    return FeatureMasks(
        data.time_masks, data.time_mask_frames, data.feature_masks, data.feature_mask_width
    )


def check_clips(
    config: RunConfig,
    splits: Sequence[Split],
    codec: TextCodec,
    model: SignTranslator,
    extractor: FeatureExtractor,
) -> None:
    """Raise UserError if the codec lacks a language of the clips, or if a clip is too long
    for the models."""
    # Find all languages and the longest clip of the run.
    languages = set[str]()
    longest = 0
    for split in splits:
        languages.update(split.index.strings("language"))
        longest = max(longest, int(split.plan.num_kept.max()))

    # Find the longest prompt: its tokens take positions of the LLM, too. The codec raises
    # UserError for a language that it lacks.
    around = 0
    for language in sorted(languages):
        words = codec.wording(language)
        around = max(around, len(words.before) + len(words.after))

    # A table of position embeddings is a limit; rotary and relative positions have none.
    limits = []
    reads = longest_input(model.language_model)
    if reads is not None:
        limits.append(reads - around)
    if extractor.light_t_encoder is not None:
        limits.append(extractor.light_t_encoder.config.max_position_embeddings)
    if not limits:
        return
    limit = min(limits)
    require(
        longest <= limit,
        f"A clip must have at most {limit} frames, the number of positions of the model, "
        f"got {longest}. Use --data.max_frames={limit}, or a larger --data.keep_every (for "
        "cached features: a smaller --data.feature_fps).",
    )
