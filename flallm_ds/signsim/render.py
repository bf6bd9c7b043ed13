"""Draw poses as 210x260 colour frames, with OpenCV.

Array suffixes: F frames, P numbers of a pose, C colour channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from flallm_ds.signsim.figure import (
    HEIGHT,
    ONE,
    SHIFT,
    SQUEEZE,
    WIDTH,
    Camera,
    Figure,
    HandGeometry,
    Limb,
    Points,
    figure,
    fixed_point,
)
from flallm_ds.signsim.signer import Color, Signer
from flallm_ds.signsim.signs import Floats

Frame = NDArray[np.uint8]

_NOISE_TILES = 8
_NOISE_MARGIN = 64
_DARK, _EYE, _MOUTH, _SHIRT = (34, 30, 34), (236, 238, 240), (40, 34, 70), (226, 226, 228)
# Around the eye's centre, and around the face's.
_BROW = np.array([(-5.2, 0.9), (0.0, -0.9), (5.2, 0.9)])
_SHUT_EYE = np.array([(-4.0, 0.5), (0.0, 1.4), (4.0, 0.5)])
_NOSE = np.array([(0.6, -1.0), (2.6, 6.5), (-1.2, 7.2)])


@lru_cache(maxsize=4096)
def shade(color: Color, factor: float) -> Color:
    """A colour made darker (factor < 1) or lighter. Cached: a frame asks some thirty times."""
    blue, green, red = (int(min(255, max(0, channel * factor))) for channel in color)
    return blue, green, red


def _lit(person: Figure, color: Color) -> Color:
    """A colour in the clip's light."""
    return shade(color, person.light)


def _at(points: Floats, dx: float, dy: float) -> Floats:
    """Points (..., 2) moved by (dx, dy) px."""
    moved: Floats = points + np.array((dx, dy))
    return moved


def _poly(frame: Frame, points: Points, color: Color) -> None:
    cv2.fillPoly(frame, [points], color, cv2.LINE_AA, SHIFT)


def _convex(frame: Frame, points: Points, color: Color) -> None:
    cv2.fillConvexPoly(frame, points, color, cv2.LINE_AA, SHIFT)


def _disc(frame: Frame, center: Points, radius: float, color: Color) -> None:
    x, y = int(center[0]), int(center[1])
    cv2.circle(frame, (x, y), int(radius * ONE), color, -1, cv2.LINE_AA, SHIFT)


def _line(frame: Frame, points: Points, color: Color, thickness: int) -> None:
    cv2.polylines(frame, [points], False, color, thickness, cv2.LINE_AA, SHIFT)


def draw_limb(frame: Frame, shape: Limb, index: int, color: Color) -> None:
    """One limb of frame `index` with a dark rim and a lit stripe."""
    rim = shade(color, 0.62)
    for extra, quad_FK, paint in ((0.9, shape.outline_FK, rim), (0.0, shape.body_FK, color)):
        _disc(frame, shape.start_F[index], shape.radii[0] + extra, paint)
        _disc(frame, shape.end_F[index], shape.radii[1] + extra, paint)
        _convex(frame, quad_FK[index], paint)
    _convex(frame, shape.glow_FK[index], shade(color, 1.12))


def draw_hand(frame: Frame, hand: HandGeometry, index: int, skin: Color) -> None:
    """One hand of frame `index`: palm, then each finger with its rim, the thumb on the camera's side last."""
    rim = shade(skin, 0.55)
    size = float(hand.scale_F[index])
    wide, thick = max(3, round(8.2 * size)), max(2, round(6.0 * size))
    palm = hand.palm_FK[index]
    _line(frame, np.concatenate([palm, palm[:1]]), rim, 2)
    fingers = hand.fingers_F[index]
    order = (1, 2, 3, 4, 0) if hand.thumb_near_F[index] else (0, 4, 3, 2, 1)
    for finger in order[:-1]:
        _line(frame, fingers[finger], rim, wide)
        _line(frame, fingers[finger], skin, thick)
    _poly(frame, palm, skin)
    last = order[-1]
    _line(frame, fingers[last], rim, wide)
    _line(frame, fingers[last], skin, thick)
    if hand.ring_F[index] > 0.3:
        _line(frame, hand.ring_FK[index], rim, wide)
        _line(frame, hand.ring_FK[index], skin, thick)


