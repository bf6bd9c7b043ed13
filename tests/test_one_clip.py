"""docs/one_clip.py draws the tutorial of one clip, whose table names existing functions."""

import importlib.util
import operator
import re
from pathlib import Path
from types import ModuleType

import cv2
import pytest

from flallm_ds.errors import UserError
from tests.helpers.exports import ENCODER_DECODER, write_export
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "tutorials" / "one_clip.md"


def load(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_drawn_for_a_run_and_a_clip(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    script = load(ROOT / "docs" / "one_clip.py")
    write_export(ENCODER_DECODER, tiny_corpus, tmp_path / "run")
    given = {"run": tmp_path / "run", "shards": tiny_corpus / "shards", "out": tmp_path}
    with pytest.raises(UserError, match=r"--key must be a key of test, e\.g\. "):
        script.one_clip(**given, key="none")
    script.one_clip(**given, key="00000000")
    for number in range(1, 9):
        picture = cv2.imread(str(tmp_path / f"one_clip_{number}.png"))
        assert picture.std() > 5 and picture.shape[1] >= 900


def test_a_title_names_the_file_and_the_function() -> None:
    script = load(ROOT / "docs" / "one_clip.py")
    # torch.no_grad wraps this function, and is in another file.
    named = script.place(script.visual_attention)
    assert named == "flallm_ds/models/attention.py, visual_attention"


def test_the_functions_of_the_page_exist() -> None:
    rows = re.findall(r"^\| \d .*\| `(.*)` \| `(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for file, function in rows:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert callable(operator.attrgetter(function)(module))


def test_the_pictures_of_the_page_are_small() -> None:
    pictures = re.findall(r"\]\((\.\./images/one_clip_\d\.png)\)", PAGE.read_text())
    assert len(pictures) == 8
    for picture in pictures:
        assert (PAGE.parent / picture).stat().st_size <= 200_000
