"""Define the lexicon of the synthetic language: handshapes, locations, movements and signs.

Coordinates are in px of a 210x300 frame, for a standard signer who faces the camera: x from
the midline of the body, positive towards the dominant hand; y down from the top of the
frame. The face spans y 45 to 107; the shoulders are at y 135. Frames are squeezed to
210x260 later, as in PHOENIX14T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# For each handshape: five lengths (1 = stretched), five angles (degrees towards the
# thumb), five curls (degrees by which the outer half bends away from the thumb), and how
# far thumb and index finger close a ring (0 to 1).
_FLAT_ANGLES = (24, 3, 1, -1, -4)
_FIST = (0.45, 0.30, 0.32, 0.30, 0.26)
HANDSHAPES: dict[
    str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]
] = {
    "flat": ((0.8, 1, 1, 1, 1), _FLAT_ANGLES, (0,) * 5, 0.0),
    "spread": ((1.1, 1.05, 1.05, 1.05, 1.05), (66, 26, 5, -17, -40), (0,) * 5, 0.0),
    "fist": (_FIST, (-35, 0, 0, 0, 0), (0,) * 5, 0.0),
    "index": ((0.45, 1.2, 0.30, 0.28, 0.24), (-35, 2, 0, 0, 0), (0,) * 5, 0.0),
    "vee": ((0.45, 1.15, 1.15, 0.28, 0.24), (-35, 20, -16, 0, 0), (0,) * 5, 0.0),
    "ell": ((1.3, 1.2, 0.30, 0.28, 0.24), (84, 2, 0, 0, 0), (0,) * 5, 0.0),
    "wye": ((1.3, 0.28, 0.30, 0.28, 1.3), (72, 0, 0, 0, -46), (0,) * 5, 0.0),
    "horns": ((0.45, 1.15, 0.26, 0.26, 1.25), (-35, 14, 0, 0, -18), (0,) * 5, 0.0),
    "three": ((1.3, 1.15, 1.15, 0.28, 0.24), (76, 22, -12, 0, 0), (0,) * 5, 0.0),
    "thumb": ((1.5, 0.26, 0.28, 0.26, 0.22), (86, 0, 0, 0, 0), (0,) * 5, 0.0),
    "claw": (
        (1.0, 0.95, 0.95, 0.95, 0.95),
        (70, 40, 14, -18, -46),
        (-70, -62, -25, 30, 66),
        0.0,
    ),
    "ring": ((0.2, 0.2, 0.30, 0.28, 0.24), (30, 10, 0, 0, 0), (0,) * 5, 1.0),
}

# Position (x, y) of the dominant palm; in a two-handed sign, the other palm is at (-x, y).
LOCATIONS: dict[str, tuple[float, float]] = {
    "crown": (10, 38),
    "forehead": (-4, 54),
    "temple": (38, 70),
    "mouth": (8, 103),
    "high": (64, 54),
    "high-across": (-58, 72),
    "shoulder": (58, 130),
    "shoulder-across": (-40, 140),
    "chest": (8, 170),
    "ribs": (40, 165),
    "side": (62, 190),
    "across": (-54, 200),
    "belly": (10, 228),
    "waist": (50, 222),
    # On the palm of the other hand, which is at BASE_PALM.
    "palm": (-12, 182),
}
BASE_PALM = (-18.0, 202.0)

Path = Callable[[Floats], Floats]


def _path(dx: float, dy: float, dz: float = 0.0) -> Path:
    """Return a straight movement by (dx, dy, dz) px that stops for the last fifth."""

    def path(phase_N: Floats) -> Floats:
        # A quarter of a sine: fast first, then slower.
        eased_N = np.sin(np.clip(phase_N / 0.8, 0, 1) * np.pi / 2)
        return np.outer(eased_N, (dx, dy, dz))

    return path


def _wave(ax: float, ay: float, cycles: float, dx: float = 0.0, dy: float = 0.0) -> Path:
    """Return a swing with amplitude (ax, ay) px that drifts by (dx, dy) px."""

    def path(phase_N: Floats) -> Floats:
        swing_N = np.sin(2 * np.pi * cycles * phase_N)
        x_N, y_N = ax * swing_N + dx * phase_N, ay * swing_N + dy * phase_N
        return np.stack([x_N, y_N, 0 * phase_N], axis=1)

    return path


def _circle(radius: float, turns: float = 1.0) -> Path:
    """Return a circle of `radius` px around the location."""

    def path(phase_N: Floats) -> Floats:
        angle_N = 2 * np.pi * turns * phase_N
        return np.stack(
            [radius * np.sin(angle_N), -radius * np.cos(angle_N), 0 * angle_N], axis=1
        )

    return path


def _arc(dx: float, rise: float) -> Path:
    """Return an arc by dx px sideways that rises by `rise` px half-way."""

    def path(phase_N: Floats) -> Floats:
        bow_N = np.sin(np.pi * phase_N)
        return np.stack([dx * phase_N, -rise * bow_N, 25 * bow_N], axis=1)

    return path


# Offset (x, y, z) in px from the location at phases 0 to 1; z points to the camera.
MOVEMENTS: dict[str, Path] = {
    "hold": _path(0, 0),
    "up": _path(0, -62),
    "down": _path(0, 62),
    "out": _path(48, 0),
    "in": _path(-52, 0),
    "forward": _path(0, 8, 90),
    "rise": _path(112, -128),
    "fall": _path(112, 150),
    "roof": _path(58, 62),
    "smile": _path(34, -22),
    "cross": _path(-88, 52),
    "gather": _path(-40, 56),
    "arc": _arc(104, 46),
    "arc-out": _arc(52, 34),
    "shake": _wave(20, 0, 1.5),
    "tap": _wave(0, 15, 1.5),
    "beat": _wave(0, 26, 1.5, dy=36),
    "sweep": _wave(40, 0, 1.0),
    "zigzag": _wave(24, 0, 1.5, dy=118),
    "ripple": _wave(0, 14, 1.5, dx=84),
    "circle": _circle(24),
    "wheel": _circle(36),
}

HANDS = ("one", "mirror", "alternate", "parallel", "base")


@dataclass(frozen=True)
class Sign:
    """Hold one sign of the language."""

    gloss: str
    """Upper case, as in the `orth` column."""
    hands: str
    """One of HANDS: one hand; mirror images; mirror images with opposite movement; both
    hands in the same direction; the dominant hand on the still palm of the other."""
    handshape: str
    location: str
    movement: str
    point_deg: float = 0.0
    """Direction of the fingers: 0 up, 90 away from the body, 180 down, -90 across it."""
    end_handshape: str | None = None
    """Handshape at the end, if the hand opens or closes during the sign."""
    other_handshape: str | None = None
    """Handshape of the other hand, if it differs."""

    def __post_init__(self) -> None:
        shapes = {
            self.handshape,
            self.end_handshape or "flat",
            self.other_handshape or "flat",
        }
        assert shapes <= HANDSHAPES.keys(), self
        assert self.location in LOCATIONS and self.movement in MOVEMENTS, self
        assert self.hands in HANDS, self


# Similar signs would limit the score of every translator. A test checks the distance
# between any two signs.
_ALL_SIGNS = (
    # days
    Sign("MONTAG", "one", "fist", "mouth", "tap", -30),
    Sign("DIENSTAG", "one", "index", "mouth", "down", -40),
    Sign("MITTWOCH", "base", "index", "palm", "tap", 180),
    Sign("DONNERSTAG", "alternate", "fist", "ribs", "tap", 130),
    Sign("FREITAG", "one", "vee", "shoulder-across", "down", -50),
    Sign("SAMSTAG", "one", "wye", "chest", "up", 90),
    Sign("SONNTAG", "mirror", "flat", "chest", "up"),
    # times
    Sign("HEUTE", "mirror", "flat", "waist", "tap", 90),
    Sign("MORGEN", "one", "thumb", "temple", "arc-out", 10),
    Sign("NACHT", "mirror", "flat", "high", "cross", -50),
    Sign("FRUEH", "one", "fist", "across", "up", 0, "spread"),
    Sign("MITTAG", "one", "ring", "crown", "hold", 100),
    Sign("ABEND", "base", "ring", "high", "gather", 180),
    Sign("WOCHENENDE", "base", "flat", "palm", "arc", -90),
    # regions
    Sign("NORD", "one", "flat", "side", "up"),
    Sign("SUED", "one", "flat", "shoulder", "down", 180),
    Sign("WEST", "one", "flat", "chest", "in", -90),
    Sign("OST", "one", "flat", "ribs", "out", 90),
    Sign("MITTE", "one", "claw", "chest", "circle", 120),
    Sign("KUESTE", "base", "spread", "palm", "ripple", 60),
    Sign("ALPEN", "mirror", "flat", "crown", "roof", -40),
    Sign("BERG", "base", "claw", "palm", "circle", 0),
    Sign("RHEIN", "parallel", "flat", "shoulder", "zigzag", 180),
    Sign("HAELFTE", "mirror", "ell", "shoulder", "down"),
    Sign("DEUTSCHLAND", "one", "index", "forehead", "hold"),
    # weather
    Sign("REGEN", "mirror", "spread", "shoulder", "beat", 180),
    Sign("SCHNEE", "alternate", "ring", "high", "zigzag"),
    Sign("GEWITTER", "one", "index", "crown", "zigzag", 50),
    Sign("SCHAUER", "one", "spread", "high-across", "beat", 180),
    Sign("NEBEL", "alternate", "spread", "temple", "circle", -20),
    Sign("WIND", "parallel", "flat", "shoulder", "sweep", 10),
    Sign("STURM", "alternate", "claw", "ribs", "wheel"),
    Sign("SONNE", "one", "fist", "high", "hold", 100, "spread"),
    Sign("WOLKE", "mirror", "claw", "crown", "out"),
    Sign("FROST", "mirror", "spread", "waist", "up", 0, "fist"),
    # states
    Sign("KLAR", "mirror", "ring", "mouth", "out", 20, "spread"),
    Sign("WARM", "mirror", "spread", "belly", "up", -70),
    Sign("KALT", "mirror", "fist", "shoulder-across", "hold", -30),
    Sign("KUEHL", "mirror", "flat", "temple", "shake", -80),
    Sign("HEISS", "one", "flat", "forehead", "out", -90),
    Sign("TROCKEN", "one", "horns", "mouth", "out", 60),
    Sign("FREUNDLICH", "mirror", "index", "mouth", "smile", -40),
    # numbers
    Sign("FUENF", "one", "spread", "chest", "hold", 10),
    Sign("ACHT", "mirror", "spread", "high", "hold", 0, None, "three"),
    Sign("ZEHN", "mirror", "spread", "side", "forward", 150),
    Sign("FUENFZEHN", "one", "spread", "across", "tap", 150),
    Sign("ZWANZIG", "one", "ell", "side", "shake", 0),
    Sign("DREISSIG", "one", "three", "belly", "circle", 60),
    # quantities and connectors
    Sign("GRAD", "mirror", "ring", "chest", "forward", 100),
    Sign("MINUS", "one", "index", "belly", "out", -90),
    Sign("BIS", "base", "index", "side", "in", -90, None, "index"),
    Sign("ABER", "parallel", "wye", "waist", "sweep", 20),
    Sign("DANN", "one", "ell", "across", "arc", 60),
    Sign("MOEGLICH", "mirror", "wye", "ribs", "down", 150),
    Sign("MEHR", "base", "flat", "palm", "up", -90),
    Sign("STARK", "mirror", "fist", "side", "up", 0),
    Sign("SCHWACH", "mirror", "thumb", "side", "down", -90),
    Sign("VIEL", "mirror", "claw", "belly", "out", 60),
    Sign("WENIG", "one", "ell", "temple", "hold", 80, "fist"),
    # systems and changes
    Sign("HOCH", "parallel", "flat", "waist", "up", 60),
    Sign("TIEF", "mirror", "flat", "ribs", "down", -90),
    Sign("KOMMEN", "parallel", "index", "high", "in", -60),
    Sign("BLEIBEN", "mirror", "vee", "waist", "forward", 170),
    Sign("VERSCHWINDEN", "mirror", "spread", "shoulder", "gather", -20, "fist"),
    Sign("WECHSELN", "alternate", "vee", "ribs", "beat", -10),
    Sign("STEIGEN", "one", "index", "across", "rise", 20),
    Sign("SINKEN", "one", "index", "high-across", "fall", 140),
    Sign("AEHNLICH", "mirror", "horns", "ribs", "in", -40),
)
SIGNS: dict[str, Sign] = {sign.gloss: sign for sign in _ALL_SIGNS}
assert len(SIGNS) == len(_ALL_SIGNS), "two signs share a gloss"
