"""The table of named runs, and `flallm recipes`, which prints it."""

import pytest

from flallm_ds.cli.recipes import recipes
from flallm_ds.config import RunConfig
from flallm_ds.recipes import RECIPES, config_of


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_makes_a_config_and_says_what_it_is(name: str) -> None:
    config = config_of(name)
    assert isinstance(config, RunConfig) and config.run == f"runs/{name}"
    summary = RECIPES[name].summary
    assert summary and "\n" not in summary


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


def test_the_list_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    lines = capsys.readouterr().out.splitlines()
    printed = {line.split()[0]: line for line in lines if line}
    for name, recipe in RECIPES.items():
        assert recipe.summary in printed[name]
        assert (recipe.ours or "not measured") in printed[name]
        if recipe.paper is not None:
            assert f"{recipe.paper:.2f}" in printed[name]
