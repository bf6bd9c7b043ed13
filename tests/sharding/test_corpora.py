import json
from itertools import chain

import pytest

from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import SPLITS, how2sign, manifest, phoenix14t
from tests.helpers.trees import (
    PHOENIX_HEADER,
    built_clips,
    make_how2sign,
    make_phoenix,
    write_frames,
)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("with_1", [False, True])
def test_phoenix_is_read_with_either_line_end_and_either_folder_layout(
    tmp_path, newline, with_1
):
    release = make_phoenix(tmp_path, newline=newline, with_1=with_1)
    rows = phoenix14t.read(release, ("train", "dev")).rows
    assert [len(table) for table in rows.values()] == [7, 2]
    row = rows["train"][3]
    assert (row.id, row.signer, row.video) == (
        "01April_2010_train_tagesschau-4",
        "Signer01",
        "01April_2010_train_tagesschau",
    )
    assert (row.text, row.gloss, row.language) == (
        'am tag 3 "schönes" wetter',
        "TAG 3 WETTER",
        "de",
    )
    assert len(list(row.path.glob("*.png"))) == 4


@pytest.mark.parametrize("frames", ["", "/1"])
@pytest.mark.parametrize("pattern", ["/*.png", "/1/*.png", ""])
def test_phoenix_frames_are_found_for_each_pattern_in_the_table(tmp_path, frames, pattern):
    write_frames(tmp_path / f"clip{frames}", 2)
    table = tmp_path / "x.csv"
    table.write_text(
        f"{PHOENIX_HEADER}\nclip|{pattern and 'clip' + pattern}|-1|-1|Signer01|A|b\n"
    )
    (row,) = phoenix14t.read_rows(table, tmp_path)
    assert len(list(row.path.glob("*.png"))) == 2


def test_phoenix_frames_are_stretched_only_with_the_option(tmp_path):
    release = make_phoenix(tmp_path)
    for stretch, stretch_hw in ((False, None), (True, (300, 210))):
        rows = phoenix14t.read(release, ("dev",), stretch=stretch).rows["dev"]
        assert {row.stretch_hw for row in rows} == {stretch_hw}
    out = tmp_path / "out"
    build(
        "phoenix14t",
        release,
        out,
        Options(short_side=16, workers=1, splits=("dev",)),
        stretch=True,
    )
    sizes = set()
    for _, frames in built_clips(out, "dev").values():
        for frame in frames:
            sizes.add(frame.shape[:2])
    assert sizes == {(23, 16)}  # as 300x210; as they are, 26x21, it would be 20x16


def test_phoenix_texts_that_end_in_a_period_are_kept_and_counted(tmp_path):
    release = make_phoenix(tmp_path)
    assert phoenix14t.read(release, ("dev",)).notes == []
    (table,) = release.rglob("*.dev.corpus.csv")
    table.write_text(table.read_text().replace("wetter\n", "wetter .\n", 1))
    corpus = phoenix14t.read(release, ("dev",))
    assert (
        corpus.rows["dev"][0].text.endswith("wetter .")
        and "1 texts end in" in corpus.notes[0]
    )


def test_phoenix_is_found_from_its_folder_its_release_or_the_folder_above(tmp_path):
    release = make_phoenix(tmp_path)
    for place in (tmp_path, release, release / "PHOENIX-2014-T"):
        assert phoenix14t.find_root(place) == release / "PHOENIX-2014-T"
    with pytest.raises(UserError, match="annotations/manual"):
        phoenix14t.find_root(tmp_path / "elsewhere")


