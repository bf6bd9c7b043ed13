"""`flallm doctor` on one rank, and its checks of a DeepSpeed JSON."""

import json
from pathlib import Path

import pytest

from flallm_ds.cli.doctor import doctor
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.preflight.facts import Device
from flallm_ds.preflight.results import FAILURE, OK, WARNING
from flallm_ds.preflight.settings import settings
from tests.helpers.paths import ROOT

CPU = Device("CPU")


def rows(output: str) -> dict[str, str]:
    """The state of each check of a table."""
    states = {}
    for line in output.splitlines():
        name, state = line[2:26].strip(), line[28:35].strip()
        if name:
            states[name] = state
    return states


def test_a_failed_check_is_an_error_after_the_whole_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder names the shards and the JSON."""
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stag": 2}}')
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig("visual", str(run)).with_overrides(
        {"train.deepspeed": str(path), "data.shards": str(tmp_path / "none")}
    )
    (run / "config.json").write_text(config.to_json())
    with pytest.raises(UserError, match=r"2 checks failed \(shards, DeepSpeed JSON\)"):
        doctor(run=run)
    found = rows(capsys.readouterr().out)
    assert found["shards"] == found["DeepSpeed JSON"] == FAILURE
    assert found["versions"] == found["run folder"] == OK
    assert [p.name for p in run.iterdir()] == ["config.json"]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=str)
def test_the_shipped_jsons_are_safe(path: Path) -> None:
    (result,) = settings(str(path), Device("NVIDIA H100", 80, "9.0"))
    assert result.state == OK


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "sub_group_size above 100000000",
        ),
        ({"communication_data_type": "fp16"}, "sums gradients in fp16"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_an_unsafe_setting_is_a_warning(tmp_path: Path, config: dict, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    (result,) = settings(str(path), CPU)
    assert result.state == WARNING and said in result.found and result.remedy


def test_bf16_on_an_older_gpu_is_a_failure() -> None:
    (result,) = settings("ds_configs/zero3.json", Device("Tesla V100", 32, "7.0"))
    assert result.state == FAILURE and "Tesla V100 (32 GB, compute" in result.found
