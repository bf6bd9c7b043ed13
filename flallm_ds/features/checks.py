"""Whether a run may train on, or be scored on, features that launch/features.py wrote."""

from collections.abc import Mapping
from typing import Any

from flallm_ds.config import DataConfig, RunConfig
from flallm_ds.data.index import FeatureIndex, Index
from flallm_ds.errors import UserError
from flallm_ds.features.facts import OPTIONS


def feature_options(data: DataConfig) -> dict[str, Any]:
    """Return the options that decide the pixels of features (`OPTIONS`), with their values."""
    return {name: getattr(data, name) for name in OPTIONS}


def check_stage(config: RunConfig, train_index: Index) -> None:
    """Raise UserError where cached features, or an option for frozen ones, do not go with
    the run's stage."""
    data = config.data
    if config.trains_visual:
        how = f"stage is {config.stage}"
        if config.stage == "llm":
            how = f"visual.frozen is {config.visual.frozen}"
        # Cached features are constants: no gradient could reach the encoder.
        if isinstance(train_index, FeatureIndex):
            facts = train_index.features[0]
            raise UserError(
                "data.shards must be video where the visual encoder is trained, but "
                f"{facts.root} holds features and {how}. Give the shards that they were "
                f"made from ({facts.source})."
            )
        for name in ("time_masks", "feature_masks"):
            if getattr(data, name):
                raise UserError(
                    f"data.{name} must be 0 where the visual encoder is trained, because "
                    f"it masks frozen features, but is {getattr(data, name)} and {how}."
                )
    if data.feature_fps is not None and not isinstance(train_index, FeatureIndex):
        raise UserError(
            "data.feature_fps must be none where data.shards are video, but is "
            f"{data.feature_fps}. Write features with launch/features.py, or give "
            "--data.target_fps."
        )


def check_run(
    config: RunConfig, train_index: FeatureIndex, dev_index: FeatureIndex, encoder: str
) -> None:
    """Raise UserError unless the features are what this run's frozen encoder would make
    of the video.

    encoder: its fingerprint.
    """
    options = feature_options(config.data)
    for index in (train_index, dev_index):
        check_features(index, options, encoder, f"--visual_run={config.visual_run}")
    check_evaluation(dev_index)
    for facts in train_index.features:
        if not facts.training:
            raise UserError(
                "the training split must hold training's views, but does not: "
                f"{facts.root}."
            )
        if facts.seed_matters and facts.seed != config.train.seed:
            raise UserError(
                f"train.seed must be {facts.seed}, with which the views of {facts.root} "
                f"were drawn, but is {config.train.seed}. Give --train.seed={facts.seed}, "
                "or make features with this seed."
            )


def check_features(
    index: FeatureIndex, options: Mapping[str, Any], encoder: str, encoder_of: str
) -> None:
    """Raise UserError unless features are of this encoder and of frames by these options
    (of `OPTIONS`)."""
    for facts in index.features:
        if facts.encoder != encoder:
            raise UserError(
                f"features must be of the encoder of {encoder_of} ({encoder[:12]}), but "
                f"those in {facts.root} are of {facts.made_by} ({facts.encoder[:12]}). "
                "Name that run, or make features anew with launch/features.py."
            )
        for name, value in options.items():
            before = facts.options[name]
            if before != value:
                raise UserError(
                    f"data.{name} must be {before} as when the features in {facts.root} "
                    f"were made, but is {value}. Give --data.{name}={before}, or make "
                    "others with launch/features.py."
                )


def check_evaluation(index: FeatureIndex) -> None:
    """Raise UserError where features are of training's random picks, which no score
    should come from."""
    for facts in index.features:
        if facts.training:
            raise UserError(
                "features that are scored must be evaluation's view, but split "
                f"{index.split} of {facts.root} holds training's. Score another split, or "
                f"the video in {facts.source}."
            )
