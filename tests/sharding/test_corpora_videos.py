"""Tests of the choice between several video files with the name of a clip."""

import shutil
from pathlib import Path

import pytest

from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import (
    csl_daily,
    how2sign,
    openasl,
    phoenix14t,
    split_of,
    youtube_asl,
)
from tests.helpers.trees import (
    OPENASL_ROWS,
    built_clips,
    make_csl_daily,
    make_how2sign,
    make_openasl,
    make_phoenix,
    write_video,
    write_vtt,
)

READY = "sentence_level/train/rgb_front/raw_videos"
RENDERINGS = (
    "sentence_level/train/rgb_front/features/openpose_output/video",
    "a_pose",
    "2D_keypoints",
    "DWPose",
    "MediaPipe/out",
    "hand-masks",
    "depth",
    "optical_flow",
    "rgb_side/raw_videos",
    "Skeletons",
    "smplx_renders",
)


def rename_to_first(root: Path, folder: str) -> Path:
    """Move the clips to a folder that a search finds first or last."""
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / READY, root / folder)
    return root / folder


@pytest.mark.parametrize("rendering", RENDERINGS)
@pytest.mark.parametrize("folder", [READY, "clips", "0", "zz"])
def test_renderings_are_never_used_as_clips(tmp_path, rendering, folder):
    root = make_how2sign(tmp_path, raw=False)
    clips = rename_to_first(root, folder) if folder != READY else root / READY
    for path in sorted(clips.iterdir()):
        write_video(root / rendering / path.name, 9)
    corpus = how2sign.read(root, ("train",))
    assert {row.path.parent for row in corpus.rows["train"]} == {clips}
    assert f"train: 4 other files of the same names are not used ({rendering}/" in " ".join(
        corpus.notes
    )


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_a_corpus_with_only_renderings_is_refused(tmp_path, rendering):
    root = make_how2sign(tmp_path, raw=False)
    (root / rendering).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / READY, root / rendering)
    with pytest.raises(
        UserError, match="Clips must have RGB videos, got only renderings or other views"
    ):
        how2sign.read(root, ("train",))


def test_a_clip_with_only_a_rendering_is_noted_and_skipped(tmp_path):
    root = make_how2sign(tmp_path / "source", raw=False)
    place = root / "sentence_level/train/rgb_front/features/openpose_output/video"
    place.mkdir(parents=True)
    shutil.move(root / READY / "-ab_1-8-rgb_front.mp4", place)
    build(
        "how2sign",
        root,
        tmp_path / "out",
        Options(short_side=16, workers=1, splits=("train",), max_skipped=1),
    )
    assert len(built_clips(tmp_path / "out", "train")) == 3
    notes = (tmp_path / "out" / "index.json").read_text()
    assert "train: 1 clips have only renderings or other views, which are not used" in notes


def test_renderings_of_sentences_are_not_counted_as_ready_made_clips(tmp_path):
    root = make_how2sign(tmp_path, raw=True)
    next(root.rglob("-ab-8-rgb_front.mp4")).unlink()
    for name in ("-aB_0-5", "-aB_1-5", "-ab_0-8", "-ab_1-8"):
        write_video(
            root
            / "sentence_level/train/rgb_front/features/openpose_output/video"
            / f"{name}-rgb_front.mp4",
            9,
        )
    corpus = how2sign.read(root, ("train",))
    assert "re-aligned times (2 of 4" in corpus.notes[0]


@pytest.mark.parametrize(
    "words", ["purpose", "composed", "inside", "workflows", "unmasked"]
)
def test_folders_with_similar_words_are_not_renderings(tmp_path, words):
    root = make_how2sign(tmp_path, raw=False)
    folder = rename_to_first(root, words)
    assert {row.path.parent for row in how2sign.read(root, ("train",)).rows["train"]} == {
        folder
    }


def test_the_own_folder_of_a_corpus_has_priority_and_other_files_are_noted(tmp_path):
    root = make_how2sign(tmp_path, raw=False)
    write_video(root / "0" / "-aB_0-5-rgb_front.mp4", 9)
    corpus = how2sign.read(root, ("train",))
    assert {row.path.parent for row in corpus.rows["train"]} == {root / READY}
    assert (
        "train: 1 other files of the same names are not used (0/-aB_0-5-rgb_front.mp4)"
        in corpus.notes
    )


