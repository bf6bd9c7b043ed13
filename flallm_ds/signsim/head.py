"""Draw the head of a signer: hair, face, eyes and mouth.

Array suffixes: F frames, P numbers of a pose.
"""

from __future__ import annotations

import numpy as np

from flallm_ds.signsim.figure import SQUEEZE, Figure, fixed_point
from flallm_ds.signsim.paint import Frame, disc, ellipse, line, lit, moved, polygon, shade
from flallm_ds.signsim.signer import Color
from flallm_ds.signsim.signs import Floats

_DARK, _EYE, _MOUTH = (34, 30, 34), (236, 238, 240), (40, 34, 70)
# Points relative to the centre of the eye (brow, shut eye) or of the face (nose).
_BROW = np.array([(-5.2, 0.9), (0.0, -0.9), (5.2, 0.9)])
_SHUT_EYE = np.array([(-4.0, 0.5), (0.0, 1.4), (4.0, 0.5)])
_NOSE = np.array([(0.6, -1.0), (2.6, 6.5), (-1.2, 7.2)])


def draw_head(frame: Frame, person: Figure, index: int) -> None:
    """Draw hair, head and face of frame `index`."""
    signer, scale = person.signer, person.camera.scale
    skin, hair = lit(person, signer.skin), lit(person, signer.hair)
    center, shift = _head_center(person, index)
    # Half of the width and height of the head, in px.
    rx, ry = 23.5 * signer.head[0] * scale, 31 * signer.head[1] * scale * SQUEEZE
    _hair_behind(frame, person, center, (rx, ry), hair)
    # Ears, then three ellipses of the head: a dark rim, shaded skin, and lit skin on the
    # side of the light.
    ear = (3.6 * scale, 6 * scale)
    for side in (-1, 1):
        ellipse(frame, moved(center, side * rx * 0.98, 2), ear, shade(skin, 0.82))
    ellipse(frame, center, (rx + 1, ry + 1), shade(skin, 0.62))
    ellipse(frame, center, (rx, ry), shade(skin, 0.88))
    ellipse(frame, moved(center, signer.light * 2.2, -0.8), (rx - 2.6, ry - 1.6), skin)
    # A full beard, with skin around the mouth.
    face = center + shift
    if signer.beard:
        ellipse(frame, moved(face, 0, ry * 0.62), (rx * 0.72, ry * 0.42), shade(hair, 1.15))
        ellipse(frame, moved(face, 0, ry * 0.34), (rx * 0.78, ry * 0.28), skin)
    _hair_above(frame, person, center, (rx, ry), hair)
    _face(frame, person, index, face)


def _head_center(person: Figure, index: int) -> tuple[Floats, Floats]:
    """Return (centre of the head, shift of the face on the head), both in frame px."""
    # The face moves further than the head: this makes a flat drawing look as if it turns.
    nod, turn = person.face_FP[index, 3], person.face_FP[index, 4]
    center = person.camera.project(np.array([turn * 1.5, 76 + nod * 2.0]))
    return center, np.array([person.camera.side * turn * 2.5, nod * 2.5])


def _hair_behind(
    frame: Frame,
    person: Figure,
    center: Floats,
    axes: tuple[float, float],
    hair: Color,
) -> None:
    """Draw the hair behind the head. axes: half of the head's width and height, in px."""
    rx, ry = axes
    style = person.signer.hair_style
    if style == "bun":
        ellipse(frame, moved(center, 0, -ry * 1.18), (rx * 0.5, ry * 0.34), hair)
    # A round top, and hair down to the shoulders or to the chin.
    if style in ("long", "bob"):
        drop = 1.55 if style == "long" else 0.72
        ellipse(
            frame, moved(center, 0, -ry * 0.12), (rx * 1.24, ry * 1.1), shade(hair, 0.8)
        )
        corners = [
            (-1.22, -0.1),
            (1.22, -0.1),
            (1.3, drop),
            (0.55, drop + 0.1),
            (-0.55, drop + 0.1),
            (-1.3, drop),
        ]
        polygon(frame, fixed_point(center + np.array(corners) * (rx, ry)), shade(hair, 0.8))


