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

from flallm_ds import files
from flallm_ds.cli.translate import translate
from flallm_ds.cli.videos import find_videos, read_spans
from flallm_ds.command import bind, read_words
from flallm_ds.errors import UserError
from flallm_ds.inference.journal import open_journal
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
    assert by_name["b.mp4"]["num_frames"] == 7
    assert (by_name["b.mp4"]["start_s"], by_name["b.mp4"]["end_s"]) == (0.0, 2.0)
    said = capsys.readouterr()
    assert said.out == "" and "translate: 4/4 videos" in said.err
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


def test_a_folder_is_a_video_or_has_videos(videos: Path, capsys: Any) -> None:
    assert find_videos([videos / "frames"], None) == [videos / "frames"]
    assert [path.name for path in find_videos([videos], None)] == [
        "a.mp4", "b.mp4", "broken.mp4", "frames",
    ]  # fmt: skip
    assert capsys.readouterr().err == ""
    write_video(videos / "2026" / "c.mp4", 3)
    assert len(find_videos([videos], None)) == 4
    assert f"are not translated; name them: {videos / '2026'}\n" in capsys.readouterr().err
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
    translate((video,), model=str(run), stream=True)
    assert "and --stream translates it as one sentence" in capsys.readouterr().err
    translate((video,), model=str(model), stream=True)
    assert "warning" not in capsys.readouterr().err


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


# --- an interrupted call


@pytest.fixture
def many(tmp_path: Path, long_video: tuple[Path, list]) -> Path:
    """A folder: three short videos, a broken one, a long one and another short one."""
    folder = tmp_path / "many"
    for number, name in enumerate(("a", "b", "c", "f")):
        write_video(folder / f"{name}.mp4", 12 + 2 * number)
    (folder / "d.mp4").write_bytes(b"no video")
    shutil.copy(long_video[0], folder / "e.mp4")
    return folder