def test_the_real_phoenix_test_table_has_642_rows(shared):
    table = shared / "phoenix14t" / "full-test-split.PHOENIX-2014-T.test.corpus.csv"
    rows = phoenix14t.read_rows(table, shared)
    assert len(rows) == 642 and len({row.id for row in rows}) == 642
    for row in rows:
        assert row.text and row.text == row.text.strip() and "\r" not in row.text
        assert row.gloss and row.signer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PHOENIX_HEADER + "\na|b|c", "line 2"),
        ("name|video\na|b", "'speaker'"),
        ("", "'name'"),
        (PHOENIX_HEADER.encode() + b"\n\xff\xfe|||||||", "UTF-8"),
    ],
)
def test_a_broken_table_is_a_user_error_with_its_place(tmp_path, content, message):
    table = tmp_path / "x.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        phoenix14t.read_rows(table, tmp_path)


@pytest.mark.parametrize("delimiter", ["\t", ","])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_how2sign_tables_are_read_with_tab_or_comma(tmp_path, delimiter, newline):
    corpus = how2sign.read(
        make_how2sign(tmp_path, raw=False, delimiter=delimiter, newline=newline), ("train",)
    )
    rows = corpus.rows["train"]
    assert [row.id for row in rows] == [
        "-aB_0-5-rgb_front",
        "-aB_1-5-rgb_front",
        "-ab_0-8-rgb_front",
        "-ab_1-8-rgb_front",
    ]
    assert [row.signer for row in rows] == ["5", "5", "8", "8"] and rows[0].video == "-aB"
    assert rows[0].text == "Hello, you." and rows[2].text == '"Painting" the wall.'
    assert rows[1].text == "My horseâ\x80\x99s nose."
    assert "1 texts with garbled characters, kept" in "\n".join(corpus.notes)


def test_how2sign_cuts_raw_videos_if_they_exist_otherwise_uses_ready_clips(tmp_path):
    raw = how2sign.read(make_how2sign(tmp_path / "raw", raw=True), ("train",))
    ready = how2sign.read(make_how2sign(tmp_path / "ready", raw=False), ("train",))
    assert (
        "re-aligned times (4 of 4" in raw.notes[0]
        and "original times (4 of 4" in ready.notes[0]
    )
    assert (raw.rows["train"][0].start_s, raw.rows["train"][0].end_s) == (0.5, 1.0)
    assert raw.rows["train"][0].path.name == "-aB-5-rgb_front.mp4"
    assert ready.rows["train"][0].start_s is None and ready.rows["train"][0].path.is_file()


def test_how2sign_needs_times_if_raw_videos_are_cut(tmp_path):
    for name, raw in (("raw", True), ("ready", False)):
        root = make_how2sign(tmp_path / name, raw=raw)
        table = next(root.rglob("*.csv"))
        table.write_text(table.read_text().replace("0.5\t1.0\tHello", "0.5\t\tHello"))
    with pytest.raises(UserError, match="line 2: END_REALIGNED must be seconds"):
        how2sign.read(tmp_path / "raw", ("train",))
    assert how2sign.read(tmp_path / "ready", ("train",)).rows["train"][0].end_s is None


@pytest.mark.parametrize(
    ("garbled", "fixed"),
    [
        ("horseâ€™s", "horse’s"),
        ("horseâ\x80\x99s", "horse’s"),
        ("â€œso\u00e2\u20ac\u009d", "“so”"),
        ("cafÃ©", "café"),
        ("café, naïve, 5 °C, â la carte", "café, naïve, 5 °C, â la carte"),
        ("天气", "天气"),
    ],
)
def test_mojibake_is_fixed_and_other_text_is_unchanged(garbled, fixed):
    assert how2sign.fix_mojibake(garbled) == fixed


def test_the_real_how2sign_tables_are_read(shared):
    corpus = how2sign.read(shared / "how2sign", ("train", "dev"), repair_mojibake=True)
    assert [len(table) for table in corpus.rows.values()] == [36, 1741]
    assert all(row.path.is_file() for row in corpus.rows["train"])
    assert {row.signer for row in corpus.rows["train"]} == {"5", "8"}
    assert "2 texts with garbled characters, repaired" in "\n".join(corpus.notes)
    assert "0 of 1,741" in "\n".join(corpus.notes)


