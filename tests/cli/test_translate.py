"""`flallm translate`: several videos, long ones, recordings, result files, wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest

from flallm_ds.cli.translate import translate
from flallm_ds.cli.videos import find_videos, read_spans
from flallm_ds.command import bind, read_words
from flallm_ds.errors import UserError
from flallm_ds.inference.translator import Translator
from flallm_ds.sharding.corpora.captions import read_captions
from tests.helpers.exports import ENCODER_DECODER, write_export
from tests.helpers.long_video import write_long_video
from tests.helpers.paths import ROOT
from tests.helpers.trees import write_audio, write_frames, write_video

NUM_SENTENCES = 4


@pytest.fixture(scope="module")
def model(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(ENCODER_DECODER, tiny_corpus, tmp_path_factory.mktemp("m") / "run")


@pytest.fixture(scope="module")
def translator(model: Path) -> Translator:
    return Translator.from_pretrained(model, "cpu")


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A video above 10 s, and the times of its sentences."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    spans = write_long_video(path, NUM_SENTENCES, rests_s=(0.7, 2.0))
    assert spans[-1][1] > 10
    return path, spans


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder with two videos, a file that is no video, a text, and a folder of frames."""
    folder = tmp_path / "videos"
    write_video(folder / "a.mp4", 12)
    write_video(folder / "b.mp4", 20)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("no video")
    write_frames(folder / "frames", 9)
    return folder


