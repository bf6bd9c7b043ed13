"""A stand-in for ImageNet weights, where no hub can be reached: flallm signsim backbone
--out=DIR.

A small ResNet-18 learns to see signers as such: where each hand is and where it points,
in random signs of the training signers, most of which mean nothing. It sees no sentence
and no gloss. The folder loads by the same path as microsoft/resnet-18
(`--visual.weights=DIR`).
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
from flallm_ds.training.schedule import rate_factor

CROP = 60
BATCH = 32
PEAK_RATE = 4e-3


def backbone(
    *,
    out: Path,
    width: int = 16,
    frames: int = 20000,
    epochs: int = 4,
    seed: int = 0,
) -> None:
    """Pretrain a backbone on random signs of synthetic signers and write a Hugging Face folder.

    width: channels of its first stage, as visual.width. frames: rendered once, seen
    `epochs` times.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        got = f"but {out} holds something. Name another."
        raise UserError(f"--out must be a new or an empty folder, {got}")
    if frames < FRAMES_A_TASK or epochs < 1 or width < 1:
        least = f"--frames must be at least {FRAMES_A_TASK}"
        raise UserError(f"{least}, --epochs and --width at least 1.")
    pixels, wanted = _render_all(frames // FRAMES_A_TASK, seed)
    encoder = _train(pixels, wanted, width, epochs, seed)
    with new_folder(out) as folder:
        encoder.backbone.model.save_pretrained(folder)
        share_files(folder)


def _render_all(num_tasks: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Render all frames on all cores: (N, SIDE, SIDE, 3) and their targets (N, NUM_TARGETS)."""
    begin = time.perf_counter()
    with signals_held():  # workers start now
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
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=1e-2, fused=True)
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
            group["lr"] = PEAK_RATE * rate_factor(step / steps, 0.05)
        optimizer.step()
        # A running mean over about 50 steps; the first loss begins it.
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
    """Cut the centre out and normalise it as the trainer's preprocess does it; pixels_NCHW."""
    # The constants are those of ImageNet, by which users' frames are normalised as well.
    edge = (SIDE - CROP) // 2
    cut_NHWC = torch.from_numpy(frames_NHWC[:, edge : edge + CROP, edge : edge + CROP])
    pixels_NCHW = cut_NHWC.permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (pixels_NCHW - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
