"""docs/demo_picture.py draws the picture of docs/demo.md."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flallm_ds.errors import UserError
from tests.helpers.exports import ENCODER_DECODER, write_export
from tests.helpers.paths import ROOT
from tests.test_one_clip import load


def write_clip(folder: Path, num_frames: int) -> None:
    """Write a moving square, as the frames of a clip in a corpus of signsim."""
    folder.mkdir(parents=True)
    for number in range(num_frames):
        frame = np.full((130, 105, 3), 60, np.uint8)
        frame[40:80, 3 * number : 3 * number + 30] = 220
        cv2.imwrite(str(folder / f"images{number:04}.png"), frame)


def test_the_page_is_drawn_with_its_attention(
    browser: Any, tiny_corpus: Path, tmp_path: Path
) -> None:
    """browser: the test is skipped without it."""
    script = load(ROOT / "docs" / "demo_picture.py")
    write_export(ENCODER_DECODER, tiny_corpus, tmp_path / "run")
    write_clip(tmp_path / "features" / "test" / "signsim_test-000003" / "1", 25)
    given = {
        "model": str(tmp_path / "run"),
        "corpus": tmp_path,
        "out": tmp_path / "demo.png",
    }
    with pytest.raises(UserError, match=r"--corpus must hold .*signsim_test-000004"):
        script.demo_picture(**given, clips=(4,))
    script.demo_picture(**given, clips=(3,))
    height, width, _ = cv2.imread(str(tmp_path / "demo.png")).shape
    assert width == script.WIDTH_PX and height > 900
