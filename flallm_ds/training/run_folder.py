"""The run folder: what a run was, what it measured, and where it goes on.

config.json  versions.json  metrics.jsonl  tensorboard/  checkpoints/  best/ (an export)  tokenizer/
"""

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from flallm_ds import __version__
from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.dist import World, main_first
from flallm_ds.errors import UserError
from flallm_ds.training.checkpoint import replace_file

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "webdataset",
    "torchaudio",
    "sacrebleu",
    "simplejpeg",
    "numpy",
)


@contextmanager
def run_folder(config: RunConfig, world: World) -> Iterator[Path]:
    """`open_run_folder` on all ranks while a run is built: one that is refused leaves nothing new."""
    path = Path(config.run)
    is_new = world.is_main and not (path / "config.json").is_file()  # and empty, or it is refused at once
    was_there = path.exists()
    folder = main_first(lambda: open_run_folder(config), world)
    try:
        yield folder
    except BaseException:  # Ctrl-C, too
        if is_new:
            for new in path.iterdir():
                shutil.rmtree(new) if new.is_dir() else new.unlink()
            if not was_there:
                path.rmdir()
        raise


def open_run_folder(config: RunConfig) -> Path:
    """Make the folder of a new run, or check that an existing one is of this very run.

    Raises UserError where the folder is not empty and not a run's, or an option that changes numbers differs.
    """
    folder = Path(config.run)
    path = folder / "config.json"
    if path.is_file():
        _check_same_run(config, RunConfig.load(path), folder)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"run must name a new, an empty or a run's folder, but {folder} holds something else. "
            "Give another --run=FOLDER."
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
    replace_file(path, config.to_json())
    return folder


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"flallm_ds": __version__, "python": platform.python_version(), **found}


def _check_same_run(now: RunConfig, before: RunConfig, folder: Path) -> None:
    mine, its = now.options(), before.options()
    for name, value in its.items():
        if name not in FREE_TO_CHANGE and mine[name] != value:
            raise UserError(
                f"{name} must be {value!r} as when the run in {folder} began, but is {mine[name]!r}. "
                f"Leave it, or start another run with --run=FOLDER."
            )


class Metrics:
    """metrics.jsonl and TensorBoard events, on rank 0. A resume forgets what came after its checkpoint."""

    def __init__(self, folder: Path, global_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _global_step(line) <= global_step]
            replace_file(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=global_step + 1)

    def write(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "global_step": global_step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, global_step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _global_step(line: str) -> int:
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError):
        return 10**18  # a line cut off by a kill
