import json
import re
from itertools import chain

import pytest

from flallm_ds.data.index import load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import manifest, split_of, youtube_asl
from flallm_ds.sharding.corpora.captions import Cue, read_captions, read_json, read_vtt
from tests.helpers.trees import built_clips, write_video, write_vtt

ALL = ("train", "dev", "test")
SCROLLING = """WEBVTT
Kind: captions
Language: en

00:00:15.281 --> 00:00:17.483 align:start position:0%
 
Among<00:00:15.314><c> other</c><00:00:15.347><c> things</c>

00:00:17.483 --> 00:00:17.493 align:start position:0%
Among other things
 

00:00:17.493 --> 00:00:20.586 align:start position:0%
Among other things
we<00:00:17.583><c> sign</c>

00:00:20.586 --> 00:00:20.596 align:start position:0%
we sign
 

00:00:20.596 --> 00:00:22.000 align:start position:0%
we sign
every<00:00:21.000><c> day</c>
"""


def cues_of(text: str) -> list[tuple[float, float, str]]:
    return [(cue.start_s, cue.end_s, cue.text) for cue in read_vtt(text)[0]]


WRITTEN = """WEBVTT - A title
Language: en

NOTE a comment
00:00:09.000 --> 00:00:10.000
not shown

STYLE
::cue { color: red }

REGION
id:fred

a name
00:01.000 --> 00:02.500 align:start line:90%
<v Anna><i>Hello</i> &amp; <c.yellow>good&nbsp;day</c>,
- you &lt;3 me\u200e

01:00:02.500 --> 01:00:03.000
Line
 
after a blank

00:05.000 --> 00:06.000

bad --> times
not shown
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_webvtt_without_tags_entities_settings_comments_and_styles(newline):
    assert cues_of(WRITTEN.replace("\n", newline)) == [
        (1.0, 2.5, "Hello & good day, - you <3 me"),
        (3602.5, 3603.0, "Line after a blank"),
        (5.0, 6.0, ""),
    ]


def test_a_caption_may_follow_the_header_without_a_blank_line():
    text = "WEBVTT - a --> b\nKind: captions\n00:01.000 --> 00:02.000\nhello\n\n00:03.000 --> 00:04.000\nyou\n"
    assert cues_of(text.replace(" - a --> b", "")) == [
        (1.0, 2.0, "hello"),
        (3.0, 4.0, "you"),
    ]
    assert cues_of("WEBVTT - a --> b\n\n00:03.000 --> 00:04.000\nyou\n") == [
        (3.0, 4.0, "you")
    ]


def test_each_line_of_automatic_captions_is_used_once():
    cues, scroll = read_vtt(SCROLLING)
    assert scroll and [(cue.start_s, cue.text) for cue in cues] == [
        (15.281, "Among other things"),
        (17.493, "we sign"),
        (20.596, "every day"),
    ]
    plain = read_vtt(re.sub(r"<[^>]*>", "", SCROLLING))
    assert plain == (cues, True)  # recognised by the repeated lines only


def test_manual_captions_may_repeat_a_text():
    spans = (
        "00:01.000 --> 00:02.000",
        "00:02.000 --> 00:03.000",
        "00:03.000 --> 00:04.000",
    )
    text = "\n\n".join(
        ["WEBVTT", f"{spans[0]}\nNo.", f"{spans[1]}\nNo.", f"{spans[2]}\nYes."]
    )
    assert [cue[2] for cue in cues_of(text)] == ["No.", "No.", "Yes."]
    assert read_vtt(text)[1] is False


def test_json_captions_are_cleaned_in_the_same_way():
    content = [{"text": "I &#39;love&#39;\n<i>you</i> <3", "start": 1.5, "duration": "2"}]
    assert read_json(content) == [Cue(1.5, 3.5, "I 'love' you <3")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.vtt", b""),
        ("a.vtt", b"<html>Too many requests</html>"),
        ("a.vtt", b"WEBVTT\n\n00:01.000 --> 00:02.000\n\xff\xfe\n"),
        ("a.json", b'{"events": []}'),
        ("a.json", b'[{"text": "x", "start": 1}]'),
        ("a.json", b'["x"]'),
        ("a.json", b'[{"text": "x", "start": NaN, "duration": 1}]'),
        ("a.json", b"["),
    ],
)
def test_a_broken_caption_file_is_a_value_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError):
        read_captions(tmp_path / name)


def ids_in(split: str, count: int) -> list[str]:
    """Return video ids of one split that begin with a hyphen."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        name = f"-_{split[:2]}{number:07d}"
        if split_of(name) == split:
            found.append(name)
        number += 1
    return found


TRAIN, DEV, TEST = ids_in("train", 4), ids_in("dev", 1), ids_in("test", 1)