def _ellipse(frame: Frame, center: Floats, axes: tuple[float, float], color: Color, width: int = -1) -> None:
    at = (int(center[0] * ONE), int(center[1] * ONE))
    size = (max(1, int(axes[0] * ONE)), max(1, int(axes[1] * ONE)))
    cv2.ellipse(frame, at, size, 0, 0, 360, color, width, cv2.LINE_AA, SHIFT)


def _mapped(camera: Camera, points: Sequence[tuple[float, float]]) -> Points:
    return fixed_point(camera.project(np.array(points, dtype=np.float64)))


def draw_torso(frame: Frame, person: Figure) -> None:
    """Neck, torso and collar; they keep still, so a clip draws them once, onto its background."""
    camera, signer = person.camera, person.signer
    w = signer.shoulders
    cloth, skin = _lit(person, signer.clothes), _lit(person, signer.skin)
    half = [(0, 118), (13, 120), (30 * w, 127), (45 * w, 133), (52 * w, 146), (48 * w, 180), (44 * w, 240)]
    half += [(46 * w, 320)]
    outline = half + [(-x, y) for x, y in reversed(half)]
    _line(frame, _mapped(camera, outline), shade(cloth, 0.6), 3)
    _poly(frame, _mapped(camera, outline), cloth)
    flank = signer.light * camera.side  # the side away from the light lies in shade
    away = -1.0 if flank > 0 else 1.0
    shadow = [(away * x, y) for x, y in ((50 * w, 150), (47 * w, 180), (43 * w, 240), (45 * w, 320))]
    shadow += [(away * x, y) for x, y in ((22 * w, 320), (24 * w, 240), (30 * w, 180), (38 * w, 150))]
    _poly(frame, _mapped(camera, shadow), shade(cloth, 0.86))
    _convex(frame, _mapped(camera, [(-13, 92), (13, 92), (14, 124), (0, 134), (-14, 124)]), shade(skin, 0.80))
    if signer.neckline == "vee":
        _convex(frame, _mapped(camera, [(-15, 119), (15, 119), (0, 152)]), shade(skin, 0.93))
    elif signer.neckline == "round":
        _ellipse(
            frame,
            camera.project(np.array([0.0, 120.0])),
            (17 * camera.scale, 11 * camera.scale),
            shade(skin, 0.9),
        )
    else:
        shirt = _lit(person, _SHIRT)
        _convex(frame, _mapped(camera, [(-13, 118), (13, 118), (0, 170)]), shirt)
        for side in (-1, 1):
            lapel = [(side * 14, 117), (side * 24, 126), (side * 18, 146), (0, 176)]
            _poly(frame, _mapped(camera, lapel), shade(cloth, 0.78))
    _line(frame, _mapped(camera, [(0, 178), (1, 320)]), shade(cloth, 0.72), 1)


def _head_center(person: Figure, index: int) -> tuple[Floats, Floats]:
    """Centre of the head and shift of the face upon it, both in frame px."""
    nod, turn = person.face_FP[index, 3], person.face_FP[index, 4]
    center = person.camera.project(np.array([turn * 1.5, 76 + nod * 2.0]))
    return center, np.array([person.camera.side * turn * 2.5, nod * 2.5])


def draw_head(frame: Frame, person: Figure, index: int) -> None:
    """Hair, head and face of frame `index`."""
    signer, scale = person.signer, person.camera.scale
    skin, hair = _lit(person, signer.skin), _lit(person, signer.hair)
    center, shift = _head_center(person, index)
    rx, ry = 23.5 * signer.head[0] * scale, 31 * signer.head[1] * scale * SQUEEZE
    _hair_behind(frame, person, center, (rx, ry), hair)
    for side in (-1, 1):
        _ellipse(frame, _at(center, side * rx * 0.98, 2), (3.6 * scale, 6 * scale), shade(skin, 0.82))
    _ellipse(frame, center, (rx + 1, ry + 1), shade(skin, 0.62))
    _ellipse(frame, center, (rx, ry), shade(skin, 0.88))
    _ellipse(frame, _at(center, signer.light * 2.2, -0.8), (rx - 2.6, ry - 1.6), skin)
    if signer.beard:
        _ellipse(frame, _at(center + shift, 0, ry * 0.62), (rx * 0.72, ry * 0.42), shade(hair, 1.15))
        _ellipse(frame, _at(center + shift, 0, ry * 0.34), (rx * 0.78, ry * 0.28), skin)
    _hair_above(frame, person, center, (rx, ry), hair)
    _face(frame, person, index, center + shift)


