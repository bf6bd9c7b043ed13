"""`flallm features`; under a launcher `deepspeed launch/features.py`."""

from pathlib import Path
from typing import Literal

from flallm_ds.cli.checks import check_runs
from flallm_ds.command import main
from flallm_ds.errors import UserError, require
from flallm_ds.recipes import resolve


def features(
    *,
    out: Path,
    views: int = 4,
    dtype: Literal["float32", "float16"] = "float32",
    splits: tuple[str, ...] = ("train", "dev", "test"),
    shards: str | None = None,
    recipe: str | None = None,
    **overrides: str,
) -> None:
    """Write the features of a frozen visual encoder, on which stage llm trains faster.

    Give the recipe and the options of the stage llm that will train on them: frames,
    crops and seed must be the same.

    Example: deepspeed launch/features.py --recipe=mine --visual_run=runs/mine_visual
        --out=data/mine_features

    Options:
        out: the feature folder to write
        views: number of epochs with frame picks and augmentations of their own; a longer run
            repeats them
        dtype: float16 takes half the disk space
        splits: splits to write; all but train have one view, without augmentation
        shards: a shard folder, instead of --data.shards
        recipe: a named configuration (flallm recipes)
    """
    if shards is not None:
        if "data.shards" in overrides:
            raise UserError(
                f"--shards must be given without --data.shards, got {shards} and "
                f"{overrides['data.shards']}. Leave one out."
            )
        overrides["data.shards"] = shards
    config = resolve("llm", recipe, overrides)
    # Cached features are of one shard folder, and of an encoder that training leaves as it is.
    require(views >= 1, f"--views must be at least 1, got {views}.")
    require(bool(splits), "--splits must name a split, got an empty value.")
    num_folders = len(config.data.shards)
    require(
        num_folders == 1,
        f"--data.shards must name one folder, got {num_folders}. Write the features of each, "
        "and give all of them to stage llm.",
    )
    require(
        not config.trains_visual,
        f"visual.frozen must be all where features are written, got {config.visual.frozen}.",
    )
    check_runs((config,), splits)
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds.features.writing import write_features

    write_features(config, out, views, dtype, splits)


if __name__ == "__main__":
    main(features)
