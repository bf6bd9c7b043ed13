"""Draw poses as 210x260 colour frames, with OpenCV.

Array suffixes: F frames, P numbers of a pose, C colour channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from flallm_ds.signsim.figure import (
    HEIGHT,
    WIDTH,
    Camera,
    Figure,
    HandGeometry,
    Limb,
    Points,
    figure,
    fixed_point,
)
from flallm_ds.signsim.head import draw_head
from flallm_ds.signsim.paint import Frame, convex, disc, ellipse, line, lit, polygon, shade
from flallm_ds.signsim.signer import Color, Signer
from flallm_ds.signsim.signs import Floats

_NOISE_TILES = 8
_NOISE_MARGIN = 64
_SHIRT = (226, 226, 228)


def render_clip(
    poses_FP: Floats, signer: Signer, rng: np.random.Generator
) -> Iterator[Frame]:
    """Yield the frames (HEIGHT, WIDTH, 3) of a clip in OpenCV's order: blue, green, red."""
    # Light, scale and position vary between the clips of a signer. Another order of the
    # draws would change the corpus.
    gain = rng.uniform(0.93, 1.06)
    camera = Camera(
        side=1.0 if signer.left_handed else -1.0,
        scale=rng.uniform(0.97, 1.03),
        shift=(rng.normal(0, 2.5), rng.normal(0, 2.0)),
    )
    person = figure(poses_FP, signer, camera, gain, rng)
    # Background and torso do not move: draw them once per clip.
    stage = make_background(signer, gain, rng)
    draw_torso(stage, person)
    for index in range(len(poses_FP)):
        yield add_noise(draw_frame(person, index, stage), rng)


def draw_frame(person: Figure, index: int, stage: Frame) -> Frame:
    """Draw frame `index` of a clip, before camera noise. stage: background and torso."""
    frame = stage.copy()
    draw_head(frame, person, index)
    signer = person.signer
    cloth, skin = lit(person, signer.clothes), lit(person, signer.skin)
    sleeve = skin if signer.short_sleeves else shade(cloth, 1.06)
    # Draw the dominant arm last: it covers the other one.
    for which in (1, 0):
        upper, fore = person.arms[which]
        draw_limb(frame, upper, index, cloth)
        draw_limb(frame, fore, index, sleeve)
        draw_hand(frame, person.hands[which], index, skin)
    return frame


def draw_limb(frame: Frame, shape: Limb, index: int, color: Color) -> None:
    """Draw one limb of frame `index` with a dark rim and a lit stripe."""
    # The rim separates the arm from the torso.
    rim = shade(color, 0.62)
    for extra, quad_FK, paint in (
        (0.9, shape.outline_FK, rim),
        (0.0, shape.body_FK, color),
    ):
        disc(frame, shape.start_F[index], shape.radii[0] + extra, paint)
        disc(frame, shape.end_F[index], shape.radii[1] + extra, paint)
        convex(frame, quad_FK[index], paint)
    convex(frame, shape.glow_FK[index], shade(color, 1.12))


def draw_hand(frame: Frame, hand: HandGeometry, index: int, skin: Color) -> None:
    """Draw one hand of frame `index`: palm, then each finger with its rim.

    The thumb is drawn last if it is in front of the palm.
    """
    rim = shade(skin, 0.55)
    size = float(hand.scale_F[index])
    wide, thick = max(3, round(8.2 * size)), max(2, round(6.0 * size))
    palm = hand.palm_FK[index]
    line(frame, np.concatenate([palm, palm[:1]]), rim, 2)
    # Draw from back to front: later shapes cover earlier ones.
    fingers = hand.fingers_F[index]
    order = (1, 2, 3, 4, 0) if hand.thumb_near_F[index] else (0, 4, 3, 2, 1)
    for finger in order[:-1]:
        line(frame, fingers[finger], rim, wide)
        line(frame, fingers[finger], skin, thick)
    polygon(frame, palm, skin)
    last = order[-1]
    line(frame, fingers[last], rim, wide)
    line(frame, fingers[last], skin, thick)
    # The ring of thumb and index finger, which straight fingers cannot show.
    if hand.ring_F[index] > 0.3:
        line(frame, hand.ring_FK[index], rim, wide)
        line(frame, hand.ring_FK[index], skin, thick)


def _mapped(camera: Camera, points: ArrayLike) -> Points:
    """Project points of the standard signer to the frame."""
    return fixed_point(camera.project(np.asarray(points, dtype=np.float64)))