def test_the_message_for_a_missing_how2sign_table_names_the_option(tmp_path):
    with pytest.raises(UserError, match=r"how2sign_realigned_val\.csv.*--splits"):
        how2sign.read(make_how2sign(tmp_path, raw=False), ("dev",))


def write_manifest(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        delimiter = "," if path.suffix == ".csv" else "\t"
        quote = '"' if path.suffix == ".csv" else ""  # a TSV has no quoting
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        lines = [delimiter.join(names)]
        for row in rows:
            cells = [f"{quote}{row.get(name, '')}{quote}" for name in names]
            lines.append(delimiter.join(cells))
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def all_rows(corpus):
    return list(chain.from_iterable(corpus.rows.values()))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_manifest_is_read_from_csv_tsv_and_json_lines(tmp_path, suffix):
    rows = [
        {
            "video": "a.mp4",
            "text": "eins, zwei",
            "start": 1.5,
            "end": 2,
            "split": "val",
            "bbox": "0,0,0.5,1",
            "fps": 29.97,
            "mood": 1,
        },
        {
            "video": "b.mp4",
            "text": "drei",
            "split": "train",
            "signer": "S1",
            "language": "gsw",
            "id": "x.1",
        },
    ]
    corpus = manifest.read(
        write_manifest(tmp_path / f"m{suffix}", rows), ("train", "dev"), language="de"
    )
    (dev,), (train,) = corpus.rows["dev"], corpus.rows["train"]
    assert (dev.start_s, dev.end_s, dev.bbox, dev.text) == (
        1.5,
        2.0,
        (0.0, 0.0, 0.5, 1.0),
        "eins, zwei",
    )
    assert (dev.path, dev.id, dev.language) == (tmp_path / "a.mp4", "a.mp4:1.5-2.0", "de")
    assert (train.id, train.signer, train.language) == ("x.1", "S1", "gsw")
    assert (dev.image_fps, train.image_fps) == (29.97, 25.0)
    assert corpus.language == "mixed" and corpus.notes == [
        "columns that are not used: mood"
    ]


def test_without_a_split_column_a_source_video_goes_to_one_split(tmp_path):
    rows = []
    for n in range(400):
        start = n % 2
        rows.append(
            {"video": f"{n // 2}.mp4", "text": "x", "start": start, "end": start + 1}
        )
    source = write_manifest(tmp_path / "m.jsonl", rows)
    split = manifest.read(source, ("train", "dev", "test"), language="en").rows
    videos = [{row.video for row in table} for table in split.values()]
    assert sum(map(len, videos)) == 200 and all(videos)
    assert 140 < len(videos[0]) < 180
    assert manifest.split_of("0.mp4") == manifest.split_of("0.mp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "", "text": "x"}, "line 1: video"),
        ({"video": "a", "text": "x", "start": "2", "end": "1"}, "end must be above start"),
        ({"video": "a", "text": "x", "start": "nan"}, "start must be seconds"),
        ({"video": "a", "text": "x", "end": "1:2:3:4"}, "end must be seconds"),
        ({"video": "a", "text": "x", "end": "1:-2"}, "end must be seconds"),
        ({"video": "a", "text": "x", "split": "tran"}, "split must be one of"),
        (
            {"video": "a", "text": "x", "language": "Germann"},
            "line 1: language .*'Germann': did you mean Ge",
        ),
        (
            {"video": "a", "text": "x", "language": "de_DF"},
            "line 1: language .*'de_DF': did you mean de?",
        ),
        (
            {"video": "a", "text": "x", "language": "gsg"},
            "line 1: language .* text.*'gsg': did you mean de?",
        ),
        (
            {"video": "a", "text": "x", "language": "mul"},
            "line 1: language must be the language of the text",
        ),
        ({"video": "a", "text": "x", "fps": "0"}, "fps must be from 1 to 480"),
        ({"video": "a", "text": "x", "fps": "fast"}, "fps must be from 1 to 480"),
        ({"video": "a", "text": "x", "bbox": [0, 0, 2, 1]}, "bbox"),
        (["a", "x"], "object"),
    ],
)
def test_a_wrong_manifest_row_is_a_user_error_with_its_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        manifest.read(
            write_manifest(tmp_path / "m.jsonl", [row]), ("train",), language="de"
        )


