"""docs/options.md says who needs each option that no recipe changes."""

import re

from flallm_ds.config import RunConfig
from flallm_ds.recipes import RECIPES, resolve
from tests.helpers.paths import ROOT


def unchanged() -> set[str]:
    """The options that have their default in every recipe."""
    default = RunConfig(stage="visual", run="").options()
    recipes = [resolve(None, name, {}).options() for name in RECIPES]
    changed = {
        name for options in recipes for name in options if options[name] != default[name]
    }
    return set(default) - changed


def test_every_option_that_no_recipe_changes_says_who_needs_it() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    explained = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(explained) == sorted(unchanged())
