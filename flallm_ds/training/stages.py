"""One stage of training from its options, and whether it is done: what `launch/train.py` runs."""

import gc
from pathlib import Path

import torch

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.dist import World, main_first
from flallm_ds.training import checkpoint
from flallm_ds.training.build import build_task
from flallm_ds.training.run_folder import open_run_folder, run_folder
from flallm_ds.training.run_log import run_log
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.trainer import Trainer


def run_stage(config: RunConfig, world: World, stop: StopRequest) -> bool:
    """Train a stage from where it is; False if it stopped at train.max_steps before its end.

    The caller holds the run folder (`locked_run`). Raises UserError for options that do not fit, Preempted
    when asked to stop.
    """
    if main_first(lambda: is_finished(config), world):
        if world.is_main:
            print(summary(config), flush=True)
        return True
    with run_log(Path(config.run), world) as log:
        with run_folder(config, world) as folder:
            task = build_task(config, folder, world)
        trainer = Trainer(task, folder, stop, log)
        trainer.run()
        finished = trainer.at.epoch >= config.train.epochs
        if world.is_main:
            limit = (
                f"stopped after step {trainer.at.global_step}, at train.max_steps; without it the run "
                "resumes."
            )
            print(summary(config) if finished else limit, flush=True)
    task.engine.close()
    del trainer, task
    gc.collect()  # its parts refer to one another; the next stage needs their memory
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return finished


def is_finished(config: RunConfig) -> bool:
    """Whether the run is there, is this very run, and has an export and a checkpoint after its last epoch."""
    folder = Path(config.run)
    if not (folder / "config.json").is_file():
        return False
    open_run_folder(config)
    for parent in (folder, folder / "checkpoints"):
        checkpoint.recover_folders(parent)
    if not (folder / "best" / export.SETTINGS_FILE).is_file():
        return False
    newest = checkpoint.newest(folder / "checkpoints")
    return newest is not None and int(newest.state["position"]["epoch"]) >= config.train.epochs


def summary(config: RunConfig) -> str:
    """Say where a finished stage is, and how good its best model was when it was scored."""
    best = Path(config.run) / "best"
    scores = export.read_settings(best)["scores"]
    bleu4 = scores[config.eval.split]["bleu4"]
    return (
        f"stage {config.stage} is finished: {config.run}\n"
        f"best {config.eval.split} BLEU-4 {bleu4:.2f}, after epoch {scores['epoch']}: {best}"
    )


def is_evaluated(config: RunConfig, split: str) -> bool:
    """Whether the run's best export has been scored on this split of its own shards, where they are now."""
    return split in export.evaluated(Path(config.run) / "best", config.data.shards)
