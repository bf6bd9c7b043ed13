import json
from itertools import chain

import pytest

from flallm_ds.data.index import load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import openasl
from tests.helpers.trees import OPENASL_ROWS, built_clips, make_openasl

ALL = ("train", "dev", "test")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_cut_from_raw_videos_by_clock_times_and_cropped(tmp_path, newline):
    corpus = openasl.read(make_openasl(tmp_path, raw=True, newline=newline), ALL)
    assert {split: len(table) for split, table in corpus.rows.items()} == {
        "train": 2,
        "dev": 1,
        "test": 1,
    }
    first, second = corpus.rows["train"]
    assert (
        first.id == "-aB_cD.fGh1-00:00:00.500-00:00:01.000" and first.video == "-aB_cD.fGh1"
    )
    assert (first.start_s, first.end_s, first.bbox) == (0.5, 1.0, (0.5, 0.0, 1.0, 1.0))
    assert (first.text, first.gloss) == ('He said: "Hello."', "SIGN0")
    assert second.bbox is None and second.text == "It's 5.30 pm."
    (dev,), (test,) = corpus.rows["dev"], corpus.rows["test"]
    # cut to the frame
    assert dev.text == '"Quoted, but not closed.' and dev.bbox == (0.0, 0.0, 0.5, 1.0)
    assert test.end_s == 69.0
    for row in (first, second, dev, test):
        assert row.path.is_file()
    assert (
        "train: clips cut from the raw videos by the times in the table (2 of 2 rows have a "
        "video)" in corpus.notes
    )
    assert "train: 1 of 2 rows have no box: the whole frame is kept" in corpus.notes


@pytest.mark.parametrize("colon", [":", "_", "-", "%"])
def test_ready_made_clips_are_found_by_each_name_and_not_cropped_again(tmp_path, colon):
    corpus = openasl.read(make_openasl(tmp_path, raw=False, colon=colon), ALL)
    rows = list(chain.from_iterable(corpus.rows.values()))
    assert len(rows) == len(OPENASL_ROWS)
    for row in rows:
        assert row.path.is_file()
        assert (row.start_s, row.end_s, row.bbox) == (None, None, None)
    assert (
        "dev: clips ready-made, already cut and cropped (1 of 1 rows have a video)"
        in corpus.notes
    )


def test_without_boxes_whole_frames_are_kept_with_a_note(tmp_path):
    corpus = openasl.read(make_openasl(tmp_path, raw=True, boxes=False), ("train",))
    assert corpus.notes[-1] == "train: 2 of 2 rows have no box: the whole frame is kept"


def test_clips_with_dots_in_their_ids_are_built_and_cropped(tmp_path):
    out = tmp_path / "out"
    build(
        "openasl",
        make_openasl(tmp_path / "openasl", raw=True),
        out,
        Options(short_side=24, workers=1),
    )
    clips = built_clips(out, "train")
    assert sorted(clips) == [
        "-aB_cD.fGh1-00:00:00.500-00:00:01.000",
        "-aB_cD.fGh1-00:00:01.000-00:00:02.000",
    ]
    cropped, whole = (clips[name] for name in sorted(clips))
    assert (len(cropped[1]), len(whole[1])) == (5, 10)
    assert cropped[1][0].mean() > 180 > 110 > whole[1][0].mean()  # the left half is black
    assert all("." not in key for key in load_index(out, "train").strings("key"))
    notes = "\n".join(read_manifest(out)["notes"])
    assert "test: 1 clips end past their video's end" in notes


def test_missing_videos_are_skipped_only_with_the_option(tmp_path):
    root = make_openasl(tmp_path / "openasl", raw=True)
    (root / "raw-video" / "cccccccccc3.mp4").unlink()
    with pytest.raises(UserError, match="1 without video: test cccccccccc3-00"):
        build("openasl", root, tmp_path / "out", Options(short_side=16, workers=1))
    build(
        "openasl", root, tmp_path / "out", Options(short_side=16, workers=1, max_skipped=1)
    )
    assert read_manifest(tmp_path / "out")["skipped"]["without video"]["count"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "JSON object"),
        ("{", "^Cannot read boxes .*bbox-v1.0.json"),
        (json.dumps({"a": [0, 1]}), r"the box of a must be .*, got \[0, 1\]"),
    ],
)
def test_broken_boxes_are_a_user_error(tmp_path, content, message):
    root = make_openasl(tmp_path, raw=True)
    (root / "data" / "bbox-v1.0.json").write_text(content)
    with pytest.raises(UserError, match=message):
        openasl.read(root, ALL)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("valid\n", "holdout\n", "line 4: split must be one of"),
        ("00:00:01.000\tHe said", "one second\tHe said", "line 2: end must be seconds"),
        ("00:00:01.000\tHe said", "\tHe said", "line 2: end must be seconds"),
        ("raw-text", "text", "'raw-text'"),
    ],
)
def test_a_wrong_table_is_a_user_error_with_its_line(tmp_path, old, new, message):
    root = make_openasl(tmp_path, raw=True)
    table = root / "data" / "openasl-v1.0.tsv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        openasl.read(root, ALL)


def test_a_folder_without_the_table_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"openasl-v1\.0\.tsv"):
        openasl.read(tmp_path, ALL)