def _hair_above(
    frame: Frame,
    person: Figure,
    center: Floats,
    axes: tuple[float, float],
    hair: Color,
) -> None:
    """Draw the hair above the forehead, or at the temples only.

    axes: half of the head's width and height, in px.
    """
    rx, ry = axes
    # Hair at the temples only.
    if person.signer.hair_style == "bald":
        for side in (-1, 1):
            at = moved(center, side * rx * 0.93, -ry * 0.12)
            ellipse(frame, at, (rx * 0.12, ry * 0.3), hair)
        return
    # The outline: over the top of the head, then back along the forehead, with a parting.
    # Its points are multiples of the axes.
    turn = np.linspace(np.pi * 1.06, np.pi * 1.94, 13)
    top = np.stack([np.cos(turn) * 1.1, np.sin(turn) * 1.14], axis=1)
    part = 0.25 * person.camera.side
    forehead = [
        (1.0, -0.30),
        (0.82, -0.52),
        (part + 0.2, -0.66),
        (part, -0.56),
        (-0.8, -0.46),
        (-1.0, -0.28),
    ]
    outline = np.concatenate([top, np.array(forehead)])
    polygon(frame, fixed_point(center + outline * (rx, ry)), hair)
    # A lighter line follows the top of the head.
    shine = np.stack([np.cos(turn[3:10]) * 0.8, np.sin(turn[3:10]) * 0.96], axis=1)
    line(frame, fixed_point(center + shine * (rx, ry)), shade(hair, 1.35), 2)


def _face(frame: Frame, person: Figure, index: int, center: Floats) -> None:
    """Draw eyes, glasses, nose and mouth. center: centre of the face."""
    scale, skin = person.camera.scale, lit(person, person.signer.skin)
    for side in (-1, 1):
        _eye(frame, person, index, moved(center, side * 9.0 * scale, -3.0 * scale), side)
    if person.signer.glasses:
        bridge = center + np.array([(-2.0, -3.4), (2.0, -3.4)])
        line(frame, fixed_point(bridge), lit(person, _DARK), 1)
    line(frame, fixed_point(center + _NOSE * scale), shade(skin, 0.72), 1)
    # The lips, and the dark opening of the mouth if it is open.
    opening, wide = float(person.face_FP[index, 0]), float(person.face_FP[index, 1])
    mouth = moved(center, 0, 14.5 * scale)
    half = (5.0 + 3.6 * wide) * scale
    lip: Color = (int(skin[0] * 0.62), int(skin[1] * 0.58), int(skin[2] * 0.86))
    ellipse(frame, mouth, (half, (1.9 + 3.2 * opening) * scale), lip)
    if opening > 0.12:
        ellipse(frame, moved(mouth, 0, 0.3), (half * 0.74, 2.7 * opening * scale), _MOUTH)


def _eye(frame: Frame, person: Figure, index: int, eye: Floats, side: int) -> None:
    """Draw an eye with brow and glasses. side: -1 for the eye in the left half."""
    scale, dark = person.camera.scale, lit(person, _DARK)
    if person.blink_F[index]:
        lid = shade(lit(person, person.signer.skin), 0.5)
        line(frame, fixed_point(eye + _SHUT_EYE), lid, 1)
    else:
        ellipse(frame, eye, (4.4 * scale, 2.9 * scale), lit(person, _EYE))
        disc(frame, fixed_point(eye), 2.3 * scale, dark)
    # A raised brow is drawn higher.
    brow = float(person.face_FP[index, 2])
    bow = moved(_BROW, 0, (-8.2 - 2.4 * brow) * scale)
    # Knit brows slant towards the nose.
    bow[0 if side > 0 else 2, 1] -= 1.6 * min(brow, 0)
    line(frame, fixed_point(eye + bow), shade(lit(person, person.signer.hair), 0.8), 2)
    if person.signer.glasses:
        ellipse(frame, eye, (7.2 * scale, 5.6 * scale), dark, 1)
