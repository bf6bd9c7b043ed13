"""Write features and train on them; test_training_on_features.py starts it under a
launcher."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.errors import UserError
from flallm_ds.features.writing import Writing
from flallm_ds.recipes import resolve
from flallm_ds.training import checkpoint
from flallm_ds.training.build import build_task
from flallm_ds.training.run_folder import open_run_folder
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.task import Task
from flallm_ds.training.trainer import Trainer
from tests.helpers.launching import tiny_options

MASKS = {"data.time_masks": 2, "data.time_mask_frames": 3, "data.feature_masks": 1}
ONE_EPOCH = {"train.epochs": 1, "eval.every_epochs": 1}


def another_encoder(exported: Path, out: Path) -> None:
    """Copy an export, and change one weight of its visual encoder."""
    shutil.copytree(exported, out)
    state = load_file(out / "visual_encoder.safetensors")
    state["temporal.conv.bias"][0] += 1e-3
    save_file(state, out / "visual_encoder.safetensors")


def first_features(task: Task) -> torch.Tensor:
    """Return the inputs of the adapter at the first training step of this rank, masked."""
    batches = next(iter(task.train_loader(0).steps(0)))
    return torch.cat([task.inputs(batch, train=True) for batch in batches])


def runs(*, folder: Path, corpus: Path) -> None:
    """Create in `folder`: visual/, features/, and runs of stage llm on video and features."""
    world = dist.start()
    stop = StopRequest()

    def train(stage: str, run: str, **more: object) -> None:
        config = resolve(stage, None, tiny_options(corpus, stage, folder / run, **more))
        place = dist.main_first(lambda: open_run_folder(config), world)
        task = build_task(config, place, world)
        if stage == "llm":
            save_file(
                {"features_ND": first_features(task)},
                place / f"first_features_{world.rank}",
            )
        saved = checkpoint.resumable(place, world)
        Trainer(task, place, stop).run(saved)

    train("visual", "visual", **ONE_EPOCH)
    config = resolve("llm", None, tiny_options(corpus, "llm", folder / "features"))
    Writing.begin(
        config, world, folder / "features", 2, "float32", ("train", "dev", "test")
    ).run(stop)
    cached = {"data.shards": folder / "features"}
    train("llm", "video")
    train("llm", "cached", **cached)
    train("llm", "resumed", **cached, **{"train.max_steps": 7})
    train("llm", "resumed", **cached)
    other = folder / "other"
    dist.main_first(lambda: another_encoder(folder / "visual" / "best", other), world)
    try:
        train("llm", "video", visual_run=other)
    except UserError as error:
        (folder / f"another_encoder_{world.rank}.txt").write_text(str(error))
    two_steps = {"train.max_steps": 2}
    train("llm", "masked_video", **MASKS, **two_steps)
    train("llm", "masked", **cached, **MASKS, **two_steps)
    train("llm", "slower", **cached, **{"data.feature_fps": 8}, **ONE_EPOCH)
    dist.stop()


main(runs)
