import dataclasses
import json

import pytest

from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.errors import UserError
from flallm_ds.recipes import RECIPES, resolve_both
from flallm_ds.recipes import resolve as resolve_with


def resolve(stage: str | None, recipe: str | None, **overrides: str) -> RunConfig:
    return resolve_with(stage, recipe, overrides)


@pytest.fixture
def config():
    return RunConfig(stage="visual", run="runs/x")


def test_overrides_are_parsed_by_the_types_of_fields(config):
    changed = config.with_overrides(
        {
            "run": "2024_01",
            "optim.lr": "3e-4",
            "optim.betas": "0.9,0.98",
            "train.max_steps": "7",
            "data.augment": "false",
            "data.batch_clips": "32",
            "light_t.size": "tiny",
        }
    )
    assert (
        changed.run == "2024_01"
        and changed.optim.lr == 3e-4
        and changed.optim.betas == (0.9, 0.98)
    )
    assert (
        changed.train.max_steps == 7
        and changed.data.augment is False
        and changed.data.batch_clips == 32
    )
    assert changed.light_t.size == "tiny"
    same = {n for n, v in config.options().items() if changed.options()[n] == v}
    assert len(config.options()) - len(same) == 7
    assert changed.with_overrides({"train.max_steps": "none"}).train.max_steps is None


def test_overrides_do_not_change_the_original(config):
    before = config.to_json()
    config.with_overrides({"optim.lr": "1", "run": "other"})
    assert config.to_json() == before


def test_fields_cannot_be_assigned(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run = "other"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("optim.l", "optim.lr"),
        ("lr", "optim.lr"),
        ("data.batch_clip", "data.batch_clips"),
    ],
)
def test_an_unknown_option_is_refused_with_similar_names(config, name, near):
    with pytest.raises(UserError) as caught:
        config.with_overrides({name: "1"})
    message = str(caught.value)
    assert f"there is no option --{name}; did you mean" in message and near in message


def test_a_section_is_not_an_option(config):
    with pytest.raises(UserError, match="there is no option --optim"):
        config.with_overrides({"optim": "1"})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("train.epochs", "many", "--train.epochs must be a whole number"),
        ("train.epochs", "0", "train.epochs must be at least 1"),
        ("data.keep_every", "0", "data.keep_every must be at least 1"),
        ("data.crop_size", "300", "data.crop_size must be at most data.frame_size (256)"),
        (
            "data.batch_clips",
            "1",
            "data.batch_clips must be at least data.micro_batches (2)",
        ),
        ("visual.temporal_kernel", "4", "visual.temporal_kernel must be odd"),
        ("visual.frozen_stages", "-1", "visual.frozen_stages must be at least 0, got -1"),
        ("optim.name", "adam", "--optim.name must be one of sgd, adamw"),
        ("optim.betas", "0.9", "optim.betas must be two numbers"),
        ("optim.warmup", "1", "optim.warmup must be in [0, 1)"),
        ("optim.lr", "-1", "optim.lr must be at least 0, got -1"),
        ("train.label_smoothing", "1.5", "train.label_smoothing must be in [0, 1)"),
        ("train.patience", "-1", "train.patience must be at least 0, got -1"),
        (
            "train.patience",
            "74",
            "train.patience must be at most 73 if the dev split is scored 75 times "
            "(train.epochs=75, eval.every_epochs=1), got 74. A higher value could",
        ),
        ("eval.num_beams", "0", "eval.num_beams must be at least 1"),
        ("eval.every_epochs", "0", "eval.every_epochs must be at least 1"),
        ("train.seed", "-1", "train.seed must be at least 0, got -1"),
        ("train.profile", "14-10", "train.profile must be two steps FIRST-LAST from 1"),
        ("train.profile", "0-3", "train.profile must be two steps FIRST-LAST from 1"),
        ("train.profile", "12", "train.profile must be two steps FIRST-LAST from 1"),
        ("train.trackers", "tensorbard", "must be one of wandb, mlflow, got"),
        ("train.trackers", "wandb,wandb", "must be wandb, mlflow or both, got wandb,wandb"),
        ("llm.dropout", "1.5", "llm.dropout must be in [0, 1)"),
        ("stage", "llm", "visual_run must be the run folder of stage visual"),
        ("stage", "both", "--stage must be one of visual, llm, joint"),
        (
            "visual.frozen",
            "none",
            "visual.frozen must be all in stage visual, got none.",
        ),
        ("visual.frozen", "half", "--visual.frozen must be one of all, backbone, none"),
        ("llm.input", "poses", "--llm.input must be one of signs, frames, light_t"),
        ("visual.temporal_kernel", "-1", "visual.temporal_kernel must be odd and above 0"),
        ("data.threads", "-1", "data.threads must be at least 0, got -1"),
        (
            "optim.betas",
            "0.9,1.5",
            "optim.betas must be two numbers in [0, 1), got 0.9,1.5",
        ),
        ("optim.weight_decay", "-1", "optim.weight_decay must be at least 0, got -1"),
        ("optim.momentum", "-1", "optim.momentum must be at least 0, got -1"),
        (
            "train.save_every_steps",
            "0",
            "train.save_every_steps must be none or at least 1",
        ),
        ("train.probe_every", "-1", "train.probe_every must be at least 0, got -1"),
    ],
)
def test_invalid_values_are_refused(config, name, value, sentence):
    with pytest.raises(UserError) as caught:
        config.with_overrides({name: value})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"stage": "joint", "visual_run": "elsewhere"},
            "visual_run must be empty in stage joint",
        ),
        (
            {"stage": "joint", "llm.input": "light_t"},
            "llm.input must be signs or frames if no stage 1",
        ),
        (
            {"stage": "llm", "visual_run": "none", "llm.input": "light_t"},
            "llm.input must be signs or frames if no stage 1",
        ),
    ],
)
def test_conflicting_options_are_refused(config, options, sentence):
    """All sections are replaced at once, so the order of the options does not matter."""
    with pytest.raises(UserError) as caught:
        config.with_overrides(options)
    assert sentence in str(caught.value)