def test_the_folder_of_another_split_has_no_priority(tmp_path):
    root = make_how2sign(tmp_path, raw=False)
    write_video(root / READY.replace("train", "dev") / "-aB_0-5-rgb_front.mp4", 9)
    corpus = how2sign.read(root, ("train",))
    assert {row.path.parent for row in corpus.rows["train"]} == {root / READY}


@pytest.mark.parametrize(
    "other",
    ["b/-aB_0-5-rgb_front.mp4", "a/-aB_0-5-rgb_front.webm", "360p/-aB_0-5-rgb_front.MP4"],
)
def test_two_videos_that_differ_are_refused_with_their_paths(tmp_path, other):
    root = make_how2sign(tmp_path, raw=False)
    rename_to_first(root, "a")
    write_video(root / "x.mp4", 9)
    (root / other).parent.mkdir(exist_ok=True)
    (root / "x.mp4").rename(root / other)
    with pytest.raises(
        UserError, match="A clip must have one video, got two that differ"
    ) as caught:
        how2sign.read(root, ("train",))
    assert str(root / "a" / "-aB_0-5-rgb_front.mp4") in str(caught.value) and str(
        root / other
    ) in str(caught.value)


@pytest.mark.parametrize("kind", ["copy", "link", "symlink", "folder"])
def test_two_files_with_the_same_bytes_are_one_video(tmp_path, kind):
    root = make_how2sign(tmp_path, raw=False)
    clips = rename_to_first(root, "clips")
    name = "-aB_0-5-rgb_front.mp4"
    if kind == "folder":
        (root / "again").symlink_to(clips)
    else:
        (root / "again").mkdir()
        make = {
            "copy": shutil.copy,
            "link": lambda a, b: b.hardlink_to(a),
            "symlink": lambda a, b: b.symlink_to(a),
        }
        make[kind](clips / name, root / "again" / name)
    rows = how2sign.read(root, ("train",)).rows["train"]
    assert all(row.path.is_file() for row in rows)


@pytest.mark.parametrize(
    "left",
    [
        "._{}.mp4",
        ".AppleDouble/{}.mp4",
        "__MACOSX/._{}.mp4",
        "{}.mp4.part",
        "{}.f137.mp4",
        ".trash/{}.mp4",
    ],
)
def test_hidden_and_partial_files_are_not_videos(tmp_path, left):
    root = make_how2sign(tmp_path, raw=False)
    clips = rename_to_first(root, "clips")
    path = root / left.format("-aB_0-5-rgb_front")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no video")
    assert {row.path.parent for row in how2sign.read(root, ("train",)).rows["train"]} == {
        clips
    }


def test_a_broken_link_is_not_a_video(tmp_path):
    root = make_how2sign(tmp_path, raw=False)
    rename_to_first(root, "clips")
    (root / "a").mkdir()
    (root / "a" / "-aB_0-5-rgb_front.mp4").symlink_to(root / "gone.mp4")
    assert all(row.path.is_file() for row in how2sign.read(root, ("train",)).rows["train"])


def test_openasl_uses_its_own_folder_and_refuses_two_names_that_differ(tmp_path):
    root = make_openasl(tmp_path, raw=False)
    vid = "-".join(OPENASL_ROWS[0][:3])
    write_video(root / "openpose" / f"{vid}.mp4", 9)
    write_video(root / "0" / f"{vid}.mp4", 9)
    corpus = openasl.read(root, ("train",))
    assert {row.path.parent.name for row in corpus.rows["train"]} == {"video-clip"}
    assert "train: 2 other files of the same names are not used" in " ".join(corpus.notes)
    write_video(root / "video-clip" / f"{vid.replace(':', '_')}.mp4", 9)
    with pytest.raises(UserError, match="got two that differ"):
        openasl.read(root, ("train",))