def draw_torso(frame: Frame, person: Figure) -> None:
    """Draw neck, torso and collar, which do not move during a clip."""
    camera, signer = person.camera, person.signer
    # One half of the outline, from the neck to below the frame.
    w = signer.shoulders
    cloth, skin = lit(person, signer.clothes), lit(person, signer.skin)
    half = [
        (0, 118),
        (13, 120),
        (30 * w, 127),
        (45 * w, 133),
        (52 * w, 146),
        (48 * w, 180),
        (44 * w, 240),
        (46 * w, 320),
    ]
    # Down on one side, and up on the other.
    outline = np.concatenate([half, np.array(half)[::-1] * (-1, 1)])
    line(frame, _mapped(camera, outline), shade(cloth, 0.6), 3)
    polygon(frame, _mapped(camera, outline), cloth)
    flank = signer.light * camera.side  # the side away from the light is in shade
    away = -1.0 if flank > 0 else 1.0
    side = [
        (50 * w, 150),
        (47 * w, 180),
        (43 * w, 240),
        (45 * w, 320),
        (22 * w, 320),
        (24 * w, 240),
        (30 * w, 180),
        (38 * w, 150),
    ]
    shadow = np.array(side) * (away, 1)
    polygon(frame, _mapped(camera, shadow), shade(cloth, 0.86))
    # The neck, the collar over it, and the seam down the front.
    neck = [(-13, 92), (13, 92), (14, 124), (0, 134), (-14, 124)]
    convex(frame, _mapped(camera, neck), shade(skin, 0.80))
    _draw_collar(frame, person, cloth, skin)
    line(frame, _mapped(camera, [(0, 178), (1, 320)]), shade(cloth, 0.72), 1)


def _draw_collar(frame: Frame, person: Figure, cloth: Color, skin: Color) -> None:
    """Draw the neckline: a vee, a round, or lapels over a shirt."""
    camera, neckline = person.camera, person.signer.neckline
    if neckline == "vee":
        convex(frame, _mapped(camera, [(-15, 119), (15, 119), (0, 152)]), shade(skin, 0.93))
    elif neckline == "round":
        center = camera.project(np.array([0.0, 120.0]))
        ellipse(frame, center, (17 * camera.scale, 11 * camera.scale), shade(skin, 0.9))
    else:
        shirt = lit(person, _SHIRT)
        convex(frame, _mapped(camera, [(-13, 118), (13, 118), (0, 170)]), shirt)
        for side in (-1, 1):
            lapel = [(side * 14, 117), (side * 24, 126), (side * 18, 146), (0, 176)]
            polygon(frame, _mapped(camera, lapel), shade(cloth, 0.78))


def make_background(signer: Signer, gain: float, rng: np.random.Generator) -> Frame:
    """Draw the background: a gradient, a soft glow on the lit side, and darker corners."""
    top, bottom = np.array(signer.background, dtype=np.float64) * gain
    y = np.linspace(0, 1, HEIGHT)[:, None]
    x = np.linspace(-1, 1, WIDTH)[None, :]
    # One level of grey for each pixel.
    glow_x, glow_y = signer.light * 0.7 + rng.normal(0, 0.1), 0.3 + rng.normal(0, 0.05)
    distance = (x - glow_x) ** 2 + 2.5 * (y - glow_y) ** 2
    glow = 14 * np.exp(-distance / 0.5) - 16 * x**2 * (y - 0.5) ** 2
    level = top.mean() + (bottom - top).mean() * y + glow
    # The edge of a desk.
    level = np.where(y > 0.945, level * 0.72, level)
    # The colour is a constant integer offset: equal changes in all channels make PNG files
    # a third smaller.
    tint_C = np.rint((top + bottom) / 2 - (top + bottom).mean() / 2 + rng.normal(0, 2.5, 3))
    image: Frame = np.clip(np.rint(level)[..., None] + tint_C, 0, 255).astype(np.uint8)
    return image


@lru_cache(maxsize=1)
def _noise_tiles() -> list[tuple[Frame, Frame]]:
    """Return tiles of camera noise, larger than a frame: (values to add, to subtract).

    All channels are equal. The grain has 2x2 px, as in compressed video; single pixels
    would make PNG files larger by half.
    """
    # A fixed seed: all corpora share the tiles. Clips draw only the position of a window.
    rng = np.random.default_rng(20140)
    shape = ((HEIGHT + _NOISE_MARGIN) // 2, (WIDTH + _NOISE_MARGIN) // 2)
    tiles: list[tuple[Frame, Frame]] = []
    for _ in range(_NOISE_TILES):
        grain: NDArray[np.int16] = np.rint(rng.normal(0, 1.3, shape)).astype(np.int16)
        noise = grain.repeat(2, axis=0).repeat(2, axis=1)[..., None].repeat(3, axis=2)
        more = np.maximum(noise, 0).astype(np.uint8)
        less = np.maximum(-noise, 0).astype(np.uint8)
        tiles.append((more, less))
    return tiles


def add_noise(frame: Frame, rng: np.random.Generator) -> Frame:
    """Add a random window of a noise tile to the frame, in place."""
    # Two saturated uint8 operations are cheaper than drawing noise for every pixel.
    more, less = _noise_tiles()[int(rng.integers(_NOISE_TILES))]
    y, x = rng.integers(0, _NOISE_MARGIN, 2)
    window = (slice(y, y + HEIGHT), slice(x, x + WIDTH))
    cv2.add(frame, more[window], dst=frame)
    cv2.subtract(frame, less[window], dst=frame)
    return frame
