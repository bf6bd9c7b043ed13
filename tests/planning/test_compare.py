"""`flallm plan --measure` trains real steps under the real launcher."""

import json
from pathlib import Path
from typing import Any

import pytest

from flallm_ds.cli.plan import plan
from tests.planning.test_sizes import tiny


def test_three_real_steps_are_measured_next_to_their_plan(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny("llama").save_pretrained(tmp_path / "llm")
    plan(
        llm=str(tmp_path / "llm"),
        tune="lora",
        longest=6,
        tokens=4,
        measure=True,
        json=True,
        **{"data.batch_clips": "4", "data.micro_batches": "2", "llm.checkpointing": "true"},
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["file"], found["clips"], len(found["ranks"])) == (
        "zero3_offload.json",
        2,
        2,
    )
    for rank in found["ranks"]:
        assert len(rank["step_s"]) == 3 and rank["peak"] > rank["baseline"] > 0
    # A rank pads its part of each parameter, at most by one element here.
    written = sum(rank["checkpoint"] for rank in found["ranks"])
    assert written == pytest.approx(12 * found["size"]["trained"], rel=0.02)
    # The processes are all that counts here; another version of a library may be larger.
    assert found["host"]["plan"] == pytest.approx(found["host"]["measured"], rel=0.4)
