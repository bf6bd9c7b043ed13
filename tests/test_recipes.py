"""The named configurations, and `flallm recipes`, which lists them."""

import pytest

from flallm_ds.cli.recipes import recipe_list
from flallm_ds.config import RunConfig
from flallm_ds.recipes import FAMILIES, RECIPES, config_of, family_of, resolve_both


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_makes_a_config_and_has_a_summary(name: str) -> None:
    config = config_of(name)
    assert isinstance(config, RunConfig) and config.run == f"runs/{name}"
    summary = RECIPES[name].summary
    assert summary and "\n" not in summary
    assert family_of(name) in FAMILIES


@pytest.mark.parametrize("name", RECIPES)
def test_a_row_names_only_options_that_differ_from_its_base(name: str) -> None:
    recipe = RECIPES[name]
    base, own = recipe.base.options(), config_of(name).options()
    differing = {option for option, value in own.items() if value != base[option]}
    assert differing == {"run", *recipe.options}


def test_joint_training_of_the_quickstart_is_as_long_as_both_stages() -> None:
    visual, llm = config_of("quickstart_visual"), config_of("quickstart_llm")
    joint = config_of("quickstart_joint")
    assert joint.train.epochs == visual.train.epochs + llm.train.epochs
    assert joint.data == visual.data and joint.optim.backbone_lr == visual.optim.backbone_lr


def test_a_corpus_of_ones_own_takes_language_and_pace_from_its_shards() -> None:
    visual, llm = resolve_both("mine", {"data.shards": "data/my_shards"})
    assert visual.data.shards == llm.data.shards == ("data/my_shards",)
    assert visual.llm.language == llm.llm.language == ""  # that of each clip
    assert visual.data.target_fps == llm.data.target_fps == 6.25
    assert (visual.run, llm.visual_run) == ("runs/mine_visual", "runs/mine_visual")


def test_the_list_prints_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = recipe_list()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for name, recipe in RECIPES.items():
        paper = "-" if recipe.paper is None else f"{recipe.paper:.2f}"
        ours = f" (ours: {recipe.ours})" if recipe.ours else ""
        assert f"{name} {paper} {recipe.summary}{ours}" in words
    for family, purpose in FAMILIES.items():
        assert f"\n{family}: {purpose}\n" in f"\n{text}"
