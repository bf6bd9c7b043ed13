"""A labelled contact sheet of all signs."""

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

_COLUMNS = 6  # also the number of signers that are shown
_CELL = (84, 104)  # width and height of one keyframe
_LABEL_PX = 18
_PHASES = 9
# of a stroke of _PHASES poses; a swing is at its extremes in the outer two
_KEYFRAMES = (1, 4, 7)


def keyframes(sign: Sign, signer: Signer) -> list[Frame]:
    """Draw three phases of a sign, (HEIGHT, WIDTH, 3) each, without jitter or camera noise."""
    poses_FP = sign_poses(sign, _PHASES, signer.space)
    person = figure(poses_FP, signer, Camera(side=1.0 if signer.left_handed else -1.0))
    stage = make_background(signer, 1.0, np.random.default_rng(0))
    draw_torso(stage, person)
    return [draw_frame(person, index, stage) for index in _KEYFRAMES]


def _cell(sign: Sign, signer: Signer) -> Frame:
    """Return the three phases of a sign side by side, below its gloss."""
    # The phases in a row, the label above, and a white margin around.
    shrunk = []
    for frame in keyframes(sign, signer):
        shrunk.append(cv2.resize(frame, _CELL, interpolation=cv2.INTER_AREA))
    label = np.full((_LABEL_PX, 3 * _CELL[0], 3), 255, dtype=np.uint8)
    font, gray = cv2.FONT_HERSHEY_SIMPLEX, (40, 40, 40)
    cv2.putText(label, sign.gloss, (3, 13), font, 0.42, gray, 1, cv2.LINE_AA)
    cell = np.vstack([label, np.hstack(shrunk)])
    return np.pad(cell, ((0, 4), (3, 3), (0, 0)), constant_values=255)


def write_sheet(path: Path) -> Path:
    """Write the contact sheet of all signs as a PNG; each column has another signer.

    Raises UserError when the file cannot be written.
    """
    cells = []
    for index, sign in enumerate(SIGNS.values()):
        cells.append(_cell(sign, SIGNERS[index % _COLUMNS]))
    # White cells fill the last row.
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % _COLUMNS)
    # Rows of cells, one below the other.
    rows = []
    for start in range(0, len(cells), _COLUMNS):
        rows.append(np.hstack(cells[start : start + _COLUMNS]))
    encoded, png = cv2.imencode(".png", np.vstack(rows))
    assert encoded
    try:
        path.write_bytes(png.tobytes())
    except OSError as error:
        raise UserError(
            f"the sheet must go to a file in an existing folder, but {path}: "
            f"{error.strerror}."
        ) from error
    return path
