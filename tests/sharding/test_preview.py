import base64
import html.parser
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from flallm_ds.data.index import load_index
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.preview import Clip, contact_sheet, draw, preview, wrap
from tests.helpers.paths import ROOT
from tests.helpers.trees import write_frames, write_video

EVIL = "<script>alert('$x_1$')</script> & \"quotes\""
TEXTS = [
    EVIL,
    "Grüße aus Köln, schön & heiß",
    "今天天气很好，明天下雨。" * 12,
    "x",
    "a" * 900,
    "no $ sign \\frac{",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build six training clips with unusual texts, and two dev clips.

    The first has an unusual id and signer.
    """
    place = tmp_path_factory.mktemp("preview")
    write_video(place / "a.mp4", 12)
    write_frames(place / "frames", 3)
    rows = [{"video": "a.mp4", "text": text, "split": "train"} for text in TEXTS]
    rows[0] |= {"video": "frames", "id": "<b>id</b>", "signer": "</small><i>"}
    rows += [{"video": "frames", "text": f"dev {n}", "split": "dev"} for n in range(2)]
    (place / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(
        "manifest",
        place / "m.jsonl",
        place / "shards",
        Options(workers=1, short_side=16),
        language="zh",
    )
    return place / "shards"


class Page(html.parser.HTMLParser):
    """Parse a page as a browser does: tags, sources and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.shown = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name == "src"]

    def handle_data(self, data):
        self.shown += data


def test_the_sheet_fits_a_page_and_the_page_plays_each_clip(built, tmp_path, capsys):
    preview(built, out=tmp_path / "look")
    sheet = cv2.imread(str(tmp_path / "look.png"))
    assert sheet.shape[0] <= 1.414 * sheet.shape[1] and sheet.std() > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.html", "look.png"]
    page = Page(tmp_path / "look.html")
    assert page.tags.count("video") == len(page.sources) == 8
    num_frames = []
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:video/mp4;base64"
        with av.open(io.BytesIO(base64.b64decode(data))) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            num_frames.append(sum(1 for _ in container.decode(video=0)))
    assert sorted(num_frames) == [3, 3, 3, 12, 12, 12, 12, 12]
    assert "8 clips are in" in capsys.readouterr().out


def test_texts_and_ids_are_escaped_in_the_page(built, tmp_path):
    preview(built, out=tmp_path / "look")
    raw = (tmp_path / "look.html").read_text(encoding="utf-8")
    page = Page(tmp_path / "look.html")
    assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
    assert "<script" not in raw and "default-src 'none'" in raw
    for text in TEXTS:
        assert text in page.shown
    assert "<b>id</b>" in page.shown and "</small><i>" in page.shown


def test_the_sheet_shows_frames_from_the_first_to_the_last(tmp_path):
    # Each frame is brighter than the one before.
    write_video(tmp_path / "a.mp4", 40)
    (tmp_path / "m.csv").write_text("video,text,split\na.mp4,x,train\n")
    build(
        "manifest",
        tmp_path / "m.csv",
        tmp_path / "shards",
        Options(workers=1),
        language="en",
    )
    preview(tmp_path / "shards", out=tmp_path / "look")
    sheet = cv2.imread(str(tmp_path / "look.png"))
    # Eight frames and white gaps of two pixels begin at the left margin.
    line = sheet[-60, 10:, 0].astype(int)
    gaps = np.flatnonzero((line[:-1] == 255) & (line[1:] == 255))
    side = int(gaps[gaps > 20][0]) + 2
    shades = [int(np.median(line[side * n + 20 : side * (n + 1) - 20])) for n in range(8)]
    assert shades == sorted(shades) and len(set(shades)) == 8
    assert shades[0] < 20 and shades[-1] > 220


def test_more_clips_take_more_columns_in_order() -> None:
    frames = np.full((9, 60, 60, 3), 90, np.uint8)
    row = {"id": "a", "num_frames": 9, "fps": 25.0, "width": 60, "height": 60}
    row |= {"signer": "", "key": "0", "text": "a sentence", "language": "en"}
    for num_clips, in_columns in [(2, (2,)), (14, (7, 7)), (26, (9, 9, 8))]:
        png, missing = contact_sheet(
            "title", [Clip("dev", row, frames_THWC=frames)] * num_clips
        )
        sheet = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert not missing.any and sheet.shape[0] <= 1.414 * sheet.shape[1]
        for number, expected in enumerate(in_columns):
            left = 10 + number * ((sheet.shape[1] - 10) // len(in_columns))
            # The left edge of the frames of a column, from top to bottom.
            inside = sheet[:, left + 5] == 90
            assert np.count_nonzero(np.diff(inside.astype(int)) == 1) == expected


def test_a_broken_clip_is_shown_as_broken(built, tmp_path, capsys):
    shutil.copytree(built, tmp_path / "shards")
    arrays = load_index(built, "dev").arrays
    with (tmp_path / "shards" / "dev-000000.tar").open("r+b") as file:
        file.seek(int(arrays["offset"][1]))
        file.write(b"RUFF")
    (tmp_path / "shards" / "train-000000.tar").unlink()
    preview(tmp_path / "shards", out=tmp_path / "look")
    page = Page(tmp_path / "look.html")
    assert page.tags.count("video") == 1 and "No such file" in page.shown
    out = capsys.readouterr().out
    assert out.count("warning: train") == 6 and "warning: dev 00000001 is broken" in out


def test_a_seed_draws_the_same_clips_again_evenly_over_splits():
    assert draw([100, 3, 50], 24, 7) == draw([100, 3, 50], 24, 7)
    assert draw([100, 3, 50], 24, 7) != draw([100, 3, 50], 24, 8)
    drawn = draw([100, 3, 50], 24, 0)
    assert [len(rows) for rows in drawn] == [11, 3, 10]
    assert all(rows == sorted(set(rows)) for rows in drawn)
    assert draw([2, 1], 24, 0) == [[0, 1], [0]]


def test_long_texts_are_wrapped_and_cut():
    assert wrap("ein  kurzer\nText", 40) == ["ein kurzer Text"]
    assert len(wrap("wort " * 200, 40)) == 3 and wrap("wort " * 200, 40)[-1].endswith("…")
    assert all(len(line) <= 20 for line in wrap("天" * 200, 40))


def test_the_command_can_draw_from_one_split(built, tmp_path):
    words = [
        str(built),
        f"--out={tmp_path / 'look.v2'}",
        "--split=dev",
        "--clips=1",
        "--seed=3",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "preview.py"), *words],
        capture_output=True, text=True, cwd="/", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert Page(tmp_path / "look.v2.html").tags.count("video") == 1
    assert (tmp_path / "look.v2.png").is_file()


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"clips": 0}, "--clips must be from 1"),
        ({"seed": -1}, "--seed must be 0 or above"),
        ({"split": "val"}, "must be one of train, dev"),
        (
            {"out": Path("/nowhere/at/all/x")},
            "--out must be a file name in an existing folder",
        ),
        ({"out": Path("/")}, "--out must be"),
    ],
)
def test_wrong_options_are_refused(built, tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence):
        preview(built, **{"out": tmp_path / "look"} | given)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"index\.json"):
        preview(tmp_path, out=tmp_path / "look")
