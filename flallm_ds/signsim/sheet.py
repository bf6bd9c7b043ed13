"""Draw a labelled contact sheet of all signs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from flallm_ds.errors import UserError
from flallm_ds.signsim.figure import Camera, figure
from flallm_ds.signsim.paint import Frame
from flallm_ds.signsim.render import draw_frame, draw_torso, make_background
from flallm_ds.signsim.signer import SIGNERS, Signer, sign_poses
from flallm_ds.signsim.signs import SIGNS, Sign

_COLUMNS = 6  # also the number of signers
_CELL = (84, 104)  # width and height of one keyframe
_LABEL_PX = 18
_PHASES = 9
# Indices into a stroke of _PHASES poses. The outer two are the extremes of a swing.
_KEYFRAMES = (1, 4, 7)


def keyframes(sign: Sign, signer: Signer) -> list[Frame]:
    """Draw three phases of a sign, (HEIGHT, WIDTH, 3) each, without jitter and noise."""
    poses_FP = sign_poses(sign, _PHASES, signer.space)
    person = figure(poses_FP, signer, Camera(side=1.0 if signer.left_handed else -1.0))
    stage = make_background(signer, 1.0, np.random.default_rng(0))
    draw_torso(stage, person)
    return [draw_frame(person, index, stage) for index in _KEYFRAMES]


def _cell(sign: Sign, signer: Signer) -> Frame:
    """Return the three phases of a sign in a row, below the gloss."""
    shrunk = []
    for frame in keyframes(sign, signer):
        shrunk.append(cv2.resize(frame, _CELL, interpolation=cv2.INTER_AREA))
    label = np.full((_LABEL_PX, 3 * _CELL[0], 3), 255, dtype=np.uint8)
    font, gray = cv2.FONT_HERSHEY_SIMPLEX, (40, 40, 40)
    cv2.putText(label, sign.gloss, (3, 13), font, 0.42, gray, 1, cv2.LINE_AA)
    cell = np.vstack([label, np.hstack(shrunk)])
    return np.pad(cell, ((0, 4), (3, 3), (0, 0)), constant_values=255)


def write_sheet(path: Path) -> Path:
    """Write the contact sheet of all signs as a PNG. Each column has another signer.

    Raises UserError if the file cannot be written.
    """
    cells = []
    for index, sign in enumerate(SIGNS.values()):
        cells.append(_cell(sign, SIGNERS[index % _COLUMNS]))
    # Fill the last row with white cells.
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % _COLUMNS)
    # Join the cells of each row.
    rows = []
    for start in range(0, len(cells), _COLUMNS):
        rows.append(np.hstack(cells[start : start + _COLUMNS]))
    encoded, png = cv2.imencode(".png", np.vstack(rows))
    assert encoded
    try:
        path.write_bytes(png.tobytes())
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Set --out to a file in an existing "
            "folder."
        ) from error
    return path
