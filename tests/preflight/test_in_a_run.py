"""A run compares the machines before it opens its data."""

from pathlib import Path

import pytest

from flallm_ds.config import RunConfig
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.preflight import facts
from flallm_ds.training.stages import train_stages
from flallm_ds.training.stop import StopRequest


def test_a_warning_is_printed_before_shards_that_do_not_exist_end_the_run(
    tmp_path: Path,
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(facts, "free_bytes", lambda path: 10**9)
    config = RunConfig("visual", str(tmp_path / "run")).with_overrides(
        {
            "data.shards": str(tmp_path / "none"),
            "llm.name": str(tiny_corpus / "llm"),
            "visual.weights": "none",
            "visual.frozen_stages": "0",
        }
    )
    with pytest.raises(UserError, match=r"must contain index\.json"):
        train_stages((config,), World(0, 1, 0, 1), StopRequest())
    assert capsys.readouterr().out.count("has 1.0 GB free for the run folder") == 1
    assert not (tmp_path / "run").exists()
