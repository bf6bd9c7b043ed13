"""Trackers that fail or are missing. Real runs that are tracked are in test_meter.py."""

import json
import sys
import threading
from pathlib import Path

import pytest

from flallm_ds.cli.checks import check_runs
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.training import trackers
from flallm_ds.training.trackers import Trackers


def test_a_client_that_is_not_installed_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = RunConfig(stage="visual", run=str(tmp_path / "run"))
    config = config.with_overrides({"train.trackers": "mlflow,wandb"})
    assert config.train.trackers == ("mlflow", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"Cannot use train\.trackers=wandb: the package"):
        check_runs([config])


def test_a_tracker_that_cannot_be_opened_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    """W&B without an API key, MLflow with an address that is none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://host")
    sent = Trackers(["wandb", "mlflow"], tmp_path, {})
    sent.write(1, {"train/loss": 2.0})
    sent.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: no more numbers are sent to wandb: no API key;")
    assert second.startswith("warning: no more numbers are sent to mlflow: ")
    assert not (tmp_path / trackers.FILE).exists()


class Failing:
    """A tracker whose second request fails."""

    def __init__(self, folder, options, run_id) -> None:
        self.run_id, self.seen = run_id or "new", []

    def log(self, global_step, values) -> None:
        if self.seen:
            raise ConnectionError("the server is gone.\nmore")
        self.seen.append(global_step)

    def close(self) -> None:
        raise AssertionError("a tracker that failed is not closed")


def test_a_tracker_that_fails_later_gets_no_more_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setitem(trackers.KINDS, "mlflow", Failing)
    sent = Trackers(["mlflow"], tmp_path, {})
    for step in range(5):
        sent.write(step, {"train/loss": 2.0})
    sent.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "warning: no more numbers are sent to mlflow: the server is gone. The run continues."
    )
    assert json.loads((tmp_path / trackers.FILE).read_text()) == {"mlflow": "new"}


def test_a_tracker_that_hangs_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    released = threading.Event()

    class Hanging(Failing):
        def log(self, global_step, values) -> None:
            released.wait()

        def close(self) -> None:
            pass

    monkeypatch.setitem(trackers.KINDS, "mlflow", Hanging)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    sent = Trackers(["mlflow"], tmp_path, {})
    sent.write(1, {"train/loss": 2.0})
    sent.close()
    assert "mlflow may lack the last numbers" in capsys.readouterr().out
    released.set()


def test_ids_that_cannot_be_read_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / trackers.FILE).write_text("[1")
    with pytest.raises(UserError, match=r"Cannot read .*trackers\.json: .* Remove it"):
        Trackers(["mlflow"], tmp_path, {})
