"""Draw shapes into a frame with OpenCV: anti-aliased, with sub-pixel positions."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from flallm_ds.signsim.figure import ONE, SHIFT, Figure, Points
from flallm_ds.signsim.signer import Color
from flallm_ds.signsim.signs import Floats

Frame = NDArray[np.uint8]
"""(HEIGHT, WIDTH, 3); blue, green, red."""


# Coordinates are integers with SHIFT fractional bits (`fixed_point`), so that shapes can
# move by less than a pixel between frames.
@lru_cache(maxsize=4096)
def shade(color: Color, factor: float) -> Color:
    """Make a colour darker (factor < 1) or lighter. Cached: a frame calls it 30 times."""
    blue, green, red = (int(min(255, max(0, channel * factor))) for channel in color)
    return blue, green, red


def lit(person: Figure, color: Color) -> Color:
    """Return a colour in the light of the clip."""
    return shade(color, person.light)


def moved(points: Floats, dx: float, dy: float) -> Floats:
    """Move points (..., 2) by (dx, dy) px."""
    result: Floats = points + np.array((dx, dy))
    return result


def polygon(frame: Frame, points: Points, color: Color) -> None:
    cv2.fillPoly(frame, [points], color, cv2.LINE_AA, SHIFT)


def convex(frame: Frame, points: Points, color: Color) -> None:
    cv2.fillConvexPoly(frame, points, color, cv2.LINE_AA, SHIFT)


def disc(frame: Frame, center: Points, radius: float, color: Color) -> None:
    x, y = int(center[0]), int(center[1])
    cv2.circle(frame, (x, y), int(radius * ONE), color, -1, cv2.LINE_AA, SHIFT)


def line(frame: Frame, points: Points, color: Color, thickness: int) -> None:
    cv2.polylines(frame, [points], False, color, thickness, cv2.LINE_AA, SHIFT)


def ellipse(
    frame: Frame,
    center: Floats,
    axes: tuple[float, float],
    color: Color,
    thickness: int = -1,
) -> None:
    """Draw an ellipse. axes: half of the width and height, in px. thickness: -1 to fill."""
    at = (int(center[0] * ONE), int(center[1] * ONE))
    size = (max(1, int(axes[0] * ONE)), max(1, int(axes[1] * ONE)))
    cv2.ellipse(frame, at, size, 0, 0, 360, color, thickness, cv2.LINE_AA, SHIFT)