def _hair_behind(
    frame: Frame, person: Figure, center: Floats, axes: tuple[float, float], hair: Color
) -> None:
    rx, ry = axes
    style = person.signer.hair_style
    if style == "bun":
        _ellipse(frame, _at(center, 0, -ry * 1.18), (rx * 0.5, ry * 0.34), hair)
    if style in ("long", "bob"):
        drop = 1.55 if style == "long" else 0.72
        _ellipse(frame, _at(center, 0, -ry * 0.12), (rx * 1.24, ry * 1.1), shade(hair, 0.8))
        corners = [
            (-1.22, -0.1),
            (1.22, -0.1),
            (1.3, drop),
            (0.55, drop + 0.1),
            (-0.55, drop + 0.1),
            (-1.3, drop),
        ]
        _poly(frame, fixed_point(center + np.array(corners) * (rx, ry)), shade(hair, 0.8))


def _hair_above(frame: Frame, person: Figure, center: Floats, axes: tuple[float, float], hair: Color) -> None:
    """A cap of hair that leaves the forehead free."""
    rx, ry = axes
    if person.signer.hair_style == "bald":
        for side in (-1, 1):
            _ellipse(frame, _at(center, side * rx * 0.93, -ry * 0.12), (rx * 0.12, ry * 0.3), hair)
        return
    turn = np.linspace(np.pi * 1.06, np.pi * 1.94, 13)
    top = np.stack([np.cos(turn) * 1.1, np.sin(turn) * 1.14], axis=1)
    part = 0.25 * person.camera.side
    fringe = np.array(
        [(1.0, -0.30), (0.82, -0.52), (part + 0.2, -0.66), (part, -0.56), (-0.8, -0.46), (-1.0, -0.28)]
    )
    _poly(frame, fixed_point(center + np.concatenate([top, fringe]) * (rx, ry)), hair)
    shine = np.stack([np.cos(turn[3:10]) * 0.8, np.sin(turn[3:10]) * 0.96], axis=1)
    _line(frame, fixed_point(center + shine * (rx, ry)), shade(hair, 1.35), 2)


def _face(frame: Frame, person: Figure, index: int, center: Floats) -> None:
    scale, skin = person.camera.scale, _lit(person, person.signer.skin)
    for side in (-1, 1):
        _eye(frame, person, index, _at(center, side * 9.0 * scale, -3.0 * scale), side)
    if person.signer.glasses:
        bridge = center + np.array([(-2.0, -3.4), (2.0, -3.4)])
        _line(frame, fixed_point(bridge), _lit(person, _DARK), 1)
    _line(frame, fixed_point(center + _NOSE * scale), shade(skin, 0.72), 1)
    opening, wide = (float(value) for value in person.face_FP[index, :2])
    mouth = _at(center, 0, 14.5 * scale)
    half = (5.0 + 3.6 * wide) * scale
    lip: Color = (int(skin[0] * 0.62), int(skin[1] * 0.58), int(skin[2] * 0.86))
    _ellipse(frame, mouth, (half, (1.9 + 3.2 * opening) * scale), lip)
    if opening > 0.12:
        _ellipse(frame, _at(mouth, 0, 0.3), (half * 0.74, 2.7 * opening * scale), _MOUTH)


def _eye(frame: Frame, person: Figure, index: int, eye: Floats, side: int) -> None:
    """An eye with its brow and glass; side: -1 for the one at the frame's left."""
    scale, dark = person.camera.scale, _lit(person, _DARK)
    if person.blink_F[index]:
        _line(frame, fixed_point(eye + _SHUT_EYE), shade(_lit(person, person.signer.skin), 0.5), 1)
    else:
        _ellipse(frame, eye, (4.4 * scale, 2.9 * scale), _lit(person, _EYE))
        _disc(frame, fixed_point(eye), 2.3 * scale, dark)
    brow = float(person.face_FP[index, 2])
    bow = _at(_BROW, 0, (-8.2 - 2.4 * brow) * scale)
    bow[0 if side > 0 else 2, 1] -= 1.6 * min(brow, 0)  # knit brows slant towards the nose
    _line(frame, fixed_point(eye + bow), shade(_lit(person, person.signer.hair), 0.8), 2)
    if person.signer.glasses:
        _ellipse(frame, eye, (7.2 * scale, 5.6 * scale), dark, 1)