def test_random_weights_cannot_be_frozen(config):
    with pytest.raises(
        UserError, match=r"visual\.frozen_stages must be 0 if visual\.weights is none"
    ):
        config.with_overrides({"visual.weights": "none", "visual.frozen_stages": "2"})


def test_a_saved_config_loads_unchanged(config, tmp_path):
    path = tmp_path / "config.json"
    changed = config.with_overrides(
        {"optim.betas": "0.8,0.9", "run": "läufe/天", "train.max_steps": "3"}
    )
    path.write_text(changed.to_json(), encoding="utf-8")
    assert RunConfig.load(path) == changed
    assert hash(RunConfig.load(path)) == hash(changed)


@pytest.mark.parametrize("section", [None, "optim"])
def test_a_saved_config_of_another_version_is_refused(config, tmp_path, section):
    saved = json.loads(config.to_json())
    (saved if section is None else saved[section])["momentums"] = 1
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(
        UserError, match=r"unknown field 'momentums'\. The file was written by another"
    ):
        RunConfig.load(tmp_path / "config.json")


def test_options_that_are_free_to_change_exist(config):
    assert set(FREE_TO_CHANGE) <= set(config.options())


# --- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_complete_config_that_loads_unchanged(name, tmp_path):
    config = resolve(None, name)
    assert name.endswith(f"_{config.stage}") and config.run == f"runs/{name}"
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert RunConfig.load(path) == config


def test_stage_llm_of_a_recipe_uses_the_visual_encoder_of_its_stage_visual():
    for llm in (resolve(None, n) for n in RECIPES if n.endswith("_llm")):
        if llm.visual_run == "none":
            continue
        visual = resolve(None, llm.visual_run.removeprefix("runs/"))
        assert dataclasses.replace(llm.visual, frozen="all") == visual.visual
        for field in ("shards", "keep_every", "max_frames", "frame_size", "crop_size"):
            assert getattr(llm.data, field) == getattr(visual.data, field)
        assert llm.llm.language[:2] == visual.llm.language[:2]


def test_each_ablation_changes_only_the_option_that_it_names():
    base = resolve(None, "phoenix14t_llm").options()
    changes = {}
    for name in (n for n in RECIPES if n.startswith("phoenix14t_") and n.endswith("_llm")):
        options = resolve(None, name).options()
        changes[name.removeprefix("phoenix14t_")] = {
            option: value
            for option, value in options.items()
            if value != base[option] and option != "run"
        }
    assert changes["unfrozen_llm"] == {"visual.frozen": "none"}
    assert changes["temporal_llm"] == {"visual.frozen": "backbone"}
    assert changes["light_t_llm"] == {"llm.input": "light_t"}
    assert changes["imagenet_llm"] == {"visual_run": "none", "llm.input": "frames"}
    assert changes["random_llm"] == {"llm.pretrained": False}
    assert changes["keep8_llm"] == {
        "data.keep_every": 8,
        "visual_run": "runs/phoenix14t_keep8_visual",
    }
    assert resolve(None, "phoenix14t_large_visual").light_t.size == "large"


# --- both stages


def test_options_apply_to_both_stages_or_to_one():
    given = {
        "optim.lr": "0.5",
        "stage1.train.epochs": "3",
        "stage2.train.epochs": "4",
        "run": "runs/mine",
    }
    visual, llm = resolve_both("phoenix14t", given)
    assert (visual.stage, visual.optim.lr, visual.train.epochs) == ("visual", 0.5, 3)
    assert (llm.stage, llm.optim.lr, llm.train.epochs) == ("llm", 0.5, 4)
    assert (visual.run, llm.run, llm.visual_run) == (
        "runs/mine_visual",
        "runs/mine_llm",
        "runs/mine_visual",
    )


