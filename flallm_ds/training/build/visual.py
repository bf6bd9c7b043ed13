"""Build the visual encoder of a run, and freeze the parts that are not trained."""

import socket
from pathlib import Path

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.dist import World, main_first
from flallm_ds.errors import RankError, UserError
from flallm_ds.export_folder import find_stage_1
from flallm_ds.models.backbones.build import build_backbone, check_reachable
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.llm.tuning import Tuning
from flallm_ds.models.visual_encoder import VisualEncoder, resnet_width


def feature_extractor(config: RunConfig, world: World) -> FeatureExtractor:
    """Build the feature extractor of a run, and freeze the parts that are not trained.

    Its encoder comes from a stage-1 result, or has the weights of visual.weights. Every
    rank must call it. Raises UserError or RankError if weights cannot be loaded.
    """
    # Only stage llm starts from a stage-1 result; --visual_run=none skips stage 1.
    if config.stage != "llm" or config.visual_run == "none":
        kind = "signs" if config.stage == "visual" else config.llm.input
        extractor = FeatureExtractor(imagenet_encoder(config, world), kind)
    else:
        extractor = export.read_features(stage_1_export(config), config.llm.input)
    if config.stage != "llm" or config.visual.frozen == "none":
        _tune_backbone(extractor.encoder.backbone, config)
    extractor.encoder.chunk_frames = config.visual.chunk_frames
    # Only a backward pass reads activations.
    if config.visual.checkpointing and config.trains_visual:
        extractor.encoder.backbone.checkpoint_activations()
    return extractor.freeze(config.visual.frozen if config.stage == "llm" else "none")


def stage_1_export(config: RunConfig) -> Path:
    """Return the folder of the stage-1 export that visual_run names.

    Raises UserError if there is none, or if its backbone has another width.
    """
    folder = find_stage_1(config.visual_run)
    # None: visual.width does not apply to backbones that are not plain ResNets.
    width = resnet_width(export.read_settings(folder)["visual"])
    if width not in (None, config.visual.width):
        raise UserError(
            f"Stage-1 result {folder} was trained with another width (visual.width "
            f"{width}, got {config.visual.width}). Use --visual.width={width}, or another "
            "--visual_run."
        )
    return folder


def imagenet_encoder(config: RunConfig, world: World) -> VisualEncoder:
    """Build a visual encoder: the backbone of visual.weights, and a new temporal module."""
    backbone = _load_backbone(config, world)
    return VisualEncoder(temporal_kernel=config.visual.temporal_kernel, backbone=backbone)


def _load_backbone(config: RunConfig, world: World) -> Backbone:
    """Load the backbone of visual.weights.

    Rank 0 loads it first, which fills the cache of the hub for the others. Raises
    UserError if rank 0 cannot load it, RankError if another rank cannot.
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
            # transformers adds lines of general advice to the first one.
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"Cannot load visual.weights {visual.weights}: {reason}. Use a folder or "
                "file of this machine, or --visual.weights=none to train from random "
                "weights, which costs accuracy."
            ) from error

    main_first(first, world)
    try:
        # Rank 0 has loaded it.
        if not made:
            load()
    except OSError as error:
        raise RankError(
            f"Cannot load visual.weights {visual.weights} on {socket.gethostname()}: "
            f"{error}. Use a folder that all machines can read."
        ) from error
    return made[0]


def _tune_backbone(backbone: Backbone, config: RunConfig) -> None:
    """Freeze parts of a trained backbone, and add LoRA layers if visual.tune is lora."""
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