def test_a_line_with_infinite_nesting_is_a_user_error(tmp_path):
    (tmp_path / "m.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"^Cannot read .*m\.jsonl, line 1: .*recursion"):
        manifest.read(tmp_path / "m.jsonl", ("train",), language="de")


def test_manifest_times_may_be_read_from_a_clock(tmp_path):
    row = {"video": "a", "text": "x", "start": "00:01:02.5", "end": "1:03"}
    corpus = manifest.read(write_manifest(tmp_path / "m.csv", [row]), SPLITS, language="en")
    (row,) = all_rows(corpus)
    assert (row.start_s, row.end_s) == (62.5, 63.0)


def test_a_manifest_of_frame_folders_is_built_at_its_frame_rate_and_cut(tmp_path):
    write_frames(tmp_path / "frames" / "a", 20)
    row = {
        "video": "frames/a",
        "text": "x",
        "start": 1,
        "end": 2,
        "fps": 5,
        "split": "train",
        "id": "a.b",
    }
    source = write_manifest(tmp_path / "m.csv", [row | {"bbox": "0,0.5,1,1"}])
    build(
        "manifest",
        source,
        tmp_path / "out",
        Options(short_side=16, workers=1),
        language="en",
    )
    ((facts, frames),) = built_clips(tmp_path / "out", "train").values()
    assert (facts["id"], facts["fps"], len(frames), frames[0].shape) == (
        "a.b",
        5.0,
        5,
        (13, 21, 3),
    )
    assert [round(frame.mean()) for frame in frames] == pytest.approx(
        [25, 30, 35, 40, 45], abs=2
    )


@pytest.mark.parametrize(
    "named", ["de", "DE", "de-AT", "de_DE", "German", " german ", "deu_Latn", "<2de>"]
)
def test_a_language_by_any_name_is_one_language(tmp_path, named):
    rows = [
        {"video": "a", "text": "x", "language": named},
        {"video": "b", "text": "x", "language": "de"},
    ]
    corpus = manifest.read(write_manifest(tmp_path / "m.csv", rows), SPLITS)
    assert corpus.language == "de"
    assert [row.language for row in all_rows(corpus)] == ["de", "de"]
    unnamed = write_manifest(tmp_path / "m.jsonl", [{"video": "a", "text": "x"}])
    assert manifest.read(unnamed, SPLITS, language=named).language == "de"


def test_an_unknown_language_option_is_refused_with_similar_names(tmp_path):
    source = write_manifest(tmp_path / "m.jsonl", [{"video": "a", "text": "x"}])
    with pytest.raises(
        UserError, match=r"^--language must be .*'Chinesse': did you mean .*Chinese"
    ):
        manifest.read(source, SPLITS, language="Chinesse")


def test_a_manifest_needs_a_language_and_a_known_suffix(tmp_path):
    source = write_manifest(tmp_path / "m.jsonl", [{"video": "a", "text": "x"}])
    with pytest.raises(UserError, match="--language"):
        manifest.read(source, ("train",))
    with pytest.raises(UserError, match=r"\.csv, \.tsv or \.jsonl"):
        manifest.read(tmp_path / "m.xlsx", ("train",))


def test_a_table_with_an_open_quote_is_refused(tmp_path):
    root = make_how2sign(tmp_path, raw=False)
    table = next(root.rglob("*.csv"))
    table.write_text(table.read_text().replace("Hello, you.", '"Hello, you.'))
    with pytest.raises(UserError):
        how2sign.read(root, ("train",))