def test_both_stages_of_a_recipe_equal_its_single_stages():
    assert resolve_both("csl_daily", {}) == (
        resolve("visual", "csl_daily"),
        resolve("llm", "csl_daily"),
    )


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        (None, {"stage1.optim.lrr": "1"}, "did you mean optim.lr"),
        (None, {"stage3.optim.lr": "1"}, "there is no option --stage3.optim.lr"),
        (
            None,
            {"visual_run": "elsewhere"},
            "--visual_run must not be given for one stage of --stage both",
        ),
        (
            None,
            {"stage2.run": "elsewhere"},
            "Give --run=RUN for the folders RUN_visual and RUN_llm",
        ),
        (
            "phoenix14t_visual",
            {},
            "--stage must be visual for the recipe phoenix14t_visual, got llm",
        ),
        ("phoenix14t_frames", {}, "must be one of flallm recipes, got 'phoenix14t_frames'"),
    ],
)
def test_options_that_would_separate_the_stages_are_refused(recipe, options, sentence):
    with pytest.raises(UserError) as caught:
        resolve_both(recipe, options)
    assert sentence in str(caught.value)


def test_the_recipes_of_the_paper_have_its_hyperparameters():
    visual, llm = resolve("visual", "phoenix14t"), resolve("llm", "phoenix14t")
    assert (visual.optim.name, visual.optim.momentum, visual.optim.lr) == ("sgd", 0.9, 1e-2)
    assert (visual.data.batch_clips, visual.train.epochs, visual.train.label_smoothing) == (
        8,
        75,
        0.2,
    )
    assert (llm.optim.name, llm.optim.lr, llm.optim.llm_lr, llm.data.batch_clips) == (
        "adamw",
        1e-3,
        1e-5,
        16,
    )
    for config in (visual, llm):
        assert (config.data.keep_every, config.data.frame_size, config.data.crop_size) == (
            4,
            256,
            224,
        )
        assert (
            config.eval.num_beams,
            config.eval.length_penalty,
            config.eval.max_new_tokens,
        ) == (
            5,
            1.0,
            100,
        )
        assert (
            config.visual.width,
            config.visual.temporal_kernel,
            config.light_t.size,
        ) == (64, 3, "base")


def test_a_recipe_is_found_by_name_or_by_corpus_and_stage():
    assert (
        resolve("llm", "phoenix14t")
        == resolve(None, "phoenix14t_llm")
        == resolve("llm", "phoenix14t_llm")
    )
    assert resolve("visual", None) == resolve(None, "quickstart_visual")


def test_overrides_change_a_recipe():
    assert resolve_with("visual", "phoenix14t", {"optim.lr": "5e-3"}).optim.lr == 5e-3


def test_an_unknown_option_is_reported_before_an_unknown_recipe():
    with pytest.raises(
        UserError, match=r"there is no option --optim\.l; did you mean optim\.lr"
    ):
        resolve_with("visual", "nowhere", {"optim.l": "1"})


@pytest.mark.parametrize(
    ("stage", "recipe", "sentence"),
    [
        (None, None, "--stage must be given"),
        ("bth", None, "--stage must be visual, llm, joint or both, got 'bth'"),
        (
            None,
            "phoenix_visual",
            "got 'phoenix_visual'; did you mean phoenix14t_visual",
        ),
        (
            None,
            "phoenix14t",
            "--stage must be given for the recipe phoenix14t, got nothing",
        ),
        (
            "llm",
            "phoenix14t_visual",
            "--stage must be visual for the recipe phoenix14t_visual, got llm",
        ),
    ],
)
def test_an_unknown_recipe_is_refused(stage, recipe, sentence):
    with pytest.raises(UserError) as caught:
        resolve(stage, recipe)
    assert sentence in str(caught.value)


def stored(config, path, **data):
    content = json.loads(config.to_json())
    content["data"] |= data
    path.write_text(json.dumps(content))
    return path


def test_an_older_config_that_does_not_allow_commands_is_read(config, tmp_path):
    assert (
        RunConfig.load(stored(config, tmp_path / "config.json", allow_pipe=False)) == config
    )


@pytest.mark.parametrize("value", [True, 1, "true", None, "rm -r /"])
def test_an_older_config_that_allows_commands_is_refused(config, tmp_path, value):
    path = stored(config, tmp_path / "config.json", allow_pipe=value)
    with pytest.raises(
        UserError,
        match=r"data\.allow_pipe in .*config\.json must be false.*\. Copy the shards",
    ):
        RunConfig.load(path)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '{"stage": "visual"}',
        "[" * 100_000,
        '{"stage": "visual", "run": "x", "data": {"threads": "a"}}',
    ],
)
def test_an_invalid_config_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json(:| must)"):
        RunConfig.load(tmp_path / "config.json")
