"""A stand-in for ImageNet weights, where no hub can be reached: python shards/signsim/backbone.py --out=DIR.

A small ResNet-18 learns to see signers as such: where each hand is, where it points and which fingers are
stretched, in random poses of the training signers. It sees no sign, no sentence and no gloss. The folder
loads by the same path as microsoft/resnet-18 (`--visual.weights=DIR`).
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # run as a file: the project's root is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import cv2
import numpy as np
from numpy.typing import NDArray

from flallm_ds import command
from flallm_ds.errors import UserError
from shards.signsim.render import render_clip
from shards.signsim.signer import HAND, LENGTHS, POINT, POSE, ROLL, SIGNERS, UNSEEN, rest_pose
from shards.signsim.signs import HANDSHAPES

FRAMES_A_TASK = 250
SIDE = 64  # px of the squashed frames
CROP = 60
NUM_TARGETS = 18  # per hand on the screen's left, then right: x, y, sine and cosine of pointing, 5 lengths
BATCH = 64
PEAK_RATE = 2e-3


def random_poses(num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Poses (num, POSE) with either hand anywhere in signing space, in any direction and handshape."""
    poses_FP = np.tile(rest_pose(), (num, 1))
    shapes = [np.array([*s[0], *s[1], *s[2], s[3]]) for s in HANDSHAPES.values()]
    for start in (0, HAND):
        hand = poses_FP[:, start : start + HAND]
        moved = rng.random(num) < (0.95 if start == 0 else 0.6)  # the other hand often rests
        hand[moved, 0] = rng.uniform(-70, 78, moved.sum())
        hand[moved, 1] = rng.uniform(35, 240, moved.sum())
        hand[moved, 2] = rng.uniform(30, 60, moved.sum())
        hand[moved, POINT] = rng.uniform(-90, 90, moved.sum())
        hand[moved, ROLL] = rng.choice([-1.0, 1.0], moved.sum())
        hand[moved, 5:] = np.stack([shapes[i] for i in rng.integers(len(shapes), size=moved.sum())])
    poses_FP[:, 2 * HAND :] = rng.uniform(-0.3, 1.0, (num, POSE - 2 * HAND))
    return poses_FP


def targets(poses_FP: NDArray[np.float64], left_handed: bool) -> NDArray[np.float32]:
    """What is to be seen, (F, NUM_TARGETS), each number of about unit size."""
    hands = []
    for start, own_side in ((0, 1.0), (HAND, -1.0)):
        hand = poses_FP[:, start : start + HAND]
        point = np.deg2rad(hand[:, POINT])
        across = hand[:, 0] * own_side * (-1.0 if left_handed else 1.0) / 50
        parts = [across, hand[:, 1] / 70 - 2, np.sin(point), np.cos(point)]
        hands.append(np.stack([*parts, *(2 * hand[:, LENGTHS] - 1).T], axis=1))
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


def backbone(*, out: Path, width: int = 16, frames: int = 16000, epochs: int = 4, seed: int = 0) -> None:
    """Pretrain a backbone on random poses of synthetic signers and write a Hugging Face folder.

    width: channels of its first stage, as visual.width. frames: rendered once, seen `epochs` times.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out must be a new or an empty folder, but {out} holds something. Name another.")
    if frames < FRAMES_A_TASK or epochs < 1 or width < 1:
        raise UserError(f"--frames must be at least {FRAMES_A_TASK}, --epochs and --width at least 1.")
    import torch

    from flallm_ds.models.visual_encoder import VisualEncoder
    from flallm_ds.training.schedule import rate_factor

    begin = time.perf_counter()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(render, range(frames // FRAMES_A_TASK), repeat(seed)))
    pixels, wanted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    print(f"backbone: {len(pixels):,} frames rendered in {time.perf_counter() - begin:.0f} s", flush=True)

    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    encoder = VisualEncoder(width)
    head = torch.nn.Linear(encoder.feature_width, NUM_TARGETS)
    parameters = [*encoder.backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=1e-2)
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
    partial = out.with_name(f".partial-{out.name}")
    encoder.backbone.save_pretrained(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)


def as_pixels(frames_NHWC: NDArray[np.uint8]):  # type: ignore[no-untyped-def]  # torch is imported late
    """The centre crop, normalised as the trainer's preprocess does it; pixels_NCHW."""
    import torch

    from flallm_ds.preprocess import IMAGENET_MEAN, IMAGENET_STD

    edge = (SIDE - CROP) // 2
    cut = (
        torch.from_numpy(frames_NHWC[:, edge : edge + CROP, edge : edge + CROP]).permute(0, 3, 1, 2).float()
        / 255
    )
    return (cut - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)


if __name__ == "__main__":
    command.main(backbone)
