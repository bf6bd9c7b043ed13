import json
import re
import resource
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flallm_ds.batch import Hypothesis
from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve
from flallm_ds.training.provenance import record_start
from flallm_ds.training.run_folder import (
    Metrics,
    locked_run,
    open_run_folder,
    run_folder,
    shown,
)
from flallm_ds.training.run_log import run_log

ALONE = World(0, 1, 0, 1)


@pytest.fixture
def config(tmp_path):
    return RunConfig(stage="visual", run=str(tmp_path / "runs" / "one"))


def test_a_new_run_writes_its_config_and_versions(config):
    with run_folder(config, ALONE) as folder:
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "versions.json"]
    assert RunConfig.load(folder / "config.json") == config


def test_each_start_is_recorded(config):
    """A resumed run may be on another machine, with other versions."""
    for _ in range(3):
        with run_folder(config, ALONE) as folder:
            pass
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"].startswith("2.") and versions["python"].startswith("3.")
    assert versions["deepspeed"] and versions["command"] == sys.argv
    assert {"commit", "dirty", "cuda", "cudnn", "nccl", "driver"} <= versions.keys()
    assert versions["devices"] == {"cpu": 1}
    starts = versions.pop("starts")
    assert (
        len(starts) == 3 and starts[0] == versions and starts[2].keys() == versions.keys()
    )


def test_a_record_of_an_older_version_becomes_the_first_start(config):
    folder = open_run_folder(config)
    (folder / "versions.json").write_text('{"torch": "2.10"}')
    record_start(folder, ALONE)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == "2.10"
    assert (
        versions["starts"][0] == {"torch": "2.10"}
        and versions["starts"][1]["torch"] != "2.10"
    )


def test_an_empty_folder_may_become_a_run(config, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert open_run_folder(config) == tmp_path / "runs" / "one"


def test_a_folder_that_waits_for_its_job_may_become_a_run(config, tmp_path):
    """`flallm submit` has put the code and the scripts there."""
    path = tmp_path / "runs" / "one"
    for name in ("code", "slurm", ".partial-code", ".old-code"):
        (path / name).mkdir(parents=True)
    with run_folder(config, ALONE) as folder:
        assert (folder / "config.json").is_file() and (folder / "code").is_dir()


@pytest.mark.parametrize("before", ["nothing", "a folder", "a link"])
def test_a_failed_build_leaves_the_folder_as_it_was(config, tmp_path, before):
    path = tmp_path / "runs" / "one"
    if before == "a folder":
        path.mkdir(parents=True)
    elif before == "a link":
        path.parent.mkdir()
        (tmp_path / "scratch").mkdir()
        path.symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="no such LLM"), run_folder(config, ALONE) as folder:
        (folder / "tokenizer").mkdir()
        raise UserError("no such LLM")
    assert path.exists() == (before != "nothing") and path.is_symlink() == (
        before == "a link"
    )
    assert not path.exists() or list(path.iterdir()) == []


def test_a_failed_build_removes_its_own_files_only(config, tmp_path):
    path = tmp_path / "runs" / "one"
    with (
        pytest.raises(UserError, match="no such LLM"),
        locked_run(config, ALONE),
        run_log(path, ALONE),
        run_folder(config, ALONE) as folder,
    ):
        (folder / "tokenizer").mkdir()
        (folder / ".partial-llm_trimmed").mkdir()
        (folder / "notes.txt").touch()  # of a user
        raise UserError("no such LLM")
    assert [p.name for p in path.iterdir()] == ["notes.txt"]


def test_a_folder_of_a_start_that_was_killed_may_become_a_run(config, tmp_path):
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    for name in (".lock", "log.txt", ".partial-config.json"):
        (path / name).touch()
    with locked_run(config, ALONE):
        assert open_run_folder(config) == path


def test_the_same_run_opens_again(config):
    assert open_run_folder(config) == open_run_folder(config)


def test_a_folder_with_other_content_is_refused_and_not_changed(config, tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"with other content\. Use another --run=FOLDER"):
        open_run_folder(config)
    assert [p.name for p in folder.iterdir()] == ["holiday.jpg"]


