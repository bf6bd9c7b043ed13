"""Sends the numbers of a run to Weights & Biases and to MLflow, through their own clients.

A thread sends them, so that a step never waits for a server. A tracker that fails gets no
more numbers, and a warning says so; the run continues.
"""

import importlib.util
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from flallm_ds.errors import UserError
from flallm_ds.files import replace_file

PROJECT = "flallm_ds"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
FILE = "trackers.json"  # in the run folder: the id of the run at each tracker
# How long the end of a run waits for the last numbers. Less than KillWait of SLURM, 30 s:
# a job that is preempted must end in time to be requeued.
CLOSE_S = 15.0
_MLFLOW_PARAMETERS = 100  # that one request may have
_MLFLOW_LENGTH = 500  # of a value


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError if the client of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"Cannot use train.trackers={name}: the package {name} is not installed. "
                "Install flallm_ds with its extra [trackers]."
            )


class Tracker(Protocol):
    """A run at a tracker."""

    run_id: str

    def log(self, global_step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class WandbRun:
    """A run at Weights & Biases, or one that `wandb sync` can upload (WANDB_MODE=offline).

    run_id: of a run that is resumed, or None.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, Any], run_id: str | None
    ) -> None:
        import wandb

        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if not offline and not wandb.login(prompt=False, verify=False):
            raise ValueError("no API key; run wandb login, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=run_id,
            resume=None if offline else "allow",
            dir=str(folder),
            config=dict(options),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run_id: str = self._run.id

    def log(self, global_step: int, values: Mapping[str, float]) -> None:
        """Log values. After a resume, W&B ignores steps that it knows already."""
        self._run.log(dict(values), step=global_step)

    def close(self) -> None:
        self._run.finish()


class MlflowRun:
    """A run at the MLflow server, or in the folder, that MLFLOW_TRACKING_URI names.

    run_id: of a run that is resumed, or None.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, Any], run_id: str | None
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=folder.name)
        self.run_id = run.info.run_id
        parameters = []
        for option, value in options.items():
            parameters.append(Param(option, str(value)[:_MLFLOW_LENGTH]))
        for begin in range(0, len(parameters), _MLFLOW_PARAMETERS):
            some = parameters[begin : begin + _MLFLOW_PARAMETERS]
            self._client.log_batch(self.run_id, params=some)

    def log(self, global_step: int, values: Mapping[str, float]) -> None:
        milliseconds = int(1000 * time.time())
        metrics = []
        for name, value in values.items():
            metrics.append(self._metric(name, float(value), milliseconds, global_step))
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


KINDS: dict[str, type[WandbRun | MlflowRun]] = {"wandb": WandbRun, "mlflow": MlflowRun}


class Trackers:
    """Sends numbers to several trackers, on rank 0.

    names: of KINDS. options: of the run, for a new run at a tracker. Raises OSError if the
    ids cannot be stored in the run folder.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, options: Mapping[str, Any]
    ) -> None:
        path = folder / FILE
        ids = _read_ids(path)
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                tracker: Tracker = KINDS[name](folder, options, ids.get(name))
            except Exception as error:  # noqa: BLE001 - a tracker may raise anything
                _warn(name, error)
                continue
            self._trackers[name] = tracker
            ids[name] = tracker.run_id
        if self._trackers:
            replace_file(path, json.dumps(ids, indent=2) + "\n")
        self._queue: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="trackers", daemon=True)
        self._thread.start()

    def write(self, global_step: int, values: dict[str, float]) -> None:
        """Send values by name; returns at once."""
        self._queue.put((global_step, values))

    def close(self) -> None:
        """Send what is left and end the runs at the trackers, for CLOSE_S at most."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            names = ", ".join(self._trackers)
            print(
                f"warning: {names} may lack the last numbers; metrics.jsonl has them all.",
                flush=True,
            )

    # --- the thread

    def _send(self) -> None:
        while (item := self._queue.get()) is not None:
            for name in list(self._trackers):
                self._try(name, *item)
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - a tracker may raise anything
                _warn(name, error)

    def _try(self, name: str, global_step: int, values: dict[str, float]) -> None:
        try:
            self._trackers[name].log(global_step, values)
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything
            del self._trackers[name]
            _warn(name, error)


def _read_ids(path: Path) -> dict[str, str]:
    """Return {tracker: id of its run}, empty at the first start. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(
            f"Cannot read {path}: {error}. Remove it, to start new runs at the trackers."
        ) from error


def _warn(name: str, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(
        f"warning: no more numbers are sent to {name}: {lines[0].rstrip('.')}. The run "
        "continues.",
        flush=True,
    )
