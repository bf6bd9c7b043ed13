import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.stats import leakage_notes, overlap_notes, stats, summarise
from tests.helpers.paths import ROOT
from tests.helpers.trees import make_phoenix


def row(text: str, *, signer="", video="", language="de", num_frames=25, fps=25.0) -> dict:
    facts = {
        "text": text,
        "signer": signer,
        "video": video,
        "language": language,
        "size": 500_000,
    }
    return facts | {"num_frames": num_frames, "fps": fps}


def line(report: str, *begin: str) -> list[str]:
    """Return the words of the first line that begins with `begin`."""
    for cells in map(str.split, report.splitlines()):
        if cells[: len(begin)] == list(begin):
            return cells
    raise AssertionError(f"no line begins with {begin}: {report}")


def test_sizes_are_counted_by_split():
    train = [
        row("a", signer="A", video="x", num_frames=50, fps=25.0),
        row("b", signer="B", video="x"),
    ]
    report = summarise({"train": train, "dev": [row("a", num_frames=90_000)]})
    assert line(report, "train") == ["train", "2", "75", "0.00", "2", "1", "1.0"]
    assert line(report, "dev") == ["dev", "1", "90,000", "1.00", "0", "0", "0.5"]


def test_unknown_words_are_counted_as_types_and_as_running_words():
    train = [row("sonne und regen, heute"), row("regen und wind")]
    report = summarise(
        {"train": train, "test": [row("schnee , schnee und schnee oder regen")]}
    )
    words = report.split("\n\n")[1]
    # The words of train are: sonne und regen , heute regen und wind. Singletons are sonne,
    # the comma, heute and wind.
    assert line(words, "train") == ["train", "8", "6", "4", "-", "-"]
    # Unknown are schnee (3 times) and oder, of five types and seven words.
    assert " ".join(line(words, "test")) == "test 7 5 4 2 (40.0 %) 4 (57.1 %)"


def test_without_a_training_split_no_word_is_unknown():
    words = summarise({"dev": [row("a b")]}).split("\n\n")[1]
    assert " ".join(line(words, "dev")) == "dev 2 2 2 - -"


@pytest.mark.parametrize(
    "language", ["zh", "zh-CN", "zh_CN", "zh-Hant", "Chinese", "ja", "ja_XX", "th"]
)
def test_languages_without_spaces_are_counted_by_character(language):
    words = summarise({"train": [row("你好，你 好", language=language)]}).split("\n\n")[1]
    assert line(words, "train")[1:3] == ["5", "3"]


def test_lengths_are_printed_in_frames_seconds_and_words():
    train = [row("a", num_frames=n, fps=10.0) for n in (5, 20, 45)]
    train.append(row("a b c", num_frames=100, fps=10.0))
    lengths = summarise({"train": train}).split("\n\n")[2]
    assert " ".join(line(lengths, "train")) == "train 5, 32, 100 0.5, 3.2, 10.0 1, 1, 3"


def test_the_histogram_counts_every_clip_once():
    train = [row("a", num_frames=n) for n in (24, 25, 26, 49, 50, 74, 10_000)]
    histogram = summarise({"train": train}).split("\n\n")[3].splitlines()
    assert histogram[0].split() == ["seconds", "frames", "train"]
    shares = [float(bin.partition(" %")[0].split()[-1]) for bin in histogram[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5) and shares[0] == 85.7


def test_a_clip_of_exactly_one_second_is_in_the_bin_from_one_second():
    rows = [row("a", num_frames=n, fps=24.0) for n in [24] * 3 + [48] * 3 + [230]]
    histogram = summarise({"train": rows}).split("\n\n")[3].splitlines()
    assert line("\n".join(histogram), "1", "to", "2")[3:6] == ["24", "to", "47"]
    assert [line.split()[6] for line in histogram[1:4]] == ["0.0", "42.9", "42.9"]


@pytest.mark.parametrize("fps", [10.0, 23.976, 24.0, 25.0, 30.0, 50.0])
@pytest.mark.parametrize("longest", [1, 2, 5, 13])
def test_no_bin_of_short_clips_is_shorter_than_a_frame(fps, longest):
    rows = [row("a", num_frames=n + 1, fps=fps) for n in range(longest)]
    histogram = summarise({"train": rows}).split("\n\n")[3].splitlines()
    # The bins in frames follow each other: none is "2 to 1", and none overlaps the next.
    ends = []
    for bin in histogram[1:]:
        frames = bin[len("seconds        ") :].partition("  ")[0]
        first, _, last = re.fullmatch(r"(\d+)( to (\d+)| and over)?", frames).groups()
        assert not ends or int(first) == ends[-1] + 1
        ends.append(int(last or first))
    assert ends[-1] >= longest


def test_with_several_frame_rates_the_histogram_is_only_in_seconds():
    report = summarise({"train": [row("a", fps=25.0), row("a", fps=30.0)]})
    assert report.split("\n\n")[3].splitlines()[0].split() == ["seconds", "train"]


def test_empty_splits_are_left_out():
    assert "dev" not in summarise({"train": [row("a")], "dev": []})
    assert summarise({"train": []}) == "no clips"


def test_overlaps_of_splits_are_noted_with_counts_and_examples():
    train = [row("guten tag", signer="A", video="v1"), row("x", signer="B", video="v2")]
    test = [
        row("guten tag", signer="A", video="v2"),
        row("y", signer="A", video="v2"),
        row("z"),
    ]
    notes = overlap_notes({"train": train, "dev": [row("q")], "test": test})
    assert notes == [
        "train and test share 1 source videos (2 clips of test: v2), which is leakage",
        "train and test share 1 signers (2 clips of test: A) and 1 texts (1 clips of "
        "test: guten tag)",
    ]
    assert leakage_notes({"train": train, "test": test}) == notes[:1]


def test_empty_signers_and_videos_are_no_overlap():
    assert overlap_notes({"train": [row("a")], "dev": [row("b")]}) == []


def test_long_examples_are_shortened_and_only_a_few_are_named():
    rows = [row(f"{number} {'word ' * 20}") for number in range(5)]
    (note,) = overlap_notes({"train": rows, "dev": rows})
    assert "5 texts" in note and "3 word" not in note and len(note) < 250


def test_the_command_prints_the_tables_of_a_folder(tmp_path):
    build("phoenix14t", make_phoenix(tmp_path), tmp_path / "shards", Options(workers=1))
    done = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "stats.py"), str(tmp_path / "shards")],
        capture_output=True, text=True, cwd="/", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert line(done.stdout, "train")[:3] == ["train", "7", "28"]
    assert "note: train and dev share 2 signers" in done.stdout


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"index\.json"):
        stats(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_texts_are_printed_safely_in_any_encoding(tmp_path, encoding):
    """Control characters are escaped. A closed pipe, as with `| head`, is no error."""
    rows = ["video,text,split"]
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        cv2.imwrite(str(tmp_path / split / "0.png"), np.zeros((64, 64, 3), np.uint8))
        rows.append(f"{split},Gr\u00fc\u00dfe \u202egnp,{split}")
    (tmp_path / "m.csv").write_text("\n".join(rows), encoding="utf-8")
    build(
        "manifest", tmp_path / "m.csv", tmp_path / "out", Options(workers=1), language="de"
    )
    command = [sys.executable, str(ROOT / "shards" / "stats.py"), str(tmp_path / "out")]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        command, env=env, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    text = r"Gr\xfc\xdfe" if encoding == "ascii" else "Gr\u00fc\u00dfe"
    assert rf"1 texts (1 clips of dev: {text} \u202egnp)" in done.stdout
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        command, env=env, stdout=writes, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")
