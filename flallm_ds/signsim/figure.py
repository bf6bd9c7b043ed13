"""Compute the positions of a signer's hands and arms in the frame.

The canvas has 210x300 px and is squeezed to 260 rows, as in PHOENIX14T. The elbows come
from inverse kinematics. The geometry of all frames of a clip is computed at once.

Array suffixes: F frames, P numbers of a pose, K points of an outline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flallm_ds.signsim.signer import (
    ANGLES,
    CURLS,
    FACE,
    HAND,
    LENGTHS,
    POINT,
    RING,
    ROLL,
    Signer,
)
from flallm_ds.signsim.signs import Floats

WIDTH, HEIGHT = 210, 260
SQUEEZE = HEIGHT / 300
SHIFT = 4  # fractional bits of the coordinates that OpenCV receives
ONE = 1 << SHIFT
Points = NDArray[np.int32]

# Coordinates of a hand (x towards the thumb, y along the fingers), in px.
_KNUCKLES = np.array([(10.5, -3.0), (9.0, 9.0), (3.1, 11.0), (-3.0, 10.0), (-8.6, 7.0)])
_FINGER_PX = np.array([15.0, 21.0, 23.0, 21.0, 17.0])
_PALM = np.array(
    [
        (6.5, -15),
        (10.5, -8),
        (11.5, 0),
        (11, 9),
        (4, 12.5),
        (-4, 12),
        (-10.5, 8.5),
        (-11, -2),
        (-6.5, -15),
    ]
)
_RING_CENTER, _RING_RADIUS = np.array([4.0, 20.0]), 10.5
_WRIST = np.array([0.0, -15.0])


# Body coordinates are px of the standard 210x300 canvas: x from the midline, positive on
# the side of the dominant hand; y down; z towards the camera.
@dataclass
class Camera:
    """Hold the position and the scale of the signer in one clip."""

    side: float
    """-1 if the dominant hand is in the left half of the frame, 1 if in the right half."""
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    """Shift of the signer, in px."""

    def project(self, points: Floats) -> Floats:
        """Map body coordinates (..., 2 or more) to frame coordinates (..., 2)."""
        # Scale around the chest (y 160), so that a larger signer stays in the frame.
        x = WIDTH / 2 + self.shift[0] + self.side * self.scale * points[..., 0]
        y = (160 + self.shift[1] + self.scale * (points[..., 1] - 160)) * SQUEEZE
        return np.stack([x, y], axis=-1)


def fixed_point(points: Floats) -> Points:
    """Convert points in px for OpenCV: integers with SHIFT fractional bits."""
    return np.rint(points * ONE).astype(np.int32)


@dataclass
class HandGeometry:
    """Hold the outlines of one hand in all frames of a clip."""

    palm_FK: Points
    fingers_F: Points
    """(F, 5, 3, 2): base, middle joint and tip of each finger."""
    ring_FK: Points
    ring_F: Floats
    scale_F: Floats
    wrist_F: Floats
    """(F, 3), in body coordinates."""
    thumb_near_F: NDArray[np.bool_]
    """Whether the palm faces the camera; the thumb is then drawn last."""


def hand_geometry(
    hand_FP: Floats, size: float, side: float, camera: Camera
) -> HandGeometry:
    """Compute the outlines of a hand.

    side: 1 for the dominant hand, -1 for the other hand, whose x is positive on its side.
    """
    # A hand seen from the side still has some width.
    roll_F = hand_FP[:, ROLL]
    roll_F = np.where(np.abs(roll_F) < 0.35, np.where(roll_F < 0, -0.35, 0.35), roll_F)
    # The axes of the hand in the frame. A hand closer to the camera is larger.
    scale_F = size * (1 + (hand_FP[:, 2] - 50) / 220)
    angle_F = np.deg2rad(hand_FP[:, POINT])
    along_F = np.stack([np.sin(angle_F), -np.cos(angle_F)], axis=1) * scale_F[:, None]
    across_F = (
        np.stack([np.cos(angle_F), np.sin(angle_F)], axis=1) * (scale_F * roll_F)[:, None]
    )

    def place(local: Floats) -> Floats:
        """Map points (F, ..., 2) from hand coordinates to body coordinates."""
        flat = local.reshape(len(hand_FP), -1, 2)
        across, along = flat[..., :1] * across_F[:, None], flat[..., 1:] * along_F[:, None]
        points = across + along + hand_FP[:, None, 0:2]
        return (points * (side, 1)).reshape(local.shape)

    # Palm and wrist have the same shape in every frame; the fingers change.
    num_frames = len(hand_FP)
    palm = place(np.tile(_PALM, (num_frames, 1, 1)))
    wrist = place(np.tile(_WRIST, (num_frames, 1)))
    # The ring of thumb and index finger; its size depends on how far it is closed.
    turn = np.linspace(0, 2 * np.pi, 13)
    circle = np.stack([np.sin(turn), np.cos(turn)], axis=1) * _RING_RADIUS
    ring = place(
        circle[None] * np.maximum(hand_FP[:, RING], 0)[:, None, None] + _RING_CENTER
    )
    return HandGeometry(
        palm_FK=fixed_point(camera.project(palm)),
        fingers_F=fixed_point(camera.project(place(_fingers(hand_FP)))),
        ring_FK=fixed_point(camera.project(ring)),
        ring_F=hand_FP[:, RING],
        scale_F=scale_F * camera.scale,
        # 4 px behind the palm.
        wrist_F=np.concatenate([wrist, hand_FP[:, 2:3] - 4], axis=1),
        thumb_near_F=roll_F < 0,
    )


def _fingers(hand_FP: Floats) -> Floats:
    """Return base, joint and tip of each finger: (F, 5, 3, 2), in hand coordinates."""
    # Two segments of equal length: the first at the angle of the finger, the second bent
    # further by the curl.
    half = hand_FP[:, LENGTHS] * _FINGER_PX / 2
    first = np.deg2rad(hand_FP[:, ANGLES])
    second = first + np.deg2rad(hand_FP[:, CURLS])
    base = np.broadcast_to(_KNUCKLES, (len(hand_FP), 5, 2))
    middle = base + np.stack([np.sin(first), np.cos(first)], axis=-1) * half[..., None]
    tip = middle + np.stack([np.sin(second), np.cos(second)], axis=-1) * half[..., None]
    return np.stack([base, middle, tip], axis=2)


_UPPER_ARM, _FOREARM = 66.0, 64.0
_ELBOW_POLE = np.array([0.75, 1.0, -0.35])  # elbows hang outwards, down and back


def elbows(shoulder: Floats, wrist_F: Floats, arms: float, side: float) -> Floats:
    """Return the elbow (F, 3) by two-link inverse kinematics in three dimensions.

    If the hand is too far away, the arm is drawn longer instead of missing the hand.
    """
    upper, fore = _UPPER_ARM * arms, _FOREARM * arms
    reach_F = wrist_F - shoulder
    distance_F = np.linalg.norm(reach_F, axis=1)
    # The triangle of shoulder, elbow and wrist: the position of the elbow along the line
    # from shoulder to wrist, and its height above that line.
    clipped_F = np.clip(distance_F, abs(upper - fore) + 1, upper + fore - 1)
    along_F = (upper**2 - fore**2 + clipped_F**2) / (2 * clipped_F)
    height_F = np.sqrt(np.maximum(upper**2 - along_F**2, 0))
    # The direction of the height: the part of the pole that is perpendicular to the line.
    direction_F = reach_F / np.maximum(distance_F, 1e-6)[:, None]
    pole = _ELBOW_POLE * (side, 1, 1)
    normal_F = pole - (direction_F @ pole)[:, None] * direction_F
    normal_F /= np.linalg.norm(normal_F, axis=1)[:, None]
    share_F = along_F / clipped_F
    elbow_F: Floats = shoulder + reach_F * share_F[:, None] + normal_F * height_F[:, None]
    return elbow_F


@dataclass
class Limb:
    """Hold a tapered limb in all frames of a clip."""

    outline_FK: Points
    body_FK: Points
    glow_FK: Points
    start_F: Points
    end_F: Points
    radii: tuple[float, float]


def limb(start_F: Floats, end_F: Floats, radii: tuple[float, float], light: float) -> Limb:
    """Compute the quadrilaterals of a limb between two points (F, 2). radii: in px."""
    axis_F = end_F - start_F
    length_F = np.maximum(np.linalg.norm(axis_F, axis=1), 1e-6)[:, None]
    normal_F = np.stack([-axis_F[:, 1], axis_F[:, 0]], axis=1) / length_F
    # The light comes from above and from one side.
    lit_F = normal_F * np.where(normal_F @ np.array([light, -1.0]) > 0, 1.0, -1.0)[:, None]

    def quad(extra: float) -> Points:
        r0, r1 = radii[0] + extra, radii[1] + extra
        corners = [
            start_F + normal_F * r0,
            end_F + normal_F * r1,
            end_F - normal_F * r1,
            start_F - normal_F * r0,
        ]
        return fixed_point(np.stack(corners, axis=1))

    # The lit stripe is between 15 and 75 % of the radius, on the side of the light.
    stripe = [
        start_F + lit_F * radii[0] * 0.75,
        end_F + lit_F * radii[1] * 0.75,
        end_F + lit_F * radii[1] * 0.15,
        start_F + lit_F * radii[0] * 0.15,
    ]
    glow_FK = fixed_point(np.stack(stripe, axis=1))
    return Limb(
        quad(0.9), quad(0), glow_FK, fixed_point(start_F), fixed_point(end_F), radii
    )


@dataclass
class Figure:
    """Hold the geometry of a signer in all frames of a clip."""

    signer: Signer
    camera: Camera
    light: float
    """Factor of all colours."""
    hands: tuple[HandGeometry, HandGeometry]
    arms: tuple[tuple[Limb, Limb], tuple[Limb, Limb]]
    face_FP: Floats
    blink_F: NDArray[np.bool_]


def figure(
    poses_FP: Floats,
    signer: Signer,
    camera: Camera,
    light: float = 1.0,
    rng: np.random.Generator | None = None,
) -> Figure:
    """Compute the geometry of a clip. Without a generator, the eyes stay open."""
    hands, arms = [], []
    for side, columns in ((1.0, slice(0, HAND)), (-1.0, slice(HAND, FACE))):
        # Compute the hand first: the arm ends at the wrist.
        hand = hand_geometry(poses_FP[:, columns], 1.35 * signer.hands, side, camera)
        shoulder = np.array([side * 41.0 * signer.shoulders, 141.0, 0.0])
        elbow_F = elbows(shoulder, hand.wrist_F, signer.arms, side)
        # Shoulder, elbow and wrist in the frame.
        joints = [np.broadcast_to(camera.project(shoulder), (len(poses_FP), 2))]
        joints += [camera.project(elbow_F), camera.project(hand.wrist_F)]
        # Arms get thicker with the shoulders, by half as much.
        thick = camera.scale * 0.5 * (1 + signer.shoulders)
        upper = limb(joints[0], joints[1], (13.0 * thick, 11.0 * thick), signer.light)
        fore = limb(joints[1], joints[2], (11.0 * thick, 7.4 * thick), signer.light)
        hands.append(hand)
        arms.append((upper, fore))
    # Blinks last three frames and occur about every 45 frames (1.8 s).
    num_frames = len(poses_FP)
    blink_F = np.zeros(num_frames, dtype=bool)
    if rng is not None:
        for start in rng.integers(0, num_frames, max(1, num_frames // 45)):
            blink_F[start : start + 3] = True
    return Figure(
        signer,
        camera,
        light,
        (hands[0], hands[1]),
        (arms[0], arms[1]),
        poses_FP[:, FACE:],
        blink_F,
    )
