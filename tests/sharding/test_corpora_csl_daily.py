import os
import pickle
import shutil

import pytest

from flallm_ds.data.index import load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import csl_daily
from tests.helpers.trees import CSL_MISSING, built_clips, make_csl_daily

ALL = ("train", "dev", "test")


@pytest.mark.parametrize("annotation", ["pickle", "map", "both"])
@pytest.mark.parametrize("gloss", [list, str])
def test_labels_are_read_from_either_file_and_either_type(tmp_path, annotation, gloss):
    corpus = csl_daily.read(
        make_csl_daily(tmp_path, annotation=annotation, gloss=gloss), ALL
    )
    assert [len(table) for table in corpus.rows.values()] == [2, 1, 1]
    first, second = corpus.rows["train"]
    assert (first.id, first.text, first.gloss) == ("S000007_P0003_T00", "他是谁？", "他 谁")
    assert (first.signer, first.language, first.image_fps) == ("P0003", "zh", 30.0)
    assert second.text == "30元，不贵。"
    source = "video_map.txt" if annotation == "map" else "csl2020ct_v2.pkl"
    assert f"labels from {source}" in corpus.notes


@pytest.mark.parametrize(
    "frames",
    [
        "sentence/frames_512x512",
        "sentence_frames-512x512",
        "sentences/frames_512x512",
        "sentence_frames-512x512/frames_512x512",
    ],
)
def test_frames_are_found_in_each_folder_and_from_the_parent_folder(tmp_path, frames):
    root = make_csl_daily(tmp_path / "CSL-Daily", frames=frames)
    for source in (root, tmp_path):
        rows = csl_daily.read(source, ("train",)).rows["train"]
        assert [len(list(row.path.glob("*.jpg"))) for row in rows] == [3, 4]


def test_a_clip_that_is_not_in_the_release_is_left_out_and_counted(tmp_path):
    notes = csl_daily.read(make_csl_daily(tmp_path / "a"), ALL).notes
    assert f"1 clips of split_1.txt are not in this release ({CSL_MISSING})" in notes
    whole = csl_daily.read(make_csl_daily(tmp_path / "b", missing=""), ALL)
    assert len(whole.rows["train"]) == 3
    assert "not in this release" not in "\n".join(whole.notes)
    shutil.rmtree(tmp_path / "b" / "sentence" / "frames_512x512" / CSL_MISSING)
    assert len(csl_daily.read(tmp_path / "b", ALL).rows["train"]) == 2


def test_the_build_reports_other_missing_frames(tmp_path):
    root = make_csl_daily(tmp_path / "csl")
    shutil.rmtree(root / "sentence" / "frames_512x512" / "S000030_P0009_T00")
    with pytest.raises(UserError, match="1 without video: test S000030_P0009_T00"):
        build("csl_daily", root, tmp_path / "out", Options(short_side=16, workers=1))


def test_labelled_clips_in_no_split_are_counted(tmp_path):
    root = make_csl_daily(tmp_path)
    table = root / "sentence_label" / "split_1.txt"
    table.write_text(table.read_text().replace("S000007_P0003_T00|train\n", ""))
    corpus = csl_daily.read(root, ALL)
    assert "1 labelled clips are in no split (S000007_P0003_T00)" in corpus.notes


class Trap:
    def __reduce__(self):
        return os.system, ("echo trapped > trapped",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    root = make_csl_daily(tmp_path)
    monkeypatch.chdir(tmp_path)
    trap = pickle.dumps({"info": [Trap()]})
    pickle.loads(trap)
    assert (tmp_path / "trapped").exists()  # the trap works
    (tmp_path / "trapped").unlink()
    (root / "sentence_label" / "csl2020ct_v2.pkl").write_bytes(trap)
    with pytest.raises(UserError, match=r"plain values: it imports \w+\.system"):
        csl_daily.read(root, ALL)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "plain values"),
        (pickle.dumps({"info": ["x" * 500]})[:200], "plain values"),
        (b"\x80\x04\x95nonsense", "plain values"),
        (pickle.dumps([1, 2]), "list 'info'"),
        (pickle.dumps({"info": [{"label_char": ["x"]}]}), "list 'info'"),
        (
            pickle.dumps({"info": [{"name": "a", "label_char": 3, "label_gloss": []}]}),
            "label_char of a",
        ),
        (pickle.dumps({"info": [{"name": "a", "label_char": ["x"]}]}), "label_gloss of a"),
    ],
)
def test_a_broken_annotation_is_a_user_error(tmp_path, content, message):
    root = make_csl_daily(tmp_path)
    (root / "sentence_label" / "csl2020ct_v2.pkl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        csl_daily.read(root, ALL)


def test_the_messages_for_missing_folders_name_them(tmp_path):
    with pytest.raises(UserError, match=r"--source must be .* with sentence_label in it"):
        csl_daily.read(tmp_path, ALL)
    with pytest.raises(UserError, match=r"sentence/frames_512x512, .* missing or empty"):
        csl_daily.read(make_csl_daily(tmp_path / "csl", frames="elsewhere"), ALL)


@pytest.mark.parametrize("trim", [True, False])
def test_csl_daily_is_built_with_or_without_its_black_margin(tmp_path, trim):
    out = tmp_path / "out"
    build(
        "csl_daily",
        make_csl_daily(tmp_path / "csl"),
        out,
        Options(short_side=32, workers=1),
        trim_margin=trim,
    )
    facts, frames = built_clips(out, "train")["S000010_P0000_T01"]
    assert facts["text"] == "30元，不贵。" and facts["gloss"] == "30 钱 贵 不"
    assert (facts["signer"], facts["fps"], facts["num_frames"], len(frames)) == (
        "P0000",
        30.0,
        4,
        4,
    )
    top = frames[0][0].mean()
    assert (frames[0].shape, top > 150) == ((32, 38, 3) if trim else (32, 32, 3), trim)
    assert [len(load_index(out, split)) for split in ALL] == [2, 1, 1]
    margin = "cut off" if trim else "kept"
    assert (
        f"the black margin (rows 0 to 80 of 512) is {margin}" in read_manifest(out)["notes"]
    )
