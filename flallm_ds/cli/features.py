"""`flallm features`, and under a launcher `deepspeed launch/features.py`."""

from pathlib import Path
from typing import Literal

from flallm_ds.command import main
from flallm_ds.errors import UserError
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
    """Write the features of a stage-1 result's frozen encoder, for stage llm to train on.

    deepspeed launch/features.py --recipe=RECIPE --visual_run=RUN --out=FOLDER --views=4

    Recipe and dotted options are those of the run that is to train on them: frames, crops, seed.
    --views: how many epochs' frame picks and augmentations of the training clips; a longer run
        begins again.
    --dtype: float16 takes half the room.
    --splits: which; all but train have one view, evaluation's.
    --shards: instead of --data.shards.
    """
    if shards is not None:
        if "data.shards" in overrides:
            raise UserError("--shards and --data.shards must not be given together.")
        overrides["data.shards"] = shards
    config = resolve("llm", recipe, overrides)
    # torch takes seconds to import: the options are known to be right by now.
    from flallm_ds.features.writing import write_features

    write_features(config, out, views, dtype, splits)


if __name__ == "__main__":
    main(features)