@pytest.fixture(autouse=True)
def one_load(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Load the model of the module once."""
    if "translator" in request.fixturenames:
        loaded = request.getfixturevalue("translator")
        monkeypatch.setattr(Translator, "from_pretrained", lambda *_, **__: loaded)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def times_of(path: Path) -> list[tuple[float, float]]:
    return [(cue.start_s, cue.end_s) for cue in read_captions(path).cues]


def assert_near(found: list[tuple[float, float]], expected: list) -> None:
    assert len(found) == len(expected), found
    for times, span in zip(found, expected, strict=True):
        assert times == pytest.approx(span, abs=0.3)


# --- several videos


def test_each_video_of_a_folder_has_a_line_and_a_broken_one_its_error(
    videos: Path, model: Path, translator: Translator, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"Cannot translate 1 of 4 videos: .*broken\.mp4"):
        translate((videos,), model=str(model), out=out, nbest=2, beams=3)
    by_name = {Path(record["path"]).name: record for record in records(out)}
    assert list(by_name) == ["a.mp4", "b.mp4", "broken.mp4", "frames"]
    assert set(by_name["broken.mp4"]) == {"path", "error"}
    nbest = translator.searching(3, 2).nbest(videos / "a.mp4")
    assert by_name["a.mp4"]["nbest"] == [list(pair) for pair in nbest]
    assert by_name["a.mp4"]["sentence"] == nbest[0][0]
    # 10 frames a second for 2 s, resampled to 12.5 a second; one in 4 is kept.
    assert by_name["b.mp4"]["num_frames"] == 7 and by_name["b.mp4"]["took_s"] > 0
    assert (by_name["b.mp4"]["start_s"], by_name["b.mp4"]["end_s"]) == (0.0, 2.0)
    said = capsys.readouterr()
    assert said.out == "" and "translate: 4/4 clips" in said.err
    assert said.err.count("error: ") == 1


def test_sentences_of_several_videos_are_printed_with_their_paths(
    videos: Path, model: Path, translator: Translator, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "list.txt").write_text(f"{videos / 'b.mp4'}\n\n{videos / 'frames'}\n")
    translate((videos / "a.mp4",), model=str(model), list=tmp_path / "list.txt")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    named = [videos / name for name in ("a.mp4", "b.mp4", "frames")]
    assert lines == [[str(path), translator.translate(path)] for path in named]


def test_words_and_a_comma_list_name_videos() -> None:
    def named(*argv: str) -> Any:
        return bind(translate, *read_words([*argv, "--model=m"]))["video"]

    assert named("a,b.mp4", "c") == (Path("a,b.mp4"), Path("c"))
    assert named("--video=a,b") == (Path("a"), Path("b"))
    assert "video" not in bind(translate, *read_words(["--model=m", "--list=f"]))


def test_a_folder_is_a_video_or_has_videos(videos: Path, tmp_path: Path) -> None:
    assert find_videos([videos / "frames"], None) == [videos / "frames"]
    assert [path.name for path in find_videos([videos], None)] == [
        "a.mp4", "b.mp4", "broken.mp4", "frames",
    ]  # fmt: skip
    shutil.copy(videos / "frames" / "images0001.png", videos)
    with pytest.raises(UserError, match="with 1 images and 4 videos"):
        find_videos([videos], None)


# --- long videos


def test_subtitles_have_the_times_of_the_sentences(
    long_video: tuple[Path, list],
    model: Path,
    translator: Translator,
    tmp_path: Path,
    capsys: Any,
) -> None:
    path, spans = long_video
    for suffix in (".vtt", ".srt"):
        out = tmp_path / f"out{suffix}"
        translate((path,), model=str(model), out=out)
        assert_near(times_of(out), spans)
        lines = capsys.readouterr().out.splitlines()
        sentences = [line.split("\t")[1] for line in lines]
        assert sentences == [cue.text for cue in read_captions(out).cues]
    assert lines[0].startswith("00:00:00.") and " - 00:00:0" in lines[0]


def test_a_video_above_the_limit_is_cut_with_a_note(
    long_video: tuple[Path, list],
    model: Path,
    translator: Translator,
    tmp_path: Path,
    capsys: Any,
) -> None:
    path, spans = long_video
    out = tmp_path / "out.jsonl"
    translate((path,), model=str(model), out=out)
    assert_near([(line["start_s"], line["end_s"]) for line in records(out)], spans)
    assert (
        "is longer than the longest clip of the training (1.6 s)" in capsys.readouterr().err
    )
    translate((path,), model=str(model), out=out, long=False)
    (whole,) = records(out)
    assert whole["start_s"] == 0 and whole["end_s"] > spans[-1][1]
    assert whole["sentence"] == translator.translate(path)
    assert capsys.readouterr().err == ""


def test_given_spans_are_translated_as_cut_clips(
    long_video: tuple[Path, list],
    model: Path,
    translator: Translator,
    tmp_path: Path,
    capsys: Any,
) -> None:
    path, spans = long_video
    times = tmp_path / "times.csv"
    rows = [f"{start},0:0{end:.3f}" for start, end in spans[:2]]
    times.write_text("\n".join(["start,end", *rows, ""]))
    out = tmp_path / "out.vtt"
    translate((path,), model=str(model), spans=times, out=out)
    assert times_of(out) == [pytest.approx(span) for span in spans[:2]]
    first = capsys.readouterr().out
    # The subtitles give the same spans again.
    translate((path,), model=str(model), spans=out)
    assert capsys.readouterr().out == first
    clip = translator.reader.read(path, *spans[0])
    assert clip is not None and clip.num_sampled == len(clip.frames_THWC)


def test_frames_above_the_limit_of_the_model_are_reported(
    long_video: tuple[Path, list],
    tiny_corpus: Path,
    model: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    run = Path(shutil.copytree(model, tmp_path / "best"))
    settings = json.loads((run / "flallm.json").read_text())
    settings["frames"]["max_frames"] = 5
    (run / "flallm.json").write_text(json.dumps(settings))
    video = write_video_of(tmp_path / "v.mp4", 30)
    translate((video,), model=str(run), long=False)
    assert "the model reads 5 of 10 frames, its limit" in capsys.readouterr().err


def write_video_of(path: Path, num_frames: int) -> Path:
    write_video(path, num_frames)
    return path


# --- recordings


def remuxed(source: Path, path: Path, **options: str) -> Path:
    """Copy the video stream of an mp4 into another container."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return path


CONTAINERS = {
    "v.ts": {},
    "v.mkv": {"live": "1"},
    "v.mp4": {"movflags": "frag_keyframe+empty_moov"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_growing_file_is_translated_window_by_window(
    long_video: tuple[Path, list], translator: Translator, tmp_path: Path, name: str
) -> None:
    whole = remuxed(long_video[0], tmp_path / f"whole_{name}", **CONTAINERS[name])
    content = whole.read_bytes()
    growing = tmp_path / name
    growing.write_bytes(content[: len(content) // 2])
    found = []
    for translation in translator.translations(growing, idle_s=1.0):
        if not found:
            # The first sentence is there before the file is complete.
            with growing.open("ab") as file:
                file.write(content[len(content) // 2 :])
        found.append((translation.start_s, translation.end_s))
    assert_near(found, long_video[1])


def test_images_that_are_added_are_translated(
    long_video: tuple[Path, list], translator: Translator, tmp_path: Path
) -> None:
    from flallm_ds.data.codecs.video import Video

    folder = tmp_path / "frames"
    write_frames(folder, 9)
    numbers = []
    for number, _ in enumerate(Video(folder, idle_s=0.5).frames()):
        if number == 5:
            write_frames(tmp_path / "more", 20)
            for path in sorted((tmp_path / "more").iterdir())[9:]:
                path.rename(folder / path.name)
        numbers.append(number)
    assert len(numbers) == 20


def test_ctrl_c_ends_a_recording_and_leaves_whole_subtitles(
    long_video: tuple[Path, list], model: Path, tmp_path: Path
) -> None:
    video = remuxed(long_video[0], tmp_path / "v.ts")
    out = tmp_path / "v.vtt"
    words = [
        "translate",
        video,
        f"--model={model}",
        "--follow",
        "--idle_s=600",
        f"--out={out}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "flallm_ds", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(NUM_SENTENCES - 1)]
    assert all(" - " in line for line in lines) and not out.exists()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    # The sentence that was not finished ends with the video.
    assert_near(times_of(out), long_video[1])


# --- wrong input


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, long_video: tuple[Path, list]) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_video(folder / "v.mp4", 5)
    write_video(folder / "two" / "a.mp4", 5)
    write_video(folder / "two" / "b.mp4", 5)
    (folder / "empty").mkdir()
    (folder / "no.mp4").write_bytes(b"no video")
    write_audio(folder / "audio.mp4")
    (folder / "late.csv").write_text("3,4\n1,2\n")
    (folder / "back.csv").write_text("3,2\n")
    (folder / "words.csv").write_text("1,2\nhello,world\n")
    (folder / "none.srt").write_text("")
    (folder / "huge.csv").write_text("0,1e30\n")
    (folder / "list.txt").write_text("gone.mp4\n")
    (folder / "run" / "best").mkdir(parents=True)
    (folder / "run" / "best" / "flallm.json").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "VIDEO must be given, got nothing"),
        ("{}/empty", "VIDEO must be a video, a folder of frames or a folder of videos"),
        ("{}/no.mp4", "Cannot open video {}/no.mp4"),
        ("{}/audio.mp4", "Cannot read video {}/audio.mp4: it has no video stream"),
        ("--list={}/list.txt", "--list must be an existing path, got gone.mp4"),
        ("--list={}/none.srt", "--list must name at least one video"),
        ("{}/v.mp4 --out={}/x.txt", "--out must end in .jsonl, .vtt or .srt, got {}/x.txt"),
        ("{}/v.mp4 --out={}/two", "--out must end in"),
        ("{}/v.mp4 --out={}/no/x.vtt", "--out must be in an existing folder"),
        ("{}/two --out={}/x.srt", "--out must end in .jsonl for several videos"),
        (
            "{}/v.mp4 --spans={}/none.srt --out={}/none.srt",
            "--spans must have at least one",
        ),
        (
            "{}/v.mp4 --spans={}/late.csv",
            "got 1 to 2 s as span 2 of {}/late.csv, after one",
        ),
        (
            "{}/v.mp4 --spans={}/back.csv",
            "each with its start before its end, got 3 to 2 s",
        ),
        ("{}/v.mp4 --spans={}/huge.csv", "got 0 to 1e+30 s as span 1"),
        ("{}/v.mp4 --spans={}/words.csv", "line 2 is not START,END but 'hello,world'"),
        ("{}/two --spans={}/late.csv", "--spans must go with one video, got 2"),
        ("{}/two --follow", "--follow must go with one video, got 2"),
        ("{}/v.mp4 --follow", "Cannot follow {}/v.mp4: only MPEG-TS, Matroska"),
        ("{}/v.mp4 --follow --long", "got --long and --follow"),
        ("{}/v.mp4 --follow --idle_s=1e99", "--idle_s must be above 0 and at most 86400"),
        ("{}/v.mp4 --stream --out={}/x.vtt", "--stream must go without --out"),
        ("{}/v.mp4 --beams=99999999999999999999", "--beams must be at least 1 and at most"),
        ("{}/v.mp4 --nbest=99999999999999999999", "--nbest must be at least 1 and at most"),
        ("{}/v.mp4 --length_penalty=1e300", "--length_penalty must be from -100 to 100"),
    ],
)
def test_wrong_input_is_one_sentence(place: Path, words: str, sentence: str) -> None:
    """Before the model is loaded: the one that is named is broken."""
    argv = [word.replace("{}", str(place)) for word in words.split()]
    with pytest.raises(UserError) as caught:
        translate(**bind(translate, *read_words([*argv, f"--model={place / 'run'}"])))
    assert sentence.replace("{}", str(place)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_file_may_not_be_an_input_or_a_folder(place: Path, model: Path) -> None:
    spans = place / "t.srt"
    spans.write_text("1\n00:00:00,000 --> 00:00:00,400\nx\n")
    with pytest.raises(UserError, match="--out must be another file than the inputs"):
        translate((place / "v.mp4",), model=str(model), spans=spans, out=spans)
    (place / "folder.vtt").mkdir()
    with pytest.raises(UserError, match="--out must be a file, got the folder"):
        translate((place / "v.mp4",), model=str(model), out=place / "folder.vtt")
    assert read_spans(spans) == [(0.0, 0.4)]


def test_an_error_of_the_only_video_leaves_no_result(
    place: Path, model: Path, translator: Translator
) -> None:
    late = place / "after.csv"
    late.write_text("0,0.3\n0.3,9\n")
    before = sorted(place.iterdir())
    with pytest.raises(UserError, match="--spans must be within video"):
        translate((place / "v.mp4",), model=str(model), spans=late, out=place / "x.jsonl")
    assert sorted(place.iterdir()) == before


def test_sentences_with_signs_of_the_format_are_escaped() -> None:
    from flallm_ds.inference.subtitles import clock, srt_cue, vtt_cue

    assert vtt_cue(1, 0, 1.5, "a --> b\n\nc <i>") == (
        "1\n00:00:00.000 --> 00:00:01.500\na --&gt; b c &lt;i&gt;\n\n"
    )
    assert srt_cue(2, 59.9996, 3600, "a & b") == (
        "2\n00:01:00,000 --> 01:00:00,000\na & b\n\n"
    )
    times = [clock(number / 1000) for number in (0, 1, 999, 1000, 59_999, 60_000)]
    assert all(before < after for before, after in pairwise(times))
