"""Training on a GPU: each DeepSpeed JSON, fp16, decoding on the device, resuming."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launching import losses, run_scenarios, tiny_options
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.gpu

# Offload to NVMe needs libaio, which few machines have.
JSONS = tuple(
    path.stem
    for path in sorted((ROOT / "ds_configs").glob("*.json"))
    if path.stem != "zero3_nvme"
)
FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 8},
    "zero_optimization": {"stage": 2},
}
STEPS = 4


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of one rank, all trained by one process."""
    folder = tmp_path_factory.mktemp("gpu")
    fp16 = folder / "fp16.json"
    fp16.write_text(json.dumps(FP16))
    scenarios: list[dict[str, object]] = []

    def add(stage: str, name: str, **options: object) -> None:
        given = tiny_options(tiny_corpus, stage, folder / name, **options)
        scenarios.append({"stage": stage, "options": given})

    stops: dict[str, Any] = {"train.max_steps": STEPS}
    add("visual", "visual")
    add("visual", "half", **stops)
    add("visual", "half")
    add("visual", "nvjpeg", **stops, **{"data.decoder": "nvjpeg"})
    for name in (*JSONS, "fp16"):
        path = fp16 if name == "fp16" else ROOT / "ds_configs" / f"{name}.json"
        add("llm", name, **{"train.deepspeed": path})
    add("llm", "logits", **stops, **{"llm.loss": "logits", "llm.dropout": 0})
    add("llm", "chunks", **stops, **{"llm.loss": "chunks", "llm.dropout": 0})
    run_scenarios(scenarios, folder / "scenarios.json", ranks=1)
    return folder


@pytest.mark.parametrize("name", ["visual", *JSONS, "fp16"])
def test_a_run_learns_and_is_scored(runs: Path, name: str) -> None:
    found = losses(runs / name)
    assert len(found) == 10 and all(map(math.isfinite, found))
    assert sum(found[-3:]) < sum(found[:3])
    metrics = (runs / name / "metrics.jsonl").read_text(encoding="utf-8")
    assert metrics.count('"kind": "dev"') == 1 and (runs / name / "best").is_dir()


def test_a_run_is_resumed_with_the_same_losses(runs: Path) -> None:
    whole, half = losses(runs / "visual"), losses(runs / "half")
    assert half[: STEPS + 1] == whole[: STEPS + 1]
    assert half == pytest.approx(whole, rel=1e-3)


def test_frames_decoded_on_the_device_train_alike(runs: Path) -> None:
    pytest.importorskip("torchvision")
    found = losses(runs / "nvjpeg")
    assert found == pytest.approx(losses(runs / "visual")[:STEPS], rel=1e-2)


def test_the_loss_in_chunks_trains_as_that_of_all_logits(runs: Path) -> None:
    assert losses(runs / "chunks") == pytest.approx(losses(runs / "logits"), rel=1e-2)
