"""Tests of caption files in every format, and of the clips that captions become."""

import json
import re
from itertools import pairwise

import pytest

from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import split_of, youtube_asl
from flallm_ds.sharding.corpora.captions import read_captions
from tests.helpers.trees import write_video

_NAMES = [f"abcdefg{n:04d}" for n in range(60)]
VIDEOS = [name for name in _NAMES if split_of(name) == "train"][:6]


def track_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(
        content if isinstance(content, str) else json.dumps(content),
        encoding="utf-8",
        newline="",
    )
    return read_captions(path)


def spans(track):
    return [(cue.start_s, cue.end_s, cue.text) for cue in track.cues]


@pytest.mark.parametrize(
    ("times", "span"),
    [
        ("00:00:01.000 --> 00:00:02.500", (1, 2.5)),
        ("00:01.000 --> 00:02.500", (1, 2.5)),
        ("00:00:01,000 --> 00:00:02,500", (1, 2.5)),
        ("00:01,000 --> 00:02,500", (1, 2.5)),
        ("0:00:01.0 --> 0:00:02.5", (1, 2.5)),
        ("00:00:01 --> 00:00:02", (1, 2)),
        ("00:00:01.000-->00:00:02.500", (1, 2.5)),
        ("  00:00:01.000\t-->  00:00:02.500  ", (1, 2.5)),
        ("01:00:01.000 --> 100:00:00.000", (3601, 360000)),
        ("00:00:01.000 --> 00:00:02.500 align:start position:0% line:90%", (1, 2.5)),
        ("00:00:01,000 --> 00:00:02,500  X1:100 X2:200 Y1:1 Y2:9", (1, 2.5)),
    ],
)
@pytest.mark.parametrize("kind", [".vtt", ".srt"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_times_are_read_in_the_formats_of_all_tools(tmp_path, times, span, kind, newline):
    head = "WEBVTT\n\n" if kind == ".vtt" else "\ufeff1\n"
    track = track_of(
        tmp_path, f"a{kind}", f"{head}{times}\nHello\nyou\n\n".replace("\n", newline)
    )
    assert spans(track) == [(*span, "Hello you")] and track.num_unreadable == 0


@pytest.mark.parametrize(
    "times",
    [
        "a --> b",
        "00:00:01:00 --> 00:00:02:00:00",
        "-1:00.0 --> 00:02.0",
        "00:01.000 -->",
        "1.0 --> 2.0",
    ],
)
@pytest.mark.parametrize("kind", [".vtt", ".srt"])
def test_times_that_cannot_be_read_are_counted(tmp_path, times, kind):
    head = "WEBVTT\n\n" if kind == ".vtt" else "1\n"
    track = track_of(
        tmp_path,
        f"a{kind}",
        f"{head}{times}\nlost\n\n00:00:03.000 --> 00:00:04.000\nHello\n",
    )
    assert spans(track) == [(3, 4, "Hello")] and track.num_unreadable == 1


def test_subrip_is_read_with_and_without_blank_lines_and_numbers(tmp_path):
    content = (
        "1\n00:00:01,000 --> 00:00:02,000\nOne\n\nand a half\n\n2\n00:00:03,000 --> 00:00:04,000\n1984\n"
        '3\n00:00:05,000 --> 00:00:06,000\n{\\an8}<font color="#fff">Three</font>\n\n\n'
        "4\n00:00:07,000 --> 00:00:08,000\n\n5\n00:00:09,000 --> 00:00:10,000\nFive"
    )
    assert spans(track_of(tmp_path, "a.srt", content)) == [
        (1, 2, "One and a half"),
        (3, 4, "1984"),
        (5, 6, "Three"),
        (7, 8, ""),
        (9, 10, "Five"),
    ]


def test_comments_styles_and_regions_are_left_out(tmp_path):
    blocks = [
        "WEBVTT",
        "NOTE\nmore\n00:09.000 --> 00:10.000\nof it",
        "NOTE one",
        "STYLE\n::cue { color: red }",
        "REGION\nid:a",
        "NOTED\n00:01.000 --> 00:02.000\nNOTE this",
        "00:03.000 --> 00:04.000\nSTYLE",
    ]
    assert spans(track_of(tmp_path, "a.vtt", "\n\n".join(blocks))) == [
        (1, 2, "NOTE this"),
        (3, 4, "STYLE"),
    ]


AUTOMATIC = {
    "wireMagic": "pb3",
    "events": [
        {"tStartMs": 0, "dDurationMs": 9000, "id": 1, "wpWinPosId": 1},
        {
            "tStartMs": 1000,
            "dDurationMs": 4000,
            "wWinId": 1,
            "segs": [
                {"utf8": "among"},
                {"utf8": " other", "tOffsetMs": 300},
                {"utf8": " things", "tOffsetMs": 600},
            ],
        },
        {
            "tStartMs": 2500,
            "dDurationMs": 2500,
            "wWinId": 1,
            "aAppend": 1,
            "segs": [{"utf8": "\n"}],
        },
        {
            "tStartMs": 2510,
            "dDurationMs": 4000,
            "wWinId": 1,
            "segs": [{"utf8": "we"}, {"utf8": " sign", "tOffsetMs": 9}],
        },
        {"tStartMs": 6000, "dDurationMs": 1000, "wWinId": 1, "segs": [{"utf8": "[Music]"}]},
    ],
}


@pytest.mark.parametrize("name", ["a.json3", "a.json"])
def test_json3_is_read_with_either_suffix(tmp_path, name):
    track = track_of(tmp_path, name, AUTOMATIC)
    assert (
        spans(track) == [(1, 5, "among other things"), (2.51, 6.51, "we sign"), (6, 7, "")]
        and track.scrolls
    )
    plain = {
        "events": [
            {
                "tStartMs": 500,
                "dDurationMs": 1500,
                "segs": [{"utf8": "Hello\nyou &amp; me"}],
            }
        ]
    }
    track = track_of(tmp_path, name, plain)
    assert spans(track) == [(0.5, 2, "Hello you & me")] and not track.scrolls


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"events": []},
        {"events": {}},
        {"events": [1]},
        {"events": [{"segs": 1}]},
        {"events": [{"segs": ["x"]}]},
        {"events": [{"segs": [{"utf8": 3}]}]},
        {"events": [{"segs": [{"utf8": "x"}], "tStartMs": 1}]},
        {"events": [{"segs": [{"utf8": "x"}], "tStartMs": -1, "dDurationMs": 1}]},
        {"events": [{"segs": [{"utf8": "x"}], "tStartMs": True, "dDurationMs": 1}]},
        [{"text": None, "start": 1, "duration": 1}],
        [{"text": 5, "start": 1, "duration": 1}],
        [{"text": "x", "start": None, "duration": 1}],
        [{"text": "x", "start": "soon", "duration": 1}],
        3,
        None,
    ],
)
def test_json_without_captions_is_a_value_error(tmp_path, content):
    with pytest.raises(ValueError):
        track_of(tmp_path, "a.json", content)


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("[Music]", ""),
        ("[Music\nplaying] Continue.", "Continue."),
        ("[ __ ] you", "you"),
        ("［音楽］ はい", "はい"),
        ("【掌声】谢谢", "谢谢"),
        ("(applause)", ""),
        ("(Applause) Thank you.", "Thank you."),
        ("（拍手）谢谢", "谢谢"),
        ("(birds singing)", ""),
        ("(I love you.)", "(I love you.)"),
        ("ASL (a language) is", "ASL (a language) is"),
        ("♪", ""),
        ("♪ ♫ 🎵", ""),
        ("♪ We are one ♪", "We are one"),
        ("♪ upbeat music ♪", ""),
        ("♪♪\nHello", "Hello"),
        (">> ANNA: Hello.", "Hello."),
        (">>Hello.", "Hello."),
        (">> Hi.\n>> DR. SMITH: Yes.", "Hi. Yes."),
        ("Hi. >> BOB: Yes.", "Hi. Yes."),
        (">>> NEWS: now", "now"),
        ("&gt;&gt; BOB: Hi.", "Hi."),
        (">>安娜：你好", "你好"),
        (">> I said this: go", "I said this: go"),
        ("2 >> 1", "2 1"),
        ("a >b", "a >b"),
        ("{\\an8}Hi {\\i1}you{\\i0}", "Hi you"),
        ("{\\pos(1,2)\\fs9}Hi", "Hi"),
        ("Hi\\Nyou\\hthere", "Hi you there"),
        ("<c.yellow\nbold>Hi</c> <v Anna\nMaria>you</v>", "Hi you"),
        ("<i>two\nlines</i>", "two lines"),
        ("<00:00:01.000><c> a</c><00:00:02,000><c> b</c>", "a b"),
        ("<font color='red'>x</font><br/>y", "x y"),
        ("&amp;#39;tis &lt;i&gt;x&lt;/i&gt; &amp; y&nbsp;z", "'tis x & y z"),
        ("I <3 you, 2 < 3", "I <3 you, 2 < 3"),
        ("- Hello.\n- Hi.", "Hello. Hi."),
        ("-Hello. -Hi.", "Hello. Hi."),
        ("— Yes.", "Yes."),
        ("Yes!\n- No.", "Yes! No."),
        ("-5 degrees", "-5 degrees"),
        ("He came - and went.", "He came - and went."),
        ("one,\n- two", "one, - two"),
        ("- [sighs]\n- Stop.", "Stop."),
        ("...", ""),
        ("* * *", ""),
        ("?", ""),
        ("\u200b\ufeff", ""),
        ("\x07Hi\x1b", "Hi"),
        ("a\u2028b\x85c\td", "a b c d"),
        ("<v Bob>", ""),
    ],
)
@pytest.mark.parametrize("kind", [".vtt", ".srt", ".json", ".json3"])
def test_a_text_contains_only_spoken_words(tmp_path, shown, said, kind):
    content = {
        ".vtt": f"WEBVTT\n\n00:01.000 --> 00:02.000\n{shown}\n",
        ".srt": f"1\n00:00:01,000 --> 00:00:02,000\n{shown}\n",
        ".json": [{"text": shown, "start": 1, "duration": 1}],
        ".json3": {
            "events": [{"tStartMs": 1000, "dDurationMs": 1000, "segs": [{"utf8": shown}]}]
        },
    }[kind]
    track = track_of(tmp_path, f"a{kind}", content)
    assert spans(track) in (
        [(1, 2, said)],
        [] if kind == ".json3" and not shown.strip() else [(1, 2, said)],
    )