def make_background(signer: Signer, gain: float, rng: np.random.Generator) -> Frame:
    """The studio behind a signer: a gradient, a soft glow on the light's side, and darker corners."""
    top, bottom = (np.array(color, dtype=np.float64) * gain for color in signer.background)
    y = np.linspace(0, 1, HEIGHT)[:, None]
    x = np.linspace(-1, 1, WIDTH)[None, :]
    glow_x, glow_y = signer.light * 0.7 + rng.normal(0, 0.1), 0.3 + rng.normal(0, 0.05)
    glow = 14 * np.exp(-((x - glow_x) ** 2 + 2.5 * (y - glow_y) ** 2) / 0.5) - 16 * x**2 * (y - 0.5) ** 2
    level = top.mean() + (bottom - top).mean() * y + glow
    level = np.where(y > 0.945, level * 0.72, level)  # a desk's edge, as the studio has one
    # Colour is a constant whole offset: channels that move together make PNG files a third smaller.
    tint_C = np.rint((top + bottom) / 2 - (top + bottom).mean() / 2 + rng.normal(0, 2.5, 3))
    image: Frame = np.clip(np.rint(level)[..., None] + tint_C, 0, 255).astype(np.uint8)
    return image


@lru_cache(maxsize=1)
def _noise_tiles() -> list[tuple[Frame, Frame]]:
    """Camera noise in tiles larger than a frame, each as what it adds and what it takes; all channels alike.

    The grain is 2x2 px, as compressed video has it; single pixels would make PNG files a half larger.
    """
    rng = np.random.default_rng(20140)
    tiles: list[tuple[Frame, Frame]] = []
    for _ in range(_NOISE_TILES):
        grain = rng.normal(0, 1.3, ((HEIGHT + _NOISE_MARGIN) // 2, (WIDTH + _NOISE_MARGIN) // 2))
        noise: NDArray[np.int16] = np.rint(grain).astype(np.int16).repeat(2, axis=0).repeat(2, axis=1)
        more, less = (np.maximum(sign * noise, 0).astype(np.uint8)[..., None] for sign in (1, -1))
        tiles.append((more.repeat(3, axis=2), less.repeat(3, axis=2)))
    return tiles


def add_noise(frame: Frame, rng: np.random.Generator) -> Frame:
    """Lay a random stretch of a noise tile over the frame, in place."""
    more, less = _noise_tiles()[int(rng.integers(_NOISE_TILES))]
    y, x = rng.integers(0, _NOISE_MARGIN, 2)
    window = (slice(y, y + HEIGHT), slice(x, x + WIDTH))
    cv2.add(frame, more[window], dst=frame)
    cv2.subtract(frame, less[window], dst=frame)
    return frame


def draw_frame(person: Figure, index: int, stage: Frame) -> Frame:
    """Frame `index` of a clip, before camera noise. `stage` holds background and torso."""
    frame = stage.copy()
    draw_head(frame, person, index)
    signer = person.signer
    cloth, skin = _lit(person, signer.clothes), _lit(person, signer.skin)
    for which in (1, 0):
        upper, fore = person.arms[which]
        draw_limb(frame, upper, index, cloth)
        draw_limb(frame, fore, index, skin if signer.short_sleeves else shade(cloth, 1.06))
        draw_hand(frame, person.hands[which], index, skin)
    return frame


def render_clip(poses_FP: Floats, signer: Signer, rng: np.random.Generator) -> Iterator[Frame]:
    """The frames (HEIGHT, WIDTH, 3; blue green red) of a clip, one by one."""
    gain = rng.uniform(0.93, 1.06)
    camera = Camera(
        side=1.0 if signer.left_handed else -1.0,
        scale=rng.uniform(0.97, 1.03),
        shift=(rng.normal(0, 2.5), rng.normal(0, 2.0)),
    )
    person = figure(poses_FP, signer, camera, gain, rng)
    stage = make_background(signer, gain, rng)
    draw_torso(stage, person)
    for index in range(len(poses_FP)):
        yield add_noise(draw_frame(person, index, stage), rng)