def test_a_file_instead_of_a_folder_is_refused(config, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").touch()
    with pytest.raises(UserError, match="with other content"):
        open_run_folder(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.lr", "0.5"),
        ("data.batch_clips", "16"),
        ("stage", "llm"),
        ("optim.betas", "0.9,0.99"),
    ],
)
def test_a_changed_option_is_named_with_both_values(config, name, value):
    open_run_folder(config)
    overrides = {name: value}
    if name == "stage":
        overrides["visual_run"] = "elsewhere"
    changed = config.with_overrides(overrides)
    with pytest.raises(UserError) as caught:
        open_run_folder(changed)
    before, now = config.options()[name], changed.options()[name]
    what = "stage" if name == "stage" else "configuration"
    assert f"belongs to another {what}" in str(caught.value)
    assert f"({name} {before!r}, got {now!r})" in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "given", "said"),
    [
        (
            "phoenix14t_llm",
            "phoenix14t_visual",
            "another stage (stage 'llm', got 'visual'). Use --stage=llm, or another --run",
        ),
        (
            "phoenix14t_llm",
            "mine_llm",
            "another configuration (recipe phoenix14t_llm, got mine_llm: data.target_fps ",
        ),
        ("phoenix14t_llm", "mine_llm", "; and 3 more). Use the same values, or another"),
    ],
)
def test_the_run_of_another_stage_or_recipe_is_named_as_such(tmp_path, saved, given, said):
    run = {"run": str(tmp_path / "run")}
    open_run_folder(resolve(None, saved, run))
    with pytest.raises(UserError) as caught:
        open_run_folder(resolve(None, given, run))
    assert said in str(caught.value)


def test_options_that_do_not_change_numbers_may_change(config):
    folder = open_run_folder(config)
    free = dict.fromkeys(FREE_TO_CHANGE, "3")
    free |= {"run": str(folder), "visual_run": "elsewhere"}
    free |= {"data.check_shards": "true", "data.max_broken": "0.3"}
    free |= {"data.same_clips": "allow"}
    free |= {"eval.gather": "never", "train.trackers": "wandb", "train.profile": "1-2"}
    assert open_run_folder(config.with_overrides(free)) == folder
    assert RunConfig.load(folder / "config.json") == config


def test_a_config_that_was_cut_off_is_an_error_that_names_it(config):
    folder = open_run_folder(config)
    (folder / "config.json").write_text('{"stage": "vis')
    with pytest.raises(UserError, match=r"config\.json: it is not JSON"):
        open_run_folder(config)


# --- metrics


def lines(folder, name: str = "metrics.jsonl") -> list[dict]:
    """Return the records of a file of JSON lines."""
    return list(map(json.loads, (folder / name).read_text().splitlines()))


def test_metrics_are_one_line_per_record(tmp_path):
    metrics = Metrics(tmp_path, 0, 0)
    metrics.write("train", 1, {"loss": 2.5, "epoch": 0})
    assert lines(tmp_path) == [
        {"kind": "train", "global_step": 1, "loss": 2.5, "epoch": 0}
    ]  # before it is closed
    metrics.write("dev", 1, {"bleu4": 0.5})
    metrics.close()
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "dev"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_drops_records_after_its_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, 0, 0)
    for step in range(1, 8):
        metrics.write("train", step, {"loss": float(step)})
    metrics.close()
    metrics = Metrics(tmp_path, 5, 0)
    metrics.write("train", 6, {"loss": 60.0})
    metrics.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 60]


@pytest.mark.parametrize(
    "cut", ['{"kind": "train", "global', '{"kind": "train", "global_step": 1}']
)
def test_a_line_that_a_kill_has_cut_off_is_dropped(tmp_path, cut):
    """Also one that lacks only its newline: the next record would be in the same line."""
    metrics = Metrics(tmp_path, 0, 0)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    metrics = Metrics(tmp_path, 1, 0)
    metrics.write("train", 2, {"loss": 2.0})
    metrics.close()
    assert [line["global_step"] for line in lines(tmp_path)] == [1, 2]