def make_youtube(root):
    """Write four training videos, one of dev and one of test, with captions of every kind.

    Each video has 3 s at 10 fps.
    """
    for video in (*TRAIN[:3], *DEV, *TEST):
        write_video(root / "videos" / video[-1] / f"{video}.mp4", 30)
    write_video(root / "videos" / f"A title. With dots [{TRAIN[3]}].mp4", 30)
    for video in (TRAIN[0], *DEV, *TEST):
        write_vtt(
            root / "captions" / f"{video}.en.vtt",
            [
                ("00:00.000", "00:01.000", f"One of {video}."),
                ("00:01.000", "00:01.100", "Too short."),
                ("00:01.000", "00:02.000", "Too long. " * 31),
                ("00:00.000", "01:01.000", "Too slow."),
                ("00:01.000", "00:02.500", "<i>Two</i>."),
            ],
        )
    (root / "captions" / f"{TRAIN[1]}.json").write_text(
        '[{"text": "Three.", "start": 0.5, "duration": 1.0}]'
    )
    (root / "captions" / f"{TRAIN[1]}.info.json").write_text("{}")
    write_vtt(
        root / "captions" / f"{TRAIN[2]}.de.vtt",
        [("00:00.000", "00:01.000", "Nicht englisch.")],
    )
    write_vtt(
        root / "captions" / f"A title. With dots [{TRAIN[3]}].en-US.vtt",
        [("00:00.500", "00:01.500", "Four.")],
    )
    return root


def test_captions_become_clips_and_each_video_is_in_one_split(tmp_path):
    corpus = youtube_asl.read(make_youtube(tmp_path), ALL)
    train = corpus.rows["train"]
    assert [row.id for row in train] == [
        f"{TRAIN[0]}_0",
        f"{TRAIN[0]}_4",
        f"{TRAIN[1]}_0",
        f"{TRAIN[3]}_0",
    ]
    assert [row.text for row in train] == [f"One of {TRAIN[0]}.", "Two.", "Three.", "Four."]
    assert [(row.start_s, row.end_s) for row in train] == [
        (0, 1),
        (1, 2.5),
        (0.5, 1.5),
        (0.5, 1.5),
    ]
    assert all(row.path.is_file() and row.language == "en" for row in train)
    assert {row.video for row in corpus.rows["dev"]} == set(DEV) and len(
        corpus.rows["test"]
    ) == 2
    notes = "\n".join(corpus.notes)
    assert "8 of 17 captions kept (1 to 300 characters, 0.2 to 60 s)" in notes
    missing = f"1 videos have no captions, or none in their language, and are left out ({TRAIN[2]})"
    assert missing in corpus.notes
    assert split_of is manifest.split_of


def test_the_filter_is_set_by_options(tmp_path):
    root = make_youtube(tmp_path)
    corpus = youtube_asl.read(root, ("dev",), min_s=0.05, max_s=1.2)
    assert [row.text for row in corpus.rows["dev"]] == [f"One of {DEV[0]}.", "Too short."]
    with pytest.raises(UserError, match=r"--min_s must be .* below --max_s \(1\), got 2"):
        youtube_asl.read(root, ALL, min_s=2, max_s=1)
    with pytest.raises(UserError, match="--max_characters must be at least 1, got 0"):
        youtube_asl.read(root, ALL, max_characters=0)


def test_ids_choose_the_videos_and_their_order(tmp_path):
    root = make_youtube(tmp_path)
    ids = tmp_path / "ids.txt"
    ids.write_text(
        "\ufeffvideo_id\r\n"
        + "\r\n".join([TRAIN[3], TRAIN[0], TRAIN[3], "-_unknown-1", ""])
    )
    corpus = youtube_asl.read(root, ALL, ids=str(ids))
    rows = list(chain.from_iterable(corpus.rows.values()))
    assert [row.video for row in rows] == [TRAIN[3], TRAIN[0], TRAIN[0]]
    assert re.search("1 videos have no captions.*-_unknown-1", "\n".join(corpus.notes))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"abc\nnot an id\n", "line 1"), (b"\xff\xfe", "got UTF-16"), (None, "readable")],
)
def test_a_wrong_ids_file_is_a_user_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        youtube_asl.read(make_youtube(tmp_path), ALL, ids=str(tmp_path / "ids.txt"))


def test_broken_and_automatic_captions_are_counted(tmp_path):
    root = make_youtube(tmp_path)
    (root / "captions" / f"{TRAIN[0]}.en.vtt").write_bytes(b"")
    (root / "captions" / f"{TRAIN[1]}.json").unlink()
    (root / "captions" / f"{TRAIN[1]}.en.vtt").write_text(SCROLLING)
    corpus = youtube_asl.read(root, ("train",))
    assert (
        f"1 videos have captions that cannot be read, and are left out ({TRAIN[0]})"
        in corpus.notes
    )
    assert "1 videos have automatic captions" in "\n".join(corpus.notes)
    assert [row.text for row in corpus.rows["train"]][:2] == [
        "Among other things",
        "we sign",
    ]


