"""Checks of a command line that need no model, made before slow imports.

Importing torch, transformers and deepspeed takes about ten seconds. A wrong file name or
value is refused before that. Commands under a launcher check on rank 0 alone: the others
end when the launcher sees it fail.
"""

from collections.abc import Sequence
from pathlib import Path

from flallm_ds.config import RunConfig
from flallm_ds.data.index import load_index
from flallm_ds.errors import UserError, require
from flallm_ds.export_folder import HUB_ID, find_export, find_stage_1
from flallm_ds.process import process_rank
from flallm_ds.recipes import config_of
from flallm_ds.same_run import check_same_run
from flallm_ds.training.trackers import check_installed


def check_runs(configs: Sequence[RunConfig], splits: Sequence[str] = ()) -> None:
    """Raise UserError for files that the options of a run name, but that do not exist.
    splits: those that it reads; by default train and that of eval.split.
    """
    if process_rank() != 0:
        return
    # Of --stage both, stage llm starts from a run that does not exist yet.
    first = configs[0]
    if first.stage == "llm" and first.visual_run != "none":
        find_stage_1(first.visual_run)
    for config in configs:
        check_installed(config.train.trackers)
        if (Path(config.run) / "config.json").is_file():
            continue  # A resumed run has its LLM and its backbone in its own folder.
        _check_path("llm.name", config.llm.name)
        _check_path("visual.weights", config.visual.weights)
        _check_deepspeed_json(config)
        check_shards(config.data.shards, splits or ("train", config.eval.split))


def check_run_folders(configs: Sequence[RunConfig]) -> None:
    """Raise UserError for a run folder that belongs to another configuration."""
    if process_rank() != 0:
        return
    for config in configs:
        folder = Path(config.run)
        if (folder / "config.json").is_file():
            check_same_run(config, RunConfig.load(folder / "config.json"), folder)


def check_shards(shards: Sequence[str], splits: Sequence[str]) -> None:
    """Raise UserError where a folder of shards does not exist, or lacks a split."""
    # The shards of the quickstart are made when a run needs them.
    if process_rank() != 0 or tuple(shards) == config_of("quickstart_visual").data.shards:
        return
    for folder in shards:
        if "://" in folder:
            continue  # An address is read later: the network may take seconds.
        for split in splits:
            load_index(folder, split)


def _check_path(option: str, name: str) -> None:
    """Raise UserError for a path that does not exist; other names may be hub ids."""
    path = Path(name)
    if name.startswith(("/", ".", "~")) and not path.exists() and path.suffix != ".gguf":
        raise UserError(
            f"{option} must be a hub id or an existing path, got {name}. Check the path."
        )


def _check_deepspeed_json(config: RunConfig) -> None:
    """Raise UserError where train.deepspeed names no file."""
    path = Path(config.train.deepspeed)
    # ds_configs/NAME.json is also found in the installed package.
    if not config.train.deepspeed or path.is_file() or path.parent == Path("ds_configs"):
        return
    raise UserError(
        f"train.deepspeed must be an existing DeepSpeed JSON, got {path}. Check the path, or "
        "name one of ds_configs/."
    )


def check_model(model: str | Path) -> None:
    """Raise UserError for a path that is neither an export nor a run folder with one."""
    # USER/NAME on the hub is looked up later: the network may take seconds.
    if Path(model).exists() or not HUB_ID.fullmatch(str(model)):
        find_export(model)


def check_evaluation(run: str, split: str, shards: Sequence[str], threads: int) -> None:
    """Raise UserError for a run without an export, or shards that cannot be read."""
    if process_rank() != 0:
        return
    require(threads >= 0, f"--threads must be at least 0, got {threads}.")
    find_export(run)
    # An export of `flallm export` does not know where its shards are.
    config_path = Path(run) / "config.json"
    if not shards:
        require(
            config_path.is_file(),
            f"--shards must be given where {run} is an export without a run folder (no "
            "config.json), got nothing.",
        )
        shards = RunConfig.load(config_path).data.shards
    check_shards(shards, (split,))


# More beams take memory and time without better sentences. A larger length penalty makes
# length ** penalty too large for a float.
_MAX_BEAMS = 1000
_MAX_LENGTH_PENALTY = 100


def check_search(
    beams: int | None, nbest: int, length_penalty: float | None = None
) -> None:
    """Raise UserError for options of the search that are too large or do not fit.

    beams, length_penalty: None for those of the model, which are not known yet.
    """
    most = _MAX_BEAMS if beams is None else beams
    require(
        beams is None or 1 <= beams <= _MAX_BEAMS,
        f"--beams must be at least 1 and at most {_MAX_BEAMS}, got {beams}.",
    )
    require(
        1 <= nbest <= most,
        f"--nbest must be at least 1 and at most --beams ({most}), got {nbest}. Give another "
        "--nbest or --beams.",
    )
    require(
        length_penalty is None or abs(length_penalty) <= _MAX_LENGTH_PENALTY,
        f"--length_penalty must be from {-_MAX_LENGTH_PENALTY} to {_MAX_LENGTH_PENALTY}, "
        f"got {length_penalty}.",
    )
    require(
        length_penalty is None or beams != 1,
        f"--length_penalty must go with several beams, got {length_penalty} and --beams=1, "
        "which compares no lengths. Leave it out.",
    )


def check_exists(option: str, path: Path) -> None:
    """Raise UserError where a file or folder does not exist."""
    require(
        path.exists(), f"{option} must be an existing path, got {path}. Check the path."
    )


def check_new_folder(option: str, folder: Path) -> None:
    """Raise UserError where something would be overwritten."""
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(
        is_new,
        f"{option} must be a new or an empty folder, got {folder}, which is not empty. "
        "Name another folder.",
    )