def test_a_resumed_run_drops_scores_that_its_checkpoint_does_not_include(tmp_path):
    """The checkpoint was saved before the scoring of the same step, which is done again."""
    metrics = Metrics(tmp_path, 0, 0)
    for epoch in (1, 2):
        metrics.write("train", 5 * epoch, {"epoch": epoch - 1, "loss": 1.0})
        metrics.write("dev", 5 * epoch, {"epoch": epoch, "bleu4": 0.5})
        metrics.write_hypotheses("dev", epoch, 5 * epoch, said("a"))
    metrics.close()
    Metrics(tmp_path, 10, 1).close()
    assert [line["kind"] for line in lines(tmp_path)] == ["train", "dev", "train"]
    kept = lines(tmp_path, "hypotheses.jsonl")
    assert [line["epoch"] for line in kept] == [1]


def said(*keys: str) -> list[Hypothesis]:
    return [
        Hypothesis(key=key, hypothesis=f"h|{key}", reference="<b>\x1b[2J") for key in keys
    ]


def test_the_same_five_clips_are_recorded_in_any_order():
    keys = [f"{number:03}" for number in range(23)]
    chosen = [one.key for one in shown(said(*keys))]
    assert len(set(chosen)) == 5
    assert [one.key for one in shown(said(*reversed(keys)))] == chosen
    assert [one.key for one in shown(said("b", "a"))] == ["a", "b"] and shown([]) == []


def test_hypotheses_are_written_to_their_file_and_to_tensorboard(tmp_path):
    metrics = Metrics(tmp_path, 0, 0)
    metrics.write_hypotheses("dev", 1, 5, said("a", "b"))
    metrics.close()
    metrics.check()
    kept = lines(tmp_path, "hypotheses.jsonl")
    assert [line["key"] for line in kept] == ["a", "b"]
    assert kept[0]["reference"] == "<b>\x1b[2J" and kept[0]["global_step"] == 5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("dev/hypotheses/text_summary")
    (table,) = text.tensor_proto.string_val
    assert b"h&#124;a" in table and b"&lt;b&gt;\\x1b[2J" in table


@pytest.mark.parametrize("name", ["metrics.jsonl", "hypotheses.jsonl", "tensorboard"])
def test_an_error_of_a_write_is_raised_by_check(tmp_path, name, capfd):
    metrics = Metrics(tmp_path, 0, 0)
    if name == "tensorboard":
        (tmp_path / name).rename(tmp_path / "gone")
        limit_bytes(0)
    else:
        metrics.close()
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/full")
        metrics = Metrics(tmp_path, 0, 0)
    try:
        metrics.write("dev", 1, {"epoch": 1, "bleu4": 0.5})
        metrics.write_hypotheses("dev", 1, 1, said("a"))
        metrics.flush()
        metrics.close()
    finally:
        limit_bytes(resource.RLIM_INFINITY)
    with pytest.raises(
        UserError, match=r"Cannot read or write .*Free some space.* are incomplete"
    ):
        metrics.check()
    assert capfd.readouterr().err == ""


def limit_bytes(size: int) -> None:
    """Limit the size of each file of this process, as a quota does."""
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


# --- the log


def test_the_log_has_each_line_with_its_time_and_the_terminal_is_unchanged(
    tmp_path, capsys
):
    for number in range(2):
        with run_log(tmp_path, ALONE):
            print("one", number, end="")
            print(" of two\nthree")
            print("bar 1\rbar 2", file=sys.stderr)
    with pytest.raises(UserError), run_log(tmp_path, ALONE):
        raise UserError("no such thing")
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)
    texts = [line[20:] for line in log if not line[20:].startswith("== ")]
    first = ["one 0 of two", "three", "bar 2"]
    second = ["one 1 of two", "three", "bar 2"]
    assert texts == [*first, *second, "error: no such thing"]
    out, err = capsys.readouterr()
    assert (
        out == "one 0 of two\nthree\none 1 of two\nthree\n" and err == "bar 1\rbar 2\n" * 2
    )


def test_a_log_that_cannot_be_written_is_an_error_at_the_end(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"Cannot.* No space left.*log\.txt is incomplete"),
        run_log(tmp_path, ALONE),
    ):
        print("one")


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with (
        pytest.raises(UserError, match=r"Cannot read or write .*log\.txt: Is a directory"),
        run_log(tmp_path, ALONE),
    ):
        pass
