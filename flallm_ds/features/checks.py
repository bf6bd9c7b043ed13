"""Check that cached features, written by launch/features.py, fit a run or an evaluation."""

from collections.abc import Mapping
from typing import Any

from flallm_ds.config import DataConfig, RunConfig
from flallm_ds.data.index import FeatureIndex, Index
from flallm_ds.errors import UserError
from flallm_ds.features.facts import OPTIONS


def feature_options(data: DataConfig) -> dict[str, Any]:
    """Return the values of the options that decide the pixels of features (`OPTIONS`)."""
    return {name: getattr(data, name) for name in OPTIONS}


def check_stage(config: RunConfig, train_index: Index) -> None:
    """Raise UserError if the stage of a run cannot use cached features, or their options.

    train_index: of the training split.
    """
    data = config.data
    if config.trains_visual:
        how = f"stage is {config.stage}"
        if config.stage == "llm":
            how = f"visual.frozen is {config.visual.frozen}"
        # Cached features are constants: no gradient could reach the encoder.
        if isinstance(train_index, FeatureIndex):
            facts = train_index.features[0]
            raise UserError(
                f"data.shards must be video where the visual encoder is trained ({how}), "
                f"got features in {facts.root}. Use the shards that they were computed "
                f"from ({facts.source})."
            )
        # A mask sets frozen features to zero; a trained encoder has augmentations instead.
        for name in ("time_masks", "feature_masks"):
            if getattr(data, name):
                raise UserError(
                    f"data.{name} must be 0 where the visual encoder is trained ({how}), "
                    f"got {getattr(data, name)}. Set --data.{name}=0."
                )
    # Frames of a video are dropped before the encoder instead.
    if data.feature_fps is not None and not isinstance(train_index, FeatureIndex):
        raise UserError(
            "data.feature_fps must be none where data.shards are video, got "
            f"{data.feature_fps}. Write features with launch/features.py, or use "
            "--data.target_fps."
        )


def check_run(
    config: RunConfig, train_index: FeatureIndex, dev_index: FeatureIndex, encoder: str
) -> None:
    """Raise UserError unless the frozen encoder of a run would compute these features.

    encoder: the fingerprint of that encoder.
    """
    # Each folder of a mixture has its own features, so all are compared.
    options = feature_options(config.data)
    for index in (train_index, dev_index):
        check_features(index, options, encoder, f"--visual_run={config.visual_run}")
    check_evaluation(dev_index)
    for facts in train_index.features:
        if not facts.training:
            raise UserError(
                "The training split must have training views, got evaluation views in "
                f"{facts.root}. Write the features again with launch/features.py."
            )
        # A run on video would draw its frames and augmentations with train.seed.
        if facts.seed_matters and facts.seed != config.train.seed:
            raise UserError(
                f"Features {facts.root} were made with another seed (train.seed "
                f"{facts.seed}, got {config.train.seed}). Use --train.seed={facts.seed}, "
                "or write features with this seed."
            )


def check_features(
    index: FeatureIndex, options: Mapping[str, Any], encoder: str, encoder_of: str
) -> None:
    """Raise UserError unless features were computed by this encoder with these options.

    options: values of `OPTIONS`. encoder: a fingerprint; encoder_of: the option that names
    the encoder, for the message.
    """
    for facts in index.features:
        # 12 of the 64 digits of a fingerprint are enough to compare by eye.
        if facts.encoder != encoder:
            raise UserError(
                f"Features {facts.root} were made by another encoder ({facts.made_by} "
                f"{facts.encoder[:12]}, got {encoder_of} {encoder[:12]}). Use that encoder, "
                "or write the features again with launch/features.py."
            )
        for name, value in options.items():
            before = facts.options[name]
            if before != value:
                raise UserError(
                    f"Features {facts.root} were made with another data.{name} ({before}, "
                    f"got {value}). Use --data.{name}={before}, or write the features again "
                    "with launch/features.py."
                )


def check_evaluation(index: FeatureIndex) -> None:
    """Raise UserError if features have training views, which are not used for scores.

    Training views come from random frames and augmentations.
    """
    for facts in index.features:
        if facts.training:
            raise UserError(
                "Features for scores must have the evaluation view, got training views of "
                f"split {index.split} in {facts.root}. Score another split, or the video "
                f"in {facts.source}."
            )