@pytest.mark.parametrize(
    ("tags", "language", "chosen"),
    [
        (("en", "de"), "de", ("de", "de")),
        (("en-US", "en", "en-orig"), "en", ("en", "en")),
        (("de-cvfXDfbeED0", "en"), "de", ("de", "de-cvfXDfbeED0")),
        (("iw", "en"), "he", ("he", "iw")),
        (("zh-Hans",), "", ("zh", "zh-Hans")),
        (("zh-Hant", "zh-Hans"), "zh", ("zh", "zh-Hans")),
        (("zh-TW", "en"), "zh", ("zh-Hant", "zh-TW")),  # never silently in another script
        (("zh", "zh-HK"), "zh-Hant", ("zh-Hant", "zh-HK")),
        (("zh-Hans",), "zh-Hant", None),
        (("sr-Latn",), "", ("sr-Latn", "sr-Latn")),
        (("nn", "nb"), "no", ("no", "nb")),
        (("nn",), "no", ("nn", "nn")),
        (("en-orig", "de"), "en", ("en", "en-orig")),
        (("en_orig", "de"), "en", ("en", "en_orig")),
        (("qqq",), "", None),
        (("live_chat", "en"), "", ("en", "en")),
        (("en", "en-GB"), "", ("en", "en")),
        (("en", "de"), "", None),
        (("en",), "de", None),
        ((), "", None),
    ],
)
def test_captions_are_chosen_by_language(tmp_path, tags, language, chosen):
    tracks = {tag: tmp_path / f"{tag}.vtt" for tag in tags}
    expected = chosen and (chosen[0], tmp_path / f"{chosen[1]}.vtt")
    assert youtube_asl.choose_track(tracks, language) == expected


def test_the_header_of_captions_may_have_the_language(tmp_path):
    path = tmp_path / "a.vtt"
    write_vtt(path, [], header="\nKind: captions\nLanguage: fr-CA")
    assert youtube_asl.choose_track({"": path}, "") == ("fr", path)
    assert youtube_asl.choose_track({"": path}, "en") is None
    write_vtt(path, [])
    assert youtube_asl.choose_track({"": path}, "en") == ("en", path)


@pytest.mark.parametrize("separator", ["\t", ","])
def test_sl25_uses_captions_in_the_language_of_each_video(tmp_path, separator):
    cues = [("00:00.000", "00:01.000", "A text.")]
    for video in TRAIN:
        for tag in ("de", "en", "ja"):
            write_vtt(tmp_path / f"{video}.{tag}.vtt", cues)
    codes = ["gsg", "ja", "ase", "???"]
    ids = tmp_path / "ids"
    lines = map(separator.join, zip(TRAIN, codes, strict=True))
    ids.write_text("\n".join(lines))
    corpus = youtube_asl.read_sl25(tmp_path, ALL, ids=str(ids))
    assert [row.language for row in corpus.rows["train"]] == ["de", "ja", "en"]
    assert corpus.language == "mixed" and f"({TRAIN[3]})" in "\n".join(corpus.notes)
    corpus = youtube_asl.read_sl25(tmp_path, ALL, ids=str(ids), language="de-DE")
    assert corpus.language == "de" and len(corpus.rows["train"]) == 4


def test_sl25_captions_without_a_language_are_refused(tmp_path):
    write_vtt(tmp_path / f"{TRAIN[0]}.vtt", [("00:00.000", "00:01.000", "A text.")])
    with pytest.raises(UserError, match=r"must have a language.*--language"):
        youtube_asl.read_sl25(tmp_path, ALL)


def test_youtube_asl_is_built(tmp_path):
    out = tmp_path / "out"
    build(
        "youtube_asl", make_youtube(tmp_path / "yt"), out, Options(short_side=24, workers=1)
    )
    facts, frames = built_clips(out, "train")[f"{TRAIN[0]}_4"]
    assert (facts["text"], facts["video"], len(frames)) == ("Two.", TRAIN[0], 15)
    videos = [set(load_index(out, split).strings("video")) for split in ALL]
    assert [len(found) for found in videos] == [3, 1, 1] and len(set.union(*videos)) == 5


def test_youtube_sl25_is_built_with_a_language_for_each_clip(tmp_path):
    root = make_youtube(tmp_path / "yt")
    ids = root / "ids.tsv"
    ids.write_text(f"{TRAIN[0]}\tase\n{TRAIN[2]}\tgsg\n{DEV[0]}\ten\n{TEST[0]}\t???\n")
    build(
        "youtube_sl25",
        root,
        tmp_path / "out",
        Options(short_side=24, workers=1),
        ids=str(ids),
    )
    clips = built_clips(tmp_path / "out", "train")
    assert {name: clip[0]["language"] for name, clip in clips.items()} == {
        f"{TRAIN[0]}_0": "en",
        f"{TRAIN[0]}_4": "en",
        f"{TRAIN[2]}_0": "de",
    }
    assert json.loads((tmp_path / "out" / "index.json").read_text())["language"] == "mixed"
    assert read_manifest(tmp_path / "out")["corpus"] == "youtube_sl25"
