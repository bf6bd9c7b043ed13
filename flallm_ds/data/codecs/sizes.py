"""Compute the sizes and boxes of frames in pixels, and scale frames."""

import cv2
import numpy as np

# pixels to remove at the top, right, bottom and left of the upright picture
Margin = tuple[int, int, int, int]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1, each 0 to 1 of width or height


def fitted_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side scaled down to `short_side`."""
    scale = short_side / min(height, width)
    if scale >= 1:
        return height, width  # a larger picture has more bytes and the same information
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_short_side(frame: np.ndarray, short_side: int) -> np.ndarray:
    """Return the frame with its shorter side scaled down to `short_side` pixels."""
    height, width = fitted_size(frame.shape[0], frame.shape[1], short_side)
    return resize(frame, height, width)


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the frame with this size, resampled if it differs."""
    if (height, width) == frame.shape[:2]:
        return frame
    # INTER_AREA averages, without aliasing; for enlarging it would only repeat pixels.
    smaller = height <= frame.shape[0] and width <= frame.shape[1]
    kind = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(frame, (width, height), interpolation=kind)
    return scaled


def box_px(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a box in pixels, at least one pixel large."""
    left = min(int(box[0] * width), width - 1)
    top = min(int(box[1] * height), height - 1)
    right = max(round(box[2] * width), left + 1)
    bottom = max(round(box[3] * height), top + 1)
    return left, top, right, bottom