def killed_call(journal: Path, num_lines: int, *words: object) -> None:
    """Run `flallm translate` in a process, and kill it when a journal has so many lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flallm_ds", "translate", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not journal.exists() or journal.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, "the call ended before it was killed"
        time.sleep(0.001)
    process.kill()
    process.wait()


def test_a_killed_call_is_resumed_to_the_same_bytes(
    many: Path, model: Path, translator: Translator, tmp_path: Path, capsys: Any
) -> None:
    def call(out: Path, **options: Any) -> str:
        with pytest.raises(UserError, match=r"Cannot translate 1 of 6 videos: .*d\.mp4"):
            translate((many,), model=str(model), out=out, nbest=2, **options)
        return capsys.readouterr().err

    out, journal = tmp_path / "out.jsonl", tmp_path / ".partial-out.jsonl"
    # The model, two lines of each short video and of the broken one, one of the long one.
    words = (many, f"--model={model}", f"--out={out}", "--nbest=2")
    killed_call(journal, 1 + 4 * 2 + 1, *words)
    assert not out.exists()
    with pytest.raises(UserError, match=r"has 3 translated .*--nbest 2, got 1") as caught:
        translate((many,), model=str(model), out=out)
    assert "was made with other options" in str(caught.value)
    said = call(out)
    assert (
        "3 of 6 videos are translated already. Again: 0 changed since then, 1 with an error"
        in said
    )
    assert "translate: 3/3 videos" in said
    assert call(tmp_path / "undisturbed.jsonl").count("already") == 0
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "many", "out.jsonl", "undisturbed.jsonl",
    ]  # fmt: skip


def test_killed_subtitles_are_resumed(
    many: Path, model: Path, translator: Translator, tmp_path: Path, capsys: Any
) -> None:
    def call(folder: Path) -> str:
        with pytest.raises(UserError, match=r"Cannot translate 1 of 6 videos: .*d\.mp4"):
            translate((many,), model=str(model), out=folder, subtitles="srt")
        return capsys.readouterr().err

    folder = tmp_path / "subtitles"
    words = (many, f"--model={model}", f"--out={folder}", "--subtitles=srt")
    killed_call(folder / "translated.jsonl", 1 + 3, *words)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.srt")}
    said = call(folder)
    # The kill may be between the line of a video and the name of its file.
    assert f"{len(written)} of 6 videos are translated already" in said
    assert {path.name for path in written} >= {"a.srt", "b.srt"}
    assert all(path.stat().st_mtime_ns == made for path, made in written.items())
    call(tmp_path / "undisturbed")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["a.srt", "b.srt", "c.srt", "e.srt", "f.srt", "translated.jsonl"]
    for name in names[:-1]:
        content = (folder / name).read_bytes()
        assert content == (tmp_path / "undisturbed" / name).read_bytes()
    # Complete: another call translates only what is new.
    (many / "d.mp4").unlink()
    write_video(many / "g.mp4", 10)
    (folder / "b.srt").unlink()
    translate((many,), model=str(model), out=folder, subtitles="srt")
    said = capsys.readouterr().err
    assert "4 of 6 videos are translated already." in said and "2/2 videos" in said
    assert (folder / "b.srt").exists() and (folder / "g.srt").exists()


def test_the_end_of_a_journal_that_is_cut_is_translated_again(
    many: Path, model: Path, translator: Translator, tmp_path: Path
) -> None:
    """At any byte, as a kill or a full disk may leave it."""
    (many / "d.mp4").unlink()
    (many / "e.mp4").unlink()
    out, journal = tmp_path / "out.jsonl", tmp_path / ".partial-out.jsonl"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flallm_ds.inference.translation_files.write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            translate((many,), model=str(model), out=out)
    whole = journal.read_bytes()
    translate((many,), model=str(model), out=out)
    expected = out.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole), len(whole) // 7):
        journal.write_bytes(whole[:size] + b"\0\0\n" * (size % 2))
        translate((many,), model=str(model), out=out)
        assert out.read_bytes() == expected and not journal.exists()


@pytest.fixture
def stopped(videos: Path, model: Path, translator: Translator, tmp_path: Path) -> Path:
    """The journal of a call that has translated a.mp4 and b.mp4 of three videos."""
    (videos / "broken.mp4").unlink()
    journal = tmp_path / ".partial-out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        translations = Translator.translations

        def stop(self: Translator, video: Path, *args: Any, **options: Any) -> Any:
            if video.name == "frames":
                raise KeyboardInterrupt
            return translations(self, video, *args, **options)

        patch.setattr(Translator, "translations", stop)
        with pytest.raises(KeyboardInterrupt):
            translate((videos,), model=str(model), out=tmp_path / "out.jsonl")
    assert journal.exists()
    return journal


def test_an_interrupted_call_says_how_to_resume(capsys: Any, stopped: Path) -> None:
    said = capsys.readouterr().err
    assert "2 of 3 videos are translated. Run the same command again to resume." in said


def test_another_model_or_other_videos_are_refused(
    stopped: Path, videos: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    before = stopped.read_bytes()
    other = Path(shutil.copytree(model, tmp_path / "other"))
    settings = json.loads((other / "flallm.json").read_text())
    settings["scores"]["epoch"] = 99
    (other / "flallm.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"made with another model .*, got {other}"):
        translate((videos,), model=str(other), out=out)
    with pytest.raises(UserError, match=r"belongs to a call with other videos: .*a\.mp4"):
        translate((videos / "b.mp4", videos / "frames"), model=str(model), out=out)
    with pytest.raises(UserError, match=r"\(--long not given, got True; --bits not given"):
        translate((videos,), model=str(model), out=out, long=True, bits=32)
    assert stopped.read_bytes() == before and not out.exists()
    # A copy of the model elsewhere is the same model.
    copied = shutil.copytree(model, tmp_path / "copied")
    translate((videos,), model=str(copied), out=out)
    assert len(records(out)) == 3 and not stopped.exists()


def test_a_changed_video_is_translated_again_and_a_new_path_is_taken_over(
    stopped: Path,
    videos: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    capsys.readouterr()
    write_video(videos / "b.mp4", 30)
    monkeypatch.chdir(tmp_path)
    translate((Path("videos"),), model=str(model), out=Path("out.jsonl"))
    assert (
        "1 of 3 videos are translated already. Again: 1 changed since then"
        in capsys.readouterr().err
    )
    assert [record["path"] for record in records(tmp_path / "out.jsonl")] == [
        "videos/a.mp4", "videos/b.mp4", "videos/frames",
    ]  # fmt: skip
    assert records(tmp_path / "out.jsonl")[1]["end_s"] > 2.9


def test_two_calls_do_not_write_the_same_file(
    stopped: Path, videos: Path, model: Path, tmp_path: Path
) -> None:
    with (
        open_journal(stopped, json.loads(stopped.read_text().splitlines()[0])["made_with"]),
        pytest.raises(UserError, match=r"partial-out\.jsonl is in use by process"),
    ):
        translate((videos,), model=str(model), out=tmp_path / "out.jsonl")


def test_a_file_that_is_no_journal_is_not_overwritten(
    videos: Path, model: Path, translator: Translator, tmp_path: Path
) -> None:
    (videos / "translated.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match="its first line does not name a model"):
        translate((videos,), model=str(model), out=videos, subtitles="vtt")
    assert (videos / "translated.jsonl").read_text() == '{"mine": 1}\n'


def test_a_file_that_cannot_be_written_ends_the_call(
    videos: Path, model: Path, translator: Translator, tmp_path: Path
) -> None:
    """It is not an error of the video that is translated at that time."""
    out = tmp_path / "subtitles"
    out.mkdir()
    (out / ".partial-b.srt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*b\.srt"):
        translate((videos,), model=str(model), out=out, subtitles="srt")
    assert [path.name for path in out.glob("*.srt")] == ["a.srt"]
    translate(
        (videos / "a.mp4", videos / "b.mp4"), model=str(model), out=out, subtitles="srt"
    )
    assert len(times_of(out / "b.srt")) == 1


# --- subtitles of several videos


def test_each_video_of_a_list_has_its_subtitles_next_to_it(
    videos: Path,
    long_video: tuple[Path, list],
    model: Path,
    translator: Translator,
    tmp_path: Path,
    capsys: Any,
) -> None:
    shutil.copy(long_video[0], videos / "b.mp4")
    (videos / "frames").rename(videos / "frames.1")
    named = "\n".join(str(videos / name) for name in ("broken.mp4", "b.mp4"))
    (tmp_path / "list.txt").write_text(named)
    with pytest.raises(UserError, match=r"Cannot translate 1 of 3 videos: .*broken\.mp4"):
        translate(
            (videos / "frames.1",),
            list=tmp_path / "list.txt",
            model=str(model),
            out=videos,
            subtitles="vtt",
        )
    assert sorted(path.name for path in videos.glob("*.vtt")) == ["b.vtt", "frames.1.vtt"]
    assert_near(times_of(videos / "b.vtt"), long_video[1])
    translate((videos / "b.mp4",), model=str(model), out=tmp_path / "b.vtt")
    assert (videos / "b.vtt").read_bytes() == (tmp_path / "b.vtt").read_bytes()
    errors = [
        line["error"]
        for line in records(videos / "translated.jsonl")[1:]
        if "error" in line
    ]
    assert len(errors) == 1 and "broken.mp4" in errors[0]


def test_a_stop_before_a_subtitle_file_has_its_name_is_resumed(
    videos: Path,
    model: Path,
    translator: Translator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "subtitles"
    (videos / "broken.mp4").unlink()

    def stop_at(moment: str) -> None:
        move = files.move

        def stop(path: Path, target: Path) -> None:
            is_of_b = target.name == "b.srt"
            if is_of_b and moment == "before":
                raise KeyboardInterrupt
            move(path, target)
            if is_of_b:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "move", stop)
            with pytest.raises(KeyboardInterrupt):
                translate((videos,), model=str(model), out=out, subtitles="srt")

    stop_at("before")
    assert not (out / "b.srt").exists()
    stop_at("after")
    assert (out / "b.srt").exists()
    translate((videos,), model=str(model), out=out, subtitles="srt")
    assert sorted(path.stem for path in out.glob("*.srt")) == ["a", "b", "frames"]


def test_subtitles_that_the_user_or_another_video_has_are_not_overwritten(
    videos: Path, model: Path, translator: Translator, tmp_path: Path
) -> None:
    out = tmp_path / "subtitles"
    out.mkdir()
    (out / "b.vtt").write_text("mine")
    (videos / "broken.mp4").unlink()
    with pytest.raises(UserError, match=r"b\.vtt already exists, and was not made from"):
        translate((videos,), model=str(model), out=out, subtitles="vtt")
    assert [path.name for path in out.iterdir()] == ["b.vtt"]
    (out / "b.vtt").unlink()
    translate((videos,), model=str(model), out=out, subtitles="vtt")
    before = (out / "a.vtt").read_bytes()
    write_video(tmp_path / "other" / "a.mp4", 12)
    with pytest.raises(UserError, match=r"a\.vtt already exists, and was not made from"):
        translate((tmp_path / "other",), model=str(model), out=out, subtitles="vtt")
    assert (out / "a.vtt").read_bytes() == before


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
    write_video(folder / "same" / "a.mov", 5)
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
        ("{}/two {}/two/a.mp4", "VIDEO must be named once, got {}/two/a.mp4 twice"),
        (
            "{}/two --subtitles=vtt",
            "--subtitles must go with --out=FOLDER, got --subtitles=vtt alone",
        ),
        (
            "{}/two --subtitles=vtt --out={}/x.vtt",
            "--out must be a folder with --subtitles",
        ),
        (
            "{}/two --subtitles=vtt --out={}/v.mp4",
            "--out must be a folder with --subtitles",
        ),
        ("{}/two --subtitles=vtt --out={}/no/x", "--out must be a folder in which you may"),
        (
            "{}/two {}/same --subtitles=srt --out={}/x",
            "got {}/two/a.mp4 and {}/same/a.mov, which would both be {}/x/a.srt",
        ),
        (
            "{}/two --subtitles=srt --out={}/x --nbest=2",
            "--subtitles must go with one hypothesis, got --nbest=2",
        ),
        (
            "{}/v.mp4 --subtitles=srt --out={}/x --follow",
            "--subtitles must go without --spans and --follow",
        ),
        ("{}/v.mp4 --idle_s=5", "--idle_s must go with --follow, got --idle_s=5.0 alone"),
        ("{}/v.mp4 --follow --idle_s=1e99", "--idle_s must be above 0 and at most 86400"),
        ("{}/v.mp4 --stream --out={}/x.vtt", "--stream must go without --out"),
        ("{}/v.mp4 --beams=99999999999999999999", "--beams must be at least 1 and at most"),
        ("{}/v.mp4 --nbest=99999999999999999999", "--nbest must be at least 1 and at most"),
        (
            "{}/v.mp4 --length_penalty=2 --beams=1",
            "--length_penalty must go with several beams, got 2.0 and --beams=1",
        ),
        (
            "{}/v.mp4 --length_penalty=2 --stream",
            "--length_penalty must go with several beams, got 2.0 and --stream",
        ),
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
