"""A stand-in for ImageNet weights, where no hub can be reached: flallm signsim backbone --out=DIR.

A small ResNet-18 learns to see signers as such: where each hand is and where it points, in random signs of
the training signers, most of which mean nothing. It sees no sentence and no gloss. The folder loads by the
same path as microsoft/resnet-18 (`--visual.weights=DIR`).
"""

import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from flallm_ds.errors import UserError
from flallm_ds.files import new_folder, share_files
from flallm_ds.sharding.pool import begin_worker, signals_held
from flallm_ds.signsim.render import render_clip
from flallm_ds.signsim.signer import HAND, POINT, SIGNERS, UNSEEN, sign_poses
from flallm_ds.signsim.signs import HANDS, HANDSHAPES, LOCATIONS, MOVEMENTS, Sign

FRAMES_A_TASK = 125
SIDE = 64  # px of the squashed frames
CROP = 60
NUM_TARGETS = 8  # per hand on the screen's left, then right: x, y, sine and cosine of where it points
BATCH = 32
PEAK_RATE = 4e-3


def random_sign(rng: np.random.Generator) -> Sign:
    """Any handshape at any location with any movement: most such signs mean nothing."""
    return Sign(
        gloss=str(rng.choice(list("AEIOU"))),  # what the mouth does
        hands=str(rng.choice(HANDS, p=(0.4, 0.3, 0.1, 0.1, 0.1))),
        handshape=str(rng.choice(list(HANDSHAPES))),
        location=str(rng.choice(list(LOCATIONS))),
        movement=str(rng.choice(list(MOVEMENTS))),
        point_deg=float(rng.uniform(-90, 180)),
    )


def random_poses(num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Poses (num, POSE) from anywhere within random signs, or on the way from one to the next."""
    poses = []
    for _ in range(num):
        here, there = (sign_poses(random_sign(rng), 9)[rng.integers(9)] for _ in range(2))
        way = rng.uniform(0, 1) if rng.random() < 0.3 else 0.0
        poses.append((1 - way) * here + way * there)
    return np.stack(poses)


def targets(poses_FP: NDArray[np.float64], left_handed: bool) -> NDArray[np.float32]:
    """What is to be seen, (F, NUM_TARGETS), each number of about unit spread."""
    hands = []
    for start, own_side in ((0, 1.0), (HAND, -1.0)):
        hand = poses_FP[:, start : start + HAND]
        point = np.deg2rad(hand[:, POINT])
        across = hand[:, 0] * own_side * (-1.0 if left_handed else 1.0) / 40
        hands.append(
            np.stack([across, (hand[:, 1] - 150) / 80, 1.4 * np.sin(point), 1.7 * np.cos(point)], axis=1)
        )
    return np.concatenate(hands[::-1] if left_handed else hands, axis=1).astype(np.float32)


def render(task: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """FRAMES_A_TASK squashed frames (F, SIDE, SIDE, 3) of one signer, RGB, and their targets."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, task])
    signers = [signer for signer in SIGNERS if signer is not UNSEEN]
    signer = signers[task % len(signers)]
    poses_FP = random_poses(FRAMES_A_TASK, rng)
    frames = [
        cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., ::-1]
        for frame in render_clip(poses_FP, signer, rng)
    ]
    return np.stack(frames), targets(poses_FP, signer.left_handed)


def backbone(*, out: Path, width: int = 16, frames: int = 20000, epochs: int = 4, seed: int = 0) -> None:
    """Pretrain a backbone on random signs of synthetic signers and write a Hugging Face folder.

    width: channels of its first stage, as visual.width. frames: rendered once, seen `epochs` times.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out must be a new or an empty folder, but {out} holds something. Name another.")
    if frames < FRAMES_A_TASK or epochs < 1 or width < 1:
        raise UserError(f"--frames must be at least {FRAMES_A_TASK}, --epochs and --width at least 1.")
    import torch

    from flallm_ds.models.visual_encoder import VisualEncoder
    from flallm_ds.training.step import rate_factor

    begin = time.perf_counter()
    with signals_held():  # workers start now
        pool = ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=begin_worker)
        results = pool.map(render, range(frames // FRAMES_A_TASK), repeat(seed))
    try:
        parts = list(results)
    finally:
        pool.shutdown(cancel_futures=True)
    pixels, wanted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    print(f"backbone: {len(pixels):,} frames rendered in {time.perf_counter() - begin:.0f} s", flush=True)

    torch.manual_seed(seed)
    encoder = VisualEncoder(width)
    head = torch.nn.Linear(encoder.feature_width, NUM_TARGETS)
    parameters = [*encoder.backbone.parameters(), *head.parameters()]
    # fused: 680 frames/s instead of 560 on two CPU cores.
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=1e-2, fused=True)
    steps = len(pixels) // BATCH * epochs
    loss_mean, last_print = 0.0, time.perf_counter()
    begin = last_print
    for step in range(steps):
        rows = np.random.default_rng([seed, step]).integers(len(pixels), size=BATCH)
        loss = torch.nn.functional.smooth_l1_loss(
            head(encoder.frame_features(as_pixels(pixels[rows]))), torch.from_numpy(wanted[rows])
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate_factor(step / steps, 0.05)
        optimizer.step()
        loss_mean = 0.98 * loss_mean + 0.02 * loss.item() if step else loss.item()
        if time.perf_counter() - last_print > 5 or step == steps - 1:
            last_print = time.perf_counter()
            rate = (step + 1) / (last_print - begin)
            print(
                f"backbone: step {step + 1} of {steps}: loss {loss_mean:.4f}, {rate * BATCH:.0f} frames/s, "
                f"{(steps - step - 1) / rate:.0f} s left.",
                flush=True,
            )
    with new_folder(out) as folder:
        encoder.backbone.model.save_pretrained(folder)
        share_files(folder)


def as_pixels(frames_NHWC: NDArray[np.uint8]):  # type: ignore[no-untyped-def]  # torch is imported late
    """The centre crop, normalised as the trainer's preprocess does it; pixels_NCHW."""
    import torch

    from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD

    edge = (SIDE - CROP) // 2
    cut = (
        torch.from_numpy(frames_NHWC[:, edge : edge + CROP, edge : edge + CROP]).permute(0, 3, 1, 2).float()
        / 255
    )
    return (cut - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
