"""Tests that the benchmarks of plans run at a tiny size."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plan_memory, scale
from flallm_ds.planning.plan import Cluster
from tests.test_benchmarks import tables


def test_scale_reports_efficiency_shares_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "RANKS", (8, 16, 256))
    monkeypatch.setattr(scale, "MODELS", {"mBART": ("0.6B", "zero3.json", "full")})
    monkeypatch.setattr(scale, "LLMS", {"mBART": "0.6B"})
    monkeypatch.setattr(scale, "CLUSTERS", {"one": Cluster(1, 8, 80.0, 512.0)})
    page = scale.run(out=tmp_path, clips=2, networks=(25.0,))
    efficiency, shares, full, lora = tables(page)
    assert efficiency[0][3:] == ["8", "16", "256"]
    for row in efficiency[1:]:
        # More GPUs are never better for one of them.
        assert row[3] == "100" and 100 > float(row[4]) > float(row[5]) > 0
    for row in shares[1:]:
        assert sum(map(float, row[4:])) == pytest.approx(100, abs=2)
    assert full[1][0] == lora[1][0] == "mBART" and full[1][1].startswith("`zero")
    assert list(tmp_path.glob("scale_simulated_*.png"))


def test_the_simulation_uses_the_plan_of_the_data() -> None:
    lengths = scale.Lengths("short", 30.0, 0.5, 4, 100)
    work = scale.frames_of_ranks(lengths, 8, 4)
    assert work.shape[1:] == (8, 3)
    frames, longest, clips = np.moveaxis(work, 2, 0)
    assert clips.sum() == 20_000 and set(clips.ravel()) <= {3, 4}
    assert (longest * clips >= frames).all()
    # The plan deals nearly equal frames to the ranks.
    assert (frames.max(1) - frames.min(1)).mean() < 0.1 * frames.mean()


def test_a_ring_takes_hops_and_bytes() -> None:
    rates = scale.rates_of(25.0)
    assert scale.ring_s(0.0, 8, rates) == pytest.approx(7 * scale.HOP_S[0])
    # 8 GB over 16 ranks of two nodes at 25 GB/s.
    assert scale.ring_s(8e9, 16, rates) == pytest.approx(
        15 * scale.HOP_S[1] + 8 * 15 / 16 / 25
    )


def test_kept_measurements_are_compared_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, settings, _ = plan_memory.SHAPES["Qwen2"]
    small = {**settings, "hidden_size": 80, "num_hidden_layers": 1}
    monkeypatch.setattr(plan_memory, "SHAPES", {"Qwen2": (kind, small, "lora")})
    rank = {"baseline": 10**9, "peak": 2 * 10**9, "step_s": [3.0, 2.0, 1.0]}
    (tmp_path / "Qwen2.json").write_text(json.dumps({"ranks": [rank, rank]}))
    page = plan_memory.run(keep=tmp_path)
    compared, parts = tables(page)
    assert tuple(compared[0]) == plan_memory.COLUMNS
    cells = dict(zip(plan_memory.COLUMNS, compared[1], strict=True))
    assert compared[1][4] == "4.00" and compared[1][7] == "2.00"
    assert cells["last step, s"] == "1.0"
    # The parts of a rank add up to the plan, but for rounding.
    total = 2 * sum(map(float, parts[1][1:]))
    assert total == pytest.approx(float(cells["plan, GB"]), abs=0.15)
