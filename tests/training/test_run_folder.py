import json

import pytest

from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.training.run_folder import Metrics, open_run_folder, run_folder


@pytest.fixture
def config(tmp_path):
    return RunConfig(stage="visual", run=str(tmp_path / "runs" / "one"))


def test_a_new_run_records_what_it_is(config):
    folder = open_run_folder(config)
    assert RunConfig.load(folder / "config.json") == config
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"].startswith("2.") and versions["python"].startswith("3.")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "versions.json"]


def test_an_empty_folder_may_become_a_run(config, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert open_run_folder(config) == tmp_path / "runs" / "one"


@pytest.mark.parametrize("before", ["nothing", "a folder", "a link"])
def test_a_run_that_cannot_be_built_leaves_what_was_there(config, tmp_path, before):
    path = tmp_path / "runs" / "one"
    if before == "a folder":
        path.mkdir(parents=True)
    elif before == "a link":
        path.parent.mkdir()
        (tmp_path / "scratch").mkdir()
        path.symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="no such LLM"), run_folder(config, World(0, 1, 0, 1)) as folder:
        (folder / "tokenizer").mkdir()
        raise UserError("no such LLM")
    assert path.exists() == (before != "nothing") and path.is_symlink() == (before == "a link")
    assert not path.exists() or list(path.iterdir()) == []


def test_the_same_run_opens_again(config):
    assert open_run_folder(config) == open_run_folder(config)


def test_a_folder_of_something_else_is_refused_and_left_alone(config, tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"holds something else.*--run=FOLDER"):
        open_run_folder(config)
    assert [p.name for p in folder.iterdir()] == ["holiday.jpg"]


def test_a_file_in_the_place_of_the_folder_is_refused(config, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").touch()
    with pytest.raises(UserError, match="holds something else"):
        open_run_folder(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optim.lr", "0.5"), ("data.batch_clips", "16"), ("stage", "llm"), ("optim.betas", "0.9,0.99")],
)
def test_a_changed_option_is_named_with_both_values(config, name, value):
    open_run_folder(config)
    overrides = {name: value, **({"visual_run": "elsewhere"} if name == "stage" else {})}
    changed = config.with_overrides(overrides)
    with pytest.raises(UserError) as caught:
        open_run_folder(changed)
    before, now = config.options()[name], changed.options()[name]
    assert f"{name} must be {before!r} as when the run" in str(caught.value)
    assert f"but is {now!r}" in str(caught.value)


def test_options_that_change_no_number_may_change(config):
    folder = open_run_folder(config)
    values = {"run": str(folder), "visual_run": "elsewhere"}
    values |= {"data.check_shards": "true", "data.max_broken": "0.3"}
    values |= {"eval.gather": "never"}
    free = {name: values.get(name, "3") for name in FREE_TO_CHANGE}
    assert open_run_folder(config.with_overrides(free)) == folder
    assert RunConfig.load(folder / "config.json") == config


def test_a_config_that_was_cut_off_is_an_error_that_names_it(config):
    folder = open_run_folder(config)
    (folder / "config.json").write_text('{"stage": "vis')
    with pytest.raises(UserError, match=r"config\.json must be JSON"):
        open_run_folder(config)


# --- metrics


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_line_a_step(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write("train", 1, {"loss": 2.5, "epoch": 0})
    assert lines(tmp_path) == [
        {"kind": "train", "global_step": 1, "loss": 2.5, "epoch": 0}
    ]  # before it is closed
    metrics.write("dev", 1, {"bleu4": 0.5})
    metrics.close()
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "dev"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 8):
        metrics.write("train", step, {"loss": float(step)})
    metrics.close()
    metrics = Metrics(tmp_path, 5)
    metrics.write("train", 6, {"loss": 60.0})
    metrics.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 60]


@pytest.mark.parametrize("cut", ['{"kind": "train", "global', '{"kind": "train", "global_step": 1}'])
def test_a_line_cut_off_by_a_kill_is_forgotten(tmp_path, cut):
    """Also one that lacks its line end alone: the next line would be glued to it."""
    metrics = Metrics(tmp_path, 0)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    metrics = Metrics(tmp_path, 1)
    metrics.write("train", 2, {"loss": 2.0})
    metrics.close()
    assert [line["global_step"] for line in lines(tmp_path)] == [1, 2]