ROLLING = [
    (0.0, 3.0, "hello there"),
    (1.5, 5.0, "hello there\nhow are you"),
    (3.5, 7.0, "how are you\nwe sign"),
    (7.0, 8.0, "we sign"),
]


def as_file(kind, cues):
    def clock(seconds, comma):
        text = (
            f"{int(seconds // 3600):02d}:{int(seconds // 60) % 60:02d}:{seconds % 60:06.3f}"
        )
        return text.replace(".", ",") if comma else text

    comma = kind == ".srt"
    entries, blocks, numbered = [], ["WEBVTT"], []
    for number, (begin_s, end_s, text) in enumerate(cues, 1):
        entries.append({"text": text, "start": begin_s, "duration": end_s - begin_s})
        block = f"{clock(begin_s, comma)} --> {clock(end_s, comma)}\n{text}"
        blocks.append(block)
        numbered.append(f"{number}\n{block}")
    if kind == ".json":
        return json.dumps(entries)
    return "\n\n".join(blocks if kind == ".vtt" else numbered)


@pytest.mark.parametrize("kind", [".vtt", ".srt", ".json"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_lines_that_are_displayed_again_are_used_once(tmp_path, kind, count):
    track = track_of(tmp_path, f"a{kind}", as_file(kind, ROLLING[:count]))
    assert [cue.text for cue in track.cues] == ["hello there", "how are you", "we sign"][
        :count
    ] and track.scrolls


def youtube(tmp_path, kind, cues, suffix=""):
    video = VIDEOS[0]
    (tmp_path / f"{video}{suffix}{kind}").write_text(
        cues if isinstance(cues, str) else as_file(kind, cues)
    )
    corpus = youtube_asl.read(tmp_path, ("train",))
    clips = [(row.start_s, row.end_s, row.text) for row in corpus.rows["train"]]
    return clips, corpus.notes


@pytest.mark.parametrize("kind", [".vtt", ".srt", ".json"])
@pytest.mark.parametrize(
    ("cues", "clips", "note"),
    [
        (
            ROLLING,
            [(0, 1.5, "hello there"), (1.5, 3.5, "how are you"), (3.5, 7, "we sign")],
            "2 captions overlap",
        ),
        (
            [(0, 3, "a"), (2, 5, "b"), (5, 6, "c")],
            [(0, 2, "a"), (2, 5, "b"), (5, 6, "c")],
            "1 captions overlap",
        ),
        ([(2, 5, "b"), (0, 3, "a")], [(0, 2, "a"), (2, 5, "b")], "1 captions overlap"),
        (
            [(0, 9, "a"), (1, 2, "b"), (3, 4, "c")],
            [(0, 1, "a"), (1, 2, "b"), (3, 4, "c")],
            "1 captions overlap",
        ),
        ([(0, 3, "a"), (0, 3, "b")], [(0, 3, "a b")], "1 captions begin together"),
        ([(0, 3, "a"), (0, 3, "a")], [(0, 3, "a")], "1 captions begin together"),
        ([(0, 3, "a"), (0.15, 9, "b")], [(0.15, 9, "b")], "1 captions overlap"),
        ([(0, 3, "a"), (3, 5, "a")], [(0, 3, "a"), (3, 5, "a")], ""),
        (
            [(0, 3, "a"), (1, 2, "[Music]"), (3, 4, "♪")],
            [(0, 3, "a")],
            "2 captions have no words",
        ),
    ],
)
def test_clips_of_a_video_do_not_overlap_and_changes_are_counted(
    tmp_path, kind, cues, clips, note
):
    found, notes = youtube(tmp_path, kind, cues)
    assert found == clips and note in " ".join(notes)
    assert f"{len(clips)} of " in notes[0]
    for one, other in pairwise(found):
        assert one[1] <= other[0]


def test_automatic_json3_captions_become_clips_that_do_not_overlap(tmp_path):
    found, notes = youtube(tmp_path, ".json3", json.dumps(AUTOMATIC), ".en")
    assert found == [(1, 2.51, "among other things"), (2.51, 6.51, "we sign")]
    assert "2 of 3 captions kept" in notes[
        0
    ] and "1 videos have automatic captions" in "\n".join(notes)


def test_counts_are_correct_if_captions_cannot_be_read(tmp_path):
    files = {
        f"{VIDEOS[0]}.en.vtt": "WEBVTT\n\n00:00:01,000 --> 00:00:02,000\nHello\n\nx --> y\nlost\n",
        f"{VIDEOS[1]}.en.srt": as_file(".srt", [(1, 2, "You"), (3, 4, "[Music]")]),
        f"{VIDEOS[2]}.en.vtt": "WEBVTT\n\nx --> y\nlost\n",
        f"{VIDEOS[3]}.en.srt": "<html>Too many requests</html>",
        f"{VIDEOS[4]}.en.srv3": "<timedtext/>",
        f"{VIDEOS[5]}.en.json3": "{",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join([*VIDEOS, "-unknown-00"]))
    rows = youtube_asl.read(tmp_path, ("train", "dev", "test"), ids=str(ids))
    notes = rows.notes
    assert [row.text for row in rows.rows["train"]] == ["Hello", "You"]
    assert "2 of 3 captions kept" in notes[0]
    assert (
        "1 captions have no words without sounds, note signs and names, and are left out"
        in notes
    )
    lost = f"2 captions have times that cannot be read, and are left out ({VIDEOS[0]}, {VIDEOS[2]})"
    assert lost in notes
    assert (
        "2 videos have caption files without a readable caption, and are left out "
        f"({VIDEOS[2]}, {VIDEOS[3]})" in notes
    )
    assert (
        f"1 videos have captions that cannot be read, and are left out ({VIDEOS[5]})"
        in notes
    )
    listed = "\n".join(notes)
    other = r"^1 videos have captions in none of the formats"
    assert re.search(rf"{other}.*\({VIDEOS[4]}\.en\.srv3\)$", listed, re.MULTILINE)
    assert re.search("^1 videos have no captions.*-unknown-00", listed, re.MULTILINE)


def test_the_error_of_a_build_without_readable_captions_has_the_reason(tmp_path):
    (tmp_path / f"{VIDEOS[0]}.en.vtt").write_text("WEBVTT\n\nx --> y\nlost\n")
    with pytest.raises(
        UserError,
        match=r"got none .*1 videos have caption files without a readable caption",
    ):
        build("youtube_asl", tmp_path, tmp_path / "out", Options(workers=1))


@pytest.mark.parametrize("kind", [".vtt", ".srt", ".json3"])
def test_shards_are_built_from_every_kind_of_captions(tmp_path, kind):
    content = json.dumps(
        {"events": [{"tStartMs": 500, "dDurationMs": 1000, "segs": [{"utf8": "Hello"}]}]}
    )
    if kind != ".json3":
        content = as_file(kind, [(0.5, 1.5, "Hello")])
    (tmp_path / "yt").mkdir()
    (tmp_path / "yt" / f"{VIDEOS[0]}.en{kind}").write_text(content)
    write_video(tmp_path / "yt" / f"{VIDEOS[0]}.mp4", 30)
    build(
        "youtube_asl",
        tmp_path / "yt",
        tmp_path / "out",
        Options(short_side=16, workers=1, splits=("train",)),
    )
    assert (tmp_path / "out" / "train-000000.tar").is_file()
