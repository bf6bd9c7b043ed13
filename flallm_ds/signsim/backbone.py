"""Pretrain a small backbone that replaces ImageNet weights where no hub is available:
flallm signsim backbone --out=DIR.

A small ResNet-18 learns to find the hands of a signer and their directions in random signs
of the training signers. Most of these signs have no meaning, and no sentence or gloss is
used. The folder is loaded in the same way as microsoft/resnet-18 (`--visual.weights=DIR`).
"""

import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from flallm_ds.errors import UserError
from flallm_ds.files import new_folder, share_files
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.sharding.pool import begin_worker, signals_held
from flallm_ds.signsim.pretraining_data import FRAMES_A_TASK, NUM_TARGETS, SIDE, render
from flallm_ds.training.schedule import lr_factor

CROP = 60
BATCH = 32
PEAK_LR = 4e-3


def backbone(
    *,
    out: Path,
    width: int = 16,
    frames: int = 20000,
    epochs: int = 4,
    seed: int = 0,
) -> None:
    """Pretrain a backbone on random signs and write it as a Hugging Face folder.

    width: channels of the first stage, as visual.width. frames: number of frames, which are
    rendered once. epochs: passes over the frames.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out must be a new or empty folder, got {out}, which is not empty. Choose "
            "another folder."
        )
    least = {"frames": FRAMES_A_TASK, "epochs": 1, "width": 1}
    for option, value in (("frames", frames), ("epochs", epochs), ("width", width)):
        if value < least[option]:
            raise UserError(f"--{option} must be at least {least[option]}, got {value}.")
    pixels, wanted = _render_all(frames // FRAMES_A_TASK, seed)
    encoder = _train(pixels, wanted, width, epochs, seed)
    with new_folder(out) as folder:
        encoder.backbone.model.save_pretrained(folder)
        share_files(folder)


def _render_all(num_tasks: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Render all frames on all cores.

    Returns (frames (N, SIDE, SIDE, 3), targets (N, NUM_TARGETS)).
    """
    begin = time.perf_counter()
    with signals_held():  # the workers start here
        pool = ProcessPoolExecutor(
            mp_context=get_context("spawn"), initializer=begin_worker
        )
        results = pool.map(render, range(num_tasks), repeat(seed))
    try:
        parts = list(results)
    finally:
        pool.shutdown(cancel_futures=True)
    frames, targets = zip(*parts, strict=True)
    pixels, wanted = np.concatenate(frames), np.concatenate(targets)
    span_s = time.perf_counter() - begin
    print(f"backbone: {len(pixels):,} frames rendered in {span_s:.0f} s", flush=True)
    return pixels, wanted


def _train(
    pixels: NDArray[np.uint8],
    wanted: NDArray[np.float32],
    width: int,
    epochs: int,
    seed: int,
) -> VisualEncoder:
    """Train an encoder to find the targets in the frames."""
    torch.manual_seed(seed)
    encoder = VisualEncoder(width)
    head = torch.nn.Linear(encoder.feature_width, NUM_TARGETS)
    parameters = [*encoder.backbone.parameters(), *head.parameters()]
    # fused: 680 frames/s instead of 560 on two CPU cores.
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=1e-2, fused=True)
    steps = len(pixels) // BATCH * epochs
    loss_mean = 0.0
    begin = last_print = time.perf_counter()
    for step in range(steps):
        # Frames are drawn with replacement: a step's batch depends on seed and step alone.
        rows = np.random.default_rng([seed, step]).integers(len(pixels), size=BATCH)
        found = head(encoder.frame_features(as_pixels(pixels[rows])))
        loss = torch.nn.functional.smooth_l1_loss(found, torch.from_numpy(wanted[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * lr_factor(step / steps, 0.05)
        optimizer.step()
        # A moving average over about 50 steps, which starts with the first loss.
        loss_mean = 0.98 * loss_mean + 0.02 * loss.item() if step else loss.item()
        if time.perf_counter() - last_print > 5 or step == steps - 1:
            last_print = time.perf_counter()
            steps_per_s = (step + 1) / (last_print - begin)
            left_s = (steps - step - 1) / steps_per_s
            print(
                f"backbone: step {step + 1} of {steps}: loss {loss_mean:.4f}, "
                f"{steps_per_s * BATCH:.0f} frames/s, {left_s:.0f} s left.",
                flush=True,
            )
    return encoder


def as_pixels(frames_NHWC: NDArray[np.uint8]) -> torch.Tensor:
    """Return the centre crop, normalised as in data/preprocess.py: pixels_NCHW."""
    edge = (SIDE - CROP) // 2
    cut_NHWC = torch.from_numpy(frames_NHWC[:, edge : edge + CROP, edge : edge + CROP])
    pixels_NCHW = cut_NHWC.permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (pixels_NCHW - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
