"""Define the seven signers, and compute the poses of a sequence of signs.

Array suffixes: F frames of a clip, P numbers of a pose, N phases of one sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flallm_ds.signsim.signs import (
    BASE_PALM,
    HANDSHAPES,
    LOCATIONS,
    MOVEMENTS,
    Floats,
    Sign,
)

Color = tuple[int, int, int]
"""Blue, green, red: the order of OpenCV."""


@dataclass(frozen=True)
class Signer:
    """Hold proportions (relative to the standard signer), tempo and looks of a person."""

    name: str
    left_handed: bool
    shoulders: float
    arms: float
    hands: float
    head: tuple[float, float]
    """Width and height of the head."""
    space: float
    """Size of the signing space."""
    tempo: float
    """Signs per second relative to the mean."""
    undershoot: float
    """Share of the distance to the neighbouring signs by which a stroke is shortened."""
    skin: Color
    hair: Color
    hair_style: str
    """short, long, bob, bun, or bald."""
    clothes: Color
    neckline: str
    """vee, round, or lapel."""
    short_sleeves: bool
    background: tuple[Color, Color]
    """Colours at the top and the bottom of the frame."""
    light: float
    """Direction of the light: from -1 (left of the frame) to 1 (right)."""
    glasses: bool = False
    beard: bool = False


SIGNERS = (
    Signer(
        "Signer01", left_handed=False,
        shoulders=1.00, arms=1.00, hands=1.00, head=(1.00, 1.00),
        space=1.00, tempo=1.00, undershoot=0.08,
        skin=(150, 178, 226), hair=(34, 44, 62), hair_style="bob",
        clothes=(46, 40, 38), neckline="vee", short_sleeves=False,
        background=((170, 150, 132), (214, 204, 196)), light=-0.8,
    ),
    Signer(
        "Signer02", left_handed=True,
        shoulders=1.10, arms=1.05, hands=1.06, head=(1.02, 1.04),
        space=1.05, tempo=1.06, undershoot=0.12,
        skin=(128, 160, 214), hair=(30, 36, 44), hair_style="short",
        clothes=(112, 66, 38), neckline="lapel", short_sleeves=False,
        background=((150, 146, 140), (196, 190, 186)), light=0.7,
    ),
    Signer(
        "Signer03", left_handed=False,
        shoulders=0.92, arms=0.95, hands=0.96, head=(0.96, 0.98),
        space=0.95, tempo=0.90, undershoot=0.05,
        skin=(88, 122, 176), hair=(22, 22, 30), hair_style="long",
        clothes=(70, 38, 92), neckline="round", short_sleeves=True,
        background=((186, 172, 140), (208, 206, 190)), light=0.5,
    ),
    Signer(
        "Signer04", left_handed=False,
        shoulders=1.07, arms=1.03, hands=1.08, head=(1.06, 1.02),
        space=1.02, tempo=0.95, undershoot=0.10,
        skin=(160, 190, 236), hair=(92, 98, 108), hair_style="bald",
        clothes=(78, 86, 58), neckline="lapel", short_sleeves=False,
        background=((140, 132, 120), (180, 178, 170)), light=-0.4,
        glasses=True, beard=True,
    ),
    Signer(
        "Signer05", left_handed=True,
        shoulders=0.95, arms=0.98, hands=0.97, head=(0.97, 1.00),
        space=0.98, tempo=1.10, undershoot=0.14,
        skin=(142, 172, 228), hair=(60, 116, 176), hair_style="long",
        clothes=(88, 92, 40), neckline="vee", short_sleeves=False,
        background=((196, 168, 152), (220, 206, 200)), light=0.9,
    ),
    Signer(
        "Signer06", left_handed=False,
        shoulders=1.03, arms=1.00, hands=1.03, head=(1.00, 0.97),
        space=1.00, tempo=1.02, undershoot=0.09,
        skin=(62, 88, 132), hair=(16, 16, 20), hair_style="short",
        clothes=(204, 198, 190), neckline="round", short_sleeves=True,
        background=((166, 184, 170), (206, 214, 206)), light=-0.6,
        glasses=False, beard=True,
    ),
    # The seventh signer occurs in test only.
    Signer(
        "Signer07", left_handed=False,
        shoulders=0.97, arms=1.02, hands=1.02, head=(0.99, 1.03),
        space=1.03, tempo=0.97, undershoot=0.11,
        skin=(112, 146, 200), hair=(40, 52, 96), hair_style="bun",
        clothes=(44, 36, 110), neckline="round", short_sleeves=False,
        background=((162, 160, 170), (210, 204, 206)), light=0.6,
        glasses=True,
    ),
)  # fmt: skip
SEEN, UNSEEN = SIGNERS[:-1], SIGNERS[-1]

# One hand of a pose: x, y, z, pointing (degrees), roll, 5 finger lengths, angles and
# curls, ring.
HAND = 21
XYZ = slice(0, 3)
POINT, ROLL = 3, 4
LENGTHS, ANGLES, CURLS = slice(5, 10), slice(10, 15), slice(15, 20)
RING = 20
# A pose: dominant hand, other hand, then mouth opening, mouth width, brows, nod, turn.
FACE = 2 * HAND
POSE = FACE + 5
_FRAME_EDGE = 78.0  # px from the midline beyond which a hand would leave the frame
_DEPTH = 52.0  # px between the body and a hand in signing space

# The mouth has the shape of the first vowel of the gloss: (opening, width), both 0 to 1.
_MOUTHS = {
    "A": (1.0, 0.6),
    "E": (0.45, 0.9),
    "I": (0.25, 1.0),
    "O": (0.8, 0.2),
    "U": (0.45, 0.1),
}
# Brows: 1 raised, -1 knit.
_BROWS = {
    "STARK": -1.0,
    "STURM": -1.0,
    "GEWITTER": -0.7,
    "KALT": -0.7,
    "FROST": -0.6,
    "TIEF": -0.5,
}
_BROWS |= {
    "MOEGLICH": 1.0,
    "ABER": 0.9,
    "HOCH": 0.8,
    "FREUNDLICH": 0.8,
    "SONNE": 0.7,
    "WENIG": 0.6,
}


# Fingers that point up or away from the body show the palm to the camera; fingers that
# point down or across the body show the back of the hand.
def _roll_for(point_deg: float) -> float:
    """Return the natural roll of the wrist (1 or -1) for a direction of the fingers."""
    return -1.0 if -45 < point_deg < 135 else 1.0


def _shape(name: str) -> Floats:
    """Return a handshape as the 16 finger numbers of a pose."""
    lengths, angles, curls, ring = HANDSHAPES[name]
    return np.array([*lengths, *angles, *curls, ring], dtype=np.float64)


def _hand(x: float, y: float, z: float, point_deg: float, shape: str) -> Floats:
    return np.concatenate([[x, y, z, point_deg, _roll_for(point_deg)], _shape(shape)])


# At rest, the hands are at the lower edge of the frame.
REST_HAND = _hand(34, 292, 30, -60, "flat")
REST_HAND[LENGTHS] *= 0.8


def rest_pose() -> Floats:
    """Return the pose (POSE,) with low hands and a neutral face."""
    return np.concatenate([REST_HAND, REST_HAND, [0.0, 0.5, 0.0, 0.0, 0.0]])


def sign_poses(sign: Sign, num_frames: int, space: float = 1.0) -> Floats:
    """Return the poses of the stroke of a sign, (num_frames, POSE).

    The x of the other hand is positive on its own side, so both hands are equal in a
    mirrored sign.
    """
    phase_N = np.linspace(0, 1, num_frames) if num_frames > 1 else np.array([1.0])
    offset_N3 = MOVEMENTS[sign.movement](phase_N)
    x, y = LOCATIONS[sign.location]
    poses_NP = np.tile(rest_pose(), (num_frames, 1))
    # The dominant hand: its movement, and its handshape, which may change.
    main_NP, other_NP = poses_NP[:, :HAND], poses_NP[:, HAND:FACE]
    main_NP[:] = _hand(x, y, _DEPTH, sign.point_deg, sign.handshape)
    main_NP[:, XYZ] += offset_N3
    if sign.end_handshape:
        # The handshape changes during the middle half of the stroke.
        ease_N = np.clip(phase_N * 2 - 0.5, 0, 1)[:, None]
        main_NP[:, 5:] += ease_N * (_shape(sign.end_handshape) - _shape(sign.handshape))
    # The other hand: at rest, still below the dominant one, or moving with it.
    if sign.hands == "base":
        shape = sign.other_handshape or "flat"
        other_NP[:] = _hand(-BASE_PALM[0] + 6, BASE_PALM[1], _DEPTH - 14, -80, shape)
        if sign.other_handshape:  # an upright finger to move towards
            other_NP[:, 0:4] = (52, 172, _DEPTH, 0)
            other_NP[:, ROLL] = _roll_for(0)
    elif sign.hands != "one":
        # x is positive on the own side of each hand: equal values are mirror images.
        other_NP[:] = main_NP
        if sign.hands == "alternate":
            other_NP[:, XYZ] -= 2 * offset_N3 * _ALTERNATE
            # Both hands go down in these movements: correct the reversed drift.
            if sign.movement in ("zigzag", "beat"):
                other_NP[:, 1] += 2 * phase_N * (118 if sign.movement == "zigzag" else 36)
        elif sign.hands == "parallel":
            other_NP[:, 0] -= 2 * offset_N3[:, 0]
        if sign.other_handshape:
            other_NP[:, 5:] = _shape(sign.other_handshape)
    # Scale to the signing space of the signer, within the frame.
    for hand_NP in (main_NP, other_NP):
        hand_NP[:, 0] = np.clip(hand_NP[:, 0] * space, -_FRAME_EDGE, _FRAME_EDGE)
        hand_NP[:, 1] = 150 + (hand_NP[:, 1] - 150) * space
    poses_NP[:, FACE:] = _face(sign.gloss)
    return poses_NP


_ALTERNATE = np.array([0.0, 1.0, 1.0])


def _face(gloss: str) -> Floats:
    """Return mouth (opening and width), brows, nod and turn of a sign."""
    vowel = next((letter for letter in gloss if letter in _MOUTHS), "E")
    brow = _BROWS.get(gloss, 0.0)
    return np.array([*_MOUTHS[vowel], brow, max(-brow, 0) * 0.8, 0.0])


def _transition(before_P: Floats, after_P: Floats, num_frames: int) -> Floats:
    """Return poses between two poses, (num_frames, POSE), on a smooth and curved path."""
    # Smoothstep: the speed is zero at both ends.
    phase_N = np.arange(1, num_frames + 1) / (num_frames + 1)
    ease_N1 = (phase_N * phase_N * (3 - 2 * phase_N))[:, None]
    poses_NP = before_P + ease_N1 * (after_P - before_P)
    # On a longer path, the hand rises more and comes closer to the camera half-way.
    for start in (0, HAND):
        travel = float(np.hypot(*(after_P - before_P)[start : start + 2]))
        bow_N = np.sin(np.pi * phase_N) * min(travel, 80) * 0.12
        poses_NP[:, start + 1] -= bow_N
        poses_NP[:, start + 2] += bow_N
    return poses_NP


def _coarticulate(strokes: list[Floats], undershoot: float) -> None:
    """Move the ends of each stroke towards its neighbours, in place.

    Hands do not quite reach their targets. undershoot: the share of the distance to the
    neighbour.
    """
    # Copy the ends: the strokes change below, but each needs its unchanged neighbours.
    ends = [(stroke[0].copy(), stroke[-1].copy()) for stroke in strokes]
    for index, stroke in enumerate(strokes):
        # The shift is largest at the end next to the neighbour and zero at the other end.
        phase_N1 = np.linspace(0, 1, len(stroke))[:, None]
        for start in (0, HAND):
            xyz = slice(start, start + 3)
            if index > 0:
                gap_P = ends[index - 1][1] - ends[index][0]
                stroke[:, xyz] += undershoot * (1 - phase_N1) * gap_P[xyz]
            if index + 1 < len(strokes):
                gap_P = ends[index + 1][0] - ends[index][1]
                stroke[:, xyz] += undershoot * phase_N1 * gap_P[xyz]


def _frames(rng: np.random.Generator, mean: float, tempo: float, least: int) -> int:
    """Draw a number of frames around mean / tempo, with random rounding."""
    return max(least, int(mean / tempo * rng.uniform(0.85, 1.15) + rng.random()))


def clip_poses(signs: list[Sign], signer: Signer, rng: np.random.Generator) -> Floats:
    """Return the poses of a clip, (F, POSE): from rest to the signs, and back to rest."""
    tempo = signer.tempo * rng.uniform(0.92, 1.08)
    # Compute each sign separately, with a small random shift.
    strokes = []
    for sign in signs:
        stroke_NP = sign_poses(sign, _frames(rng, 8.0, tempo, 5), signer.space)
        stroke_NP[:, 0:2] += rng.normal(0, 2.5, 2)
        stroke_NP[:, HAND : HAND + 2] += rng.normal(0, 2.5, 2)
        stroke_NP[:, [POINT, HAND + POINT]] += rng.normal(0, 5, 2)
        strokes.append(stroke_NP)
    # Join the signs, with transitions between them.
    _coarticulate(strokes, signer.undershoot)
    parts = [rest_pose()[None]]
    for stroke_NP in [*strokes, rest_pose()[None]]:
        parts.append(_transition(parts[-1][-1], stroke_NP[0], _frames(rng, 3.5, tempo, 2)))
        parts.append(stroke_NP)
    poses_FP = np.concatenate(parts)
    # A weighted mean of three frames smooths corners, as the mass of a hand does.
    padded = np.concatenate([poses_FP[:1], poses_FP, poses_FP[-1:]])
    poses_FP = 0.2 * padded[:-2] + 0.6 * padded[1:-1] + 0.2 * padded[2:]
    # Move the head: nod and turn.
    poses_FP[:, -2:] += _wander(rng, len(poses_FP), 0.5)
    return poses_FP


def _wander(rng: np.random.Generator, num_frames: int, size: float) -> Floats:
    """Return a slow random movement in two coordinates, (num_frames, 2), within +-size."""
    time_F1 = np.arange(num_frames)[:, None]
    return size * np.sin(
        time_F1 * rng.uniform(0.05, 0.16, 2) + rng.uniform(0, 2 * np.pi, 2)
    )
