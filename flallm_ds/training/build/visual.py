"""Build the visual side of a run: the backbone, the encoder, and what of it is trained."""

import socket
from pathlib import Path

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.dist import World, main_first
from flallm_ds.errors import RankError, UserError
from flallm_ds.models.backbones.build import build_backbone, check_reachable
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.llm.tuning import Tuning
from flallm_ds.models.visual_encoder import VisualEncoder, resnet_width


def feature_extractor(config: RunConfig, world: World) -> FeatureExtractor:
    """Build the visual encoder, from stage 1 or with ImageNet weights; freeze its
    untrained parts."""
    if config.stage != "llm" or config.visual_run == "none":
        kind = "signs" if config.stage == "visual" else config.llm.input
        extractor = FeatureExtractor(imagenet_encoder(config, world), kind)
    else:
        extractor = export.read_features(stage_1_export(config), config.llm.input)
    if config.stage != "llm" or config.visual.frozen == "none":
        _tune_backbone(extractor.visual.backbone, config)
    extractor.visual.chunk_frames = config.visual.chunk_frames
    if config.visual.checkpointing and config.trains_visual:
        extractor.visual.backbone.checkpoint_activations()
    return extractor.freeze(config.visual.frozen if config.stage == "llm" else "none")


def stage_1_export(config: RunConfig) -> Path:
    """Find the export that stage llm begins with.

    Raises UserError where there is none, or one of another width.
    """
    try:
        folder = export.find(config.visual_run or "")
    except UserError as error:
        raise UserError(
            f"stage llm needs a result of stage visual: {error} Make one with: "
            f"deepspeed launch/train.py --stage visual --run={config.visual_run}"
        ) from error
    width = resnet_width(export.read_settings(folder)["visual"])
    if width not in (None, config.visual.width):
        raise UserError(
            f"visual.width must be {width} as in the stage-1 result {folder}, but is "
            f"{config.visual.width}. Give --visual.width={width} or a --visual_run."
        )
    return folder


def imagenet_encoder(config: RunConfig, world: World) -> VisualEncoder:
    """Build a visual encoder of the backbone of visual.weights and a new temporal module."""
    backbone = _load_backbone(config, world)
    return VisualEncoder(temporal_kernel=config.visual.temporal_kernel, backbone=backbone)


def _load_backbone(config: RunConfig, world: World) -> Backbone:
    """Load the backbone of visual.weights, first on rank 0, which fills the hub's cache.

    Raises UserError where it cannot be loaded, RankError where that is so on one machine.
    """
    visual = config.visual
    crop_size = config.data.crop_size
    made: list[Backbone] = []

    def load() -> None:
        made.append(
            build_backbone(visual.weights, visual.width, visual.pretrained, crop_size)
        )

    def first() -> None:
        if visual.pretrained:
            check_reachable(visual.weights)
        try:
            load()
        except OSError as error:
            raise UserError(
                f"visual.weights must be within reach, but {visual.weights} is not: "
                f"{str(error).splitlines()[0]} Give a folder or file of this machine, or "
                "--visual.weights=none to train from random weights, which costs accuracy."
            ) from error

    main_first(first, world)
    try:
        if not made:
            load()
    except OSError as error:
        raise RankError(
            f"visual.weights must be within reach of every machine, but {visual.weights} "
            f"is not of {socket.gethostname()}: {error}. Give a folder that all machines "
            "see."
        ) from error
    return made[0]


def _tune_backbone(backbone: Backbone, config: RunConfig) -> None:
    """Freeze parts of a backbone that is trained, and add LoRA layers where they are
    asked for."""
    visual = config.visual
    backbone.freeze_batch_norm = visual.freeze_batch_norm
    backbone.freeze(visual.frozen_stages)
    backbone.tune(
        Tuning(
            visual.tune,
            rank=visual.lora_rank,
            alpha=visual.lora_alpha,
            targets=visual.lora_targets,
            section="visual",
        ),
        config.train.seed,
    )
