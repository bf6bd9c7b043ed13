"""Build the objects of a run from its RunConfig: `build_task`, with one file per kind of
object.

Together with `flallm_ds/cli`, this is the only code that reads a config to create objects.
"""

from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from flallm_ds.config import RunConfig
from flallm_ds.data.index import FeatureIndex
from flallm_ds.dist import World
from flallm_ds.features.checks import check_run
from flallm_ds.models.sign_translator import Beam
from flallm_ds.training import engine as ds
from flallm_ds.training.batch_statistics import BatchStatistics, KeptStatistics
from flallm_ds.training.build.data import (
    check_clips,
    make_masks,
    make_preprocess,
    make_split,
    open_indexes,
)
from flallm_ds.training.build.engine import deepspeed_config, parameter_groups
from flallm_ds.training.build.language import llm_model, open_codec, visual_model
from flallm_ds.training.build.visual import feature_extractor
from flallm_ds.training.task import Task
from flallm_ds.training.weights_record import record_weights


def build_task(config: RunConfig, folder: Path, world: World) -> Task:
    """Build the data, the codec of the texts, the models and the engine of a run.

    folder: of the run, opened by `run_folder`. Every rank must call it. Raises UserError if
    options, data and models do not fit each other.
    """
    # Open the data first: most mistakes in options show there, within seconds.
    ds.prepare()
    transformers_logging.disable_progress_bar()
    train_index, dev_index = open_indexes(config, world)
    ds_config = deepspeed_config(config, world)

    # Seed all ranks equally, so that they draw the same initial weights. The order of the
    # calls below decides those weights.
    torch.manual_seed(config.train.seed)
    codec = open_codec(config, folder, train_index, world)
    extractor = feature_extractor(config, world).to(world.device)
    if isinstance(train_index, FeatureIndex) and isinstance(dev_index, FeatureIndex):
        check_run(config, train_index, dev_index, extractor.fingerprint())
    if config.stage == "visual":
        model = visual_model(config, codec, extractor).to(world.device)
    else:
        model = llm_model(config, codec, folder, extractor, ds_config, world)

    # Check the clips before DeepSpeed starts, because its start takes the longest.
    train = make_split(train_index, config, codec, world, train=True)
    dev = make_split(dev_index, config, codec, world, train=False)
    check_clips(config, (train, dev), codec, model, extractor)
    record_weights(config, folder, world)

    groups = parameter_groups(model, config)
    engine = ds.Engine(model, groups, config.optim, ds_config, world)
    search = config.eval
    task = Task(
        config=config,
        world=world,
        train=train,
        dev=dev,
        codec=codec,
        preprocess=make_preprocess(config.data),
        masks=make_masks(config.data),
        beam=Beam(search.num_beams, search.length_penalty, search.max_new_tokens),
        frozen=None if config.trains_visual else extractor,
        engine=engine,
        lrs=tuple(group["lr"] for group in groups),
        statistics=BatchStatistics(engine.module, world),
        kept=KeptStatistics(engine.module.train()),
    )
    # A model that cannot generate would fail only at the first scoring, after an epoch.
    task.check_generation()
    return task