def test_renderings_are_not_used_as_raw_videos_of_openasl(tmp_path):
    root = make_openasl(tmp_path, raw=True)
    write_video(root / "pose" / "-aB_cD.fGh1.mp4", 9)
    rows = openasl.read(root, ("train",)).rows["train"]
    assert {row.path.parent.name for row in rows} == {"raw-video"}


def make_youtube(root: Path) -> str:
    number = 0
    while split_of(f"abcdefg{number:04d}") != "train":
        number += 1
    video = f"abcdefg{number:04d}"
    write_vtt(root / f"{video}.en.vtt", [("00:00.000", "00:01.000", "Hello.")])
    return video


def test_youtube_uses_no_rendering_and_refuses_two_resolutions(tmp_path):
    video = make_youtube(tmp_path)
    write_video(tmp_path / "openpose_output" / f"{video}.mp4", 10)
    with pytest.raises(UserError, match="only renderings or other views"):
        youtube_asl.read(tmp_path, ("train",))
    write_video(tmp_path / "720p" / f"A title [{video}].mp4", 20)
    (row,) = youtube_asl.read(tmp_path, ("train",)).rows["train"]
    assert row.path.parent.name == "720p"
    write_video(tmp_path / "360p" / f"{video}.mp4", 10)
    with pytest.raises(UserError, match=r"two that differ: .*360p.* and .*720p"):
        youtube_asl.read(tmp_path, ("train",))


def test_youtube_refuses_two_captions_that_differ_and_prefers_webvtt(tmp_path):
    video = make_youtube(tmp_path)
    write_video(tmp_path / f"{video}.mp4", 10)
    (tmp_path / f"{video}.en.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,000\nFrom SubRip.\n"
    )
    (row,) = youtube_asl.read(tmp_path, ("train",)).rows["train"]
    assert row.text == "Hello."
    write_vtt(
        tmp_path / "again" / f"{video}.en.vtt", [("00:00.000", "00:01.000", "Other.")]
    )
    with pytest.raises(
        UserError, match="one caption file per language, got two that differ"
    ):
        youtube_asl.read(tmp_path, ("train",))
    shutil.copy(tmp_path / f"{video}.en.vtt", tmp_path / "again" / f"{video}.en.vtt")
    assert len(youtube_asl.read(tmp_path, ("train",)).rows["train"]) == 1


def test_phoenix_frames_in_both_folders_are_refused_and_an_empty_1_is_ignored(tmp_path):
    release = make_phoenix(tmp_path, counts=(2, 0, 0), with_1=True)
    clip = next(release.rglob("01April_2010_train_tagesschau-1"))
    shutil.copy(clip / "1" / "images0001.png", clip / "images0001.png")
    with pytest.raises(UserError, match="A clip must have one folder of frames, got two"):
        phoenix14t.read(release, ("train",))
    (clip / "1" / "images0001.png").unlink()
    assert phoenix14t.read(release, ("train",)).rows["train"][0].path == clip


def test_csl_daily_frames_in_two_folders_are_refused(tmp_path):
    root = make_csl_daily(tmp_path)
    (root / "sentences").symlink_to(root / "sentence")
    (root / "sentence_frames-512x512").mkdir()  # empty: nothing was unpacked into it
    assert len(csl_daily.read(root, ("train",)).rows["train"]) == 2
    (root / "sentence_frames-512x512" / "S000007_P0003_T00").mkdir()
    with pytest.raises(
        UserError,
        match=r"The frames must be in one folder, got two: .*sentence_frames-512x512",
    ):
        csl_daily.read(root, ("train",))


def test_two_tables_with_one_name_that_differ_are_refused(tmp_path):
    root = make_openasl(tmp_path, raw=True)
    table = root / "data" / "openasl-v1.0.tsv"
    (root / "data").rename(root / "tables")
    table = root / "tables" / "openasl-v1.0.tsv"
    (root / "a").mkdir()
    shutil.copy(table, root / "a" / table.name)
    assert len(openasl.read(root, ("train",)).rows["train"]) == 2
    (root / "a" / table.name).write_text(table.read_text() + "\n")
    with pytest.raises(
        UserError, match=r"--source must hold one openasl-v.*two that differ"
    ):
        openasl.read(root, ("train",))
