"""Check whether a folder may be that of a run; needs no torch, so that a wrong name is
refused at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.export_folder import SETTINGS_FILE
from flallm_ds.files import partial_of, replace_file
from flallm_ds.same_run import check_same_run

CONFIG = "config.json"
LOCK = ".lock"
LOG = "log.txt"
PROBE = ".preflight-"  # begins the name of a file that the preflight writes for a moment
# Of `flallm submit`: the copy of the code that a job runs, its scripts and outputs.
CODE, JOBS = "code", "slurm"


def open_run_folder(config: RunConfig) -> Path:
    """Create the folder of a new run, or check that an existing one belongs to this run.

    Raises UserError if the folder has other content, or if an option differs that changes
    numbers.
    """
    check_run_folder(config)
    folder = Path(config.run)
    path = folder / CONFIG
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, config.to_json())
    return folder


def check_run_folder(config: RunConfig) -> None:
    """Raise UserError unless a run with these options may start in its folder, or resume."""
    folder = Path(config.run)
    path = folder / CONFIG
    if path.is_file():
        check_same_run(config, RunConfig.load(path), folder)
    else:
        check_free(folder)


def check_free(folder: Path) -> None:
    """Raise UserError unless a folder is absent, empty, or the folder of a run."""
    config = folder / CONFIG
    if config.is_file() or not folder.exists():
        return
    # A start that was killed leaves these, and so does a job that has not started yet.
    left = {LOCK, LOG, partial_of(config).name}
    left |= {CODE, JOBS, partial_of(folder / CODE).name, f".old-{CODE}"}
    is_free = folder.is_dir() and all(
        path.name in left or path.name.startswith(PROBE) for path in folder.iterdir()
    )
    if not is_free:
        raise UserError(
            "--run must be a new folder, an empty one, or the folder of a run, got "
            f"{folder} with other content. Use another --run=FOLDER."
        )


def is_finished(config: RunConfig, state: Mapping[str, Any] | None) -> bool:
    """Return whether the run has an export and a checkpoint after its last step.

    state: that of the newest checkpoint, None if there is none.
    """
    has_export = (Path(config.run) / "best" / SETTINGS_FILE).is_file()
    return has_export and state is not None and is_over(config, state["position"])


def is_over(config: RunConfig, position: Mapping[str, Any]) -> bool:
    """Return whether no step is left: after the last epoch, or ended by train.patience.

    position: as a checkpoint stores it; older checkpoints do not count scorings.
    """
    patience = config.train.patience
    is_early = 0 < patience <= position.get("scorings_since_best", 0)
    return is_early or bool(position["epoch"] >= config.train.epochs)
