"""Compare configurations: with that of a run folder, and with the recipes.

This module must not import torch: a command compares before its slow imports.
"""

from pathlib import Path
from typing import Any

from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.errors import UserError
from flallm_ds.recipes import RECIPES, config_of

SHOWN = 3  # number of options that an error names


def check_same_run(config: RunConfig, saved: RunConfig, folder: Path) -> None:
    """Raise UserError if an option differs that changes numbers.

    saved: the configuration of the run in `folder`. The error names the stage if it
    differs, else the recipes if they differ, and the first options.
    """
    changed = []
    options = config.options()
    for name, value in saved.options().items():
        if name not in FREE_TO_CHANGE and options[name] != value:
            changed.append(f"{name} {value!r}, got {options[name]!r}")
    if not changed:
        return
    if config.stage != saved.stage:
        raise UserError(
            f"Run folder {folder} belongs to another stage ({changed[0]}). Use "
            f"--stage={saved.stage}, or another --run=FOLDER."
        )
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    raise UserError(
        f"Run folder {folder} belongs to another configuration "
        f"({_recipes(config, saved, len(changed))}{'; '.join(changed[:SHOWN])}{more}). Use "
        f"the same value{'s' if len(changed) > 1 else ''}, or another --run=FOLDER."
    )


def _recipes(config: RunConfig, saved: RunConfig, num_changed: int) -> str:
    """Return the recipes of two configurations; empty if it is the same, or not known."""
    before, of_before = nearest_recipe(saved)
    now, of_now = nearest_recipe(config)
    # A configuration with many options of its own is of no recipe.
    is_known = max(len(of_before), len(of_now)) < num_changed
    return f"recipe {before}, got {now}: " if before != now and is_known else ""


def nearest_recipe(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """Return the recipe of the same stage with the fewest differences, and these.

    Only options count that change the results of a new run.
    """
    differences = {}
    of_stage = [name for name in RECIPES if config_of(name).stage == config.stage]
    for name in of_stage or RECIPES:
        differences[name] = _differences(config, config_of(name))
    nearest = min(differences, key=lambda name: len(differences[name]))
    return nearest, differences[nearest]


def _differences(config: RunConfig, recipe: RunConfig) -> dict[str, Any]:
    """Return the options that change results and differ from those of a recipe."""
    # A resumed run may set another path for visual_run and data.shards, because their
    # content is compared, and another train.patience. In a new run they change the results.
    free = set(FREE_TO_CHANGE) - {"visual_run", "data.shards", "train.patience"}
    base = recipe.options()
    differences = {}
    for option, value in config.options().items():
        if option not in free and value != base[option]:
            differences[option] = value
    return differences
