"""Render frames of random signs with the positions of the hands, to pretrain a backbone.

Worker processes render the frames, so this module does not import torch.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from flallm_ds.signsim.render import render_clip
from flallm_ds.signsim.signer import HAND, POINT, SEEN, sign_poses
from flallm_ds.signsim.signs import HANDS, HANDSHAPES, LOCATIONS, MOVEMENTS, Sign

FRAMES_A_TASK = 125
SIDE = 64  # width and height of the squashed frames, in px
# For the hand in the left half of the frame, then in the right half: x, y, and sine and
# cosine of its direction.
NUM_TARGETS = 8


def random_sign(rng: np.random.Generator) -> Sign:
    """Draw a random handshape, location and movement. Most such signs have no meaning."""
    return Sign(
        gloss=str(rng.choice(list("AEIOU"))),  # the shape of the mouth
        hands=str(rng.choice(HANDS, p=(0.4, 0.3, 0.1, 0.1, 0.1))),
        handshape=str(rng.choice(list(HANDSHAPES))),
        location=str(rng.choice(list(LOCATIONS))),
        movement=str(rng.choice(list(MOVEMENTS))),
        point_deg=float(rng.uniform(-90, 180)),
    )


def random_poses(num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw poses (num, POSE) within random signs, or between two of them."""
    poses = []
    for _ in range(num):
        here = sign_poses(random_sign(rng), 9)[rng.integers(9)]
        there = sign_poses(random_sign(rng), 9)[rng.integers(9)]
        # 30 % of the poses are between two signs, as in the transitions of a clip.
        way = rng.uniform(0, 1) if rng.random() < 0.3 else 0.0
        poses.append((1 - way) * here + way * there)
    return np.stack(poses)


def targets(poses_FP: NDArray[np.float64], left_handed: bool) -> NDArray[np.float32]:
    """Return the targets (F, NUM_TARGETS), each scaled to about unit variance."""
    hands = []
    for start, own_side in ((0, 1.0), (HAND, -1.0)):
        hand_FP = poses_FP[:, start : start + HAND]
        point_F = np.deg2rad(hand_FP[:, POINT])
        x_F = hand_FP[:, 0] * own_side * (-1.0 if left_handed else 1.0) / 40
        y_F = (hand_FP[:, 1] - 150) / 80
        # Sine and cosine, because degrees would jump from 180 to -180.
        sine_F, cosine_F = 1.4 * np.sin(point_F), 1.7 * np.cos(point_F)
        hands.append(np.stack([x_F, y_F, sine_F, cosine_F], axis=1))
    # The dominant hand of a left-handed signer is in the right half of the frame.
    if left_handed:
        hands.reverse()
    return np.concatenate(hands, axis=1).astype(np.float32)


def render(task: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Render FRAMES_A_TASK squashed frames (F, SIDE, SIDE, 3) of one signer, RGB.

    Returns the frames and their targets.
    """
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, task])
    signer = SEEN[task % len(SEEN)]
    poses_FP = random_poses(FRAMES_A_TASK, rng)
    frames = []
    for frame in render_clip(poses_FP, signer, rng):
        squashed = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        frames.append(squashed[..., ::-1])  # OpenCV's blue, green, red to RGB
    return np.stack(frames), targets(poses_FP, signer.left_handed)
