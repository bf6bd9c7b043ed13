"""`flallm plan` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from flallm_ds.cli.plan import plan
from flallm_ds.errors import UserError
from tests.helpers.early import flallm
from tests.planning.test_sizes import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds nothing but a config.json."""
    tiny("llama").save_pretrained(tmp_path / "llm")
    assert [path.name for path in (tmp_path / "llm").iterdir()] == ["config.json"]
    return tmp_path / "llm"


def test_a_folder_with_a_config_is_enough(folder: Path, capsys: Any) -> None:
    plan(llm=str(folder), nodes=1, gpus=2, gpu_gb=24, host_gb=64)
    text = capsys.readouterr().out
    assert "decoder-only, vocabulary 100" in text and "1 x 2 GPUs of 24 GB" in text
    assert text.count("<- recommended") == 1
    assert "recommended: --train.deepspeed=ds_configs/zero" in text
    # NVMe is not assumed to exist.
    assert "too little NVMe memory" in text
    # The first line is the name of the LLM.
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_the_plan_as_json_has_the_parts_of_each_sum(folder: Path, capsys: Any) -> None:
    plan(llm=str(folder), gpus=2, gpu_gb=24, host_gb=64, json=True, tune="lora")
    found = json.loads(capsys.readouterr().out)
    rows = {row["file"]: row for row in found["files"]}
    assert len(rows) == 9 and found["recommended"] in rows
    assert found["size"]["frozen"] > 0
    row = rows["zero3_offload.json"]
    parts = row["parts_of_a_rank"]
    assert row["gpu_bytes"] == pytest.approx(sum(parts["device"].values()))
    assert row["host_bytes"] == pytest.approx(2 * sum(parts["host"].values()))
    assert found["checkpoint_bytes"] == 12 * found["size"]["trained"]


def test_an_llm_that_does_not_fit_names_what_would(capsys: Any) -> None:
    with pytest.raises(UserError, match=r"--llm must fit on .*, got 7B, which does not"):
        plan(llm="7B", nodes=1, gpus=1, gpu_gb=24, host_gb=64)
    text = capsys.readouterr().out
    assert "Nothing fits. What would fit:" in text
    assert "--llm.tune=lora --llm.bits=4" in text and "--host_gb=" in text


def test_an_llm_that_fits_nowhere_says_so(capsys: Any) -> None:
    with pytest.raises(UserError, match="got 70B, which does not"):
        plan(llm="70B", nodes=1, gpus=1, gpu_gb=0.5, host_gb=1)
    assert "Nothing fits, with none of LoRA" in capsys.readouterr().out


def test_a_json_of_the_user_is_a_row(folder: Path, tmp_path: Path, capsys: Any) -> None:
    own = tmp_path / "mine.json"
    own.write_text(
        json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    )
    plan(llm=str(folder), gpus=2, **{"train.deepspeed": str(own)})
    assert "\nmine.json" in capsys.readouterr().out


def test_a_json_that_a_run_refuses_is_not_planned(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3, "zenflow": {}}}))
    with pytest.raises(UserError, match=r"zenflow must be null in .*mine\.json"):
        plan(llm=str(folder), gpus=2, **{"train.deepspeed": str(own)})


def test_states_in_bf16_need_a_higher_learning_rate(folder: Path, capsys: Any) -> None:
    plan(llm=str(folder), gpus=2)
    assert "needs llm_lr >= 0.0001" in capsys.readouterr().out
    plan(llm=str(folder), gpus=2, **{"optim.llm_lr": "2e-4"})
    assert "needs llm_lr" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--llm=7B", "--gpus=0"], "error: --gpus must be at least 1, got 0."),
        (["--llm=7B", "--gpu_gb=0"], "error: --gpu_gb must be above 0, got 0."),
        (["--llm=7B", "--tune=half"], "error: --tune must be one of full, lora,"),
        (["--llm=7B", "--recipe=x"], "error: --recipe must be one of flallm recipes"),
        (["--llm=7B", "--visual.frozen=none"], "error: visual.frozen must be all for"),
        ([], "error: --llm must be given, got nothing."),
    ],
)
def test_a_wrong_option_is_one_sentence_before_slow_imports(
    options: list[str], sentence: str
) -> None:
    done = flallm("plan", *options)
    assert done.returncode == 2 and done.stderr.startswith(sentence)


def test_an_llm_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"must be a hub id or a folder with an LLM, got .*nowhere"
    ):
        plan(llm=str(tmp_path / "nowhere"))
