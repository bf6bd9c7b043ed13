"""Tests of tables and manifests as people write them: one row per line."""

import json
from itertools import chain

import pytest

from flallm_ds.data.index import read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.corpora import (
    csl_daily,
    how2sign,
    manifest,
    openasl,
    parse_seconds,
    phoenix14t,
)
from tests.helpers.trees import (
    PHOENIX_HEADER,
    make_csl_daily,
    make_how2sign,
    make_openasl,
    make_phoenix,
    write_frames,
)

ALL = ("train", "dev", "test")


def rows_of(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    corpus = manifest.read(path, ALL, language="en")
    return list(chain.from_iterable(corpus.rows.values())), corpus.notes


def refused(path, content, message):
    with pytest.raises(UserError, match=message):
        rows_of(path, content)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    "texts",
    [
        ['"Fine" is a word', "b", "c", "d"],
        ['"an open quote', "b", "c", "d"],
        ["a", 'an open "quote', '"', '""'],
        ['6" pipe', 'b"', '"c', "d"],
        ['"all quoted"', '"he said ""x"""', "c", "d"],
        ["a, b; c|d", "'b'", "\\", "d"],
    ],
)
def test_a_tsv_has_no_quoting(tmp_path, texts, newline, bom):
    lines = [
        "video\ttext\tsplit",
        *(f"{n}.mp4\t{text}\ttrain" for n, text in enumerate(texts)),
        "",
    ]
    rows, _ = rows_of(tmp_path / "m.tsv", bom + newline.join(lines))
    assert [row.text for row in rows] == texts


def test_texts_in_quotes_of_a_tsv_are_noted(tmp_path):
    rows, notes = rows_of(
        tmp_path / "m.tsv", 'video\ttext\na\t"x ""y"""\nb\t"z" is\nc\t"w"\n'
    )
    assert len(rows) == 3
    assert (
        "2 texts begin and end with a double quote, which is kept: a TSV has no quoting "
        "(lines 2, 4)" in notes
    )


def test_a_csv_unquotes_what_is_quoted(tmp_path):
    texts = ['"Fine" is a word', "a, b", 'He said "x".', 'x"y', ""]
    cells = ['"""Fine"" is a word"', '"a, b"', '"He said ""x""."', 'x"y', '""']
    lines = ["video,text,split", *(f"{n}.mp4,{cell},train" for n, cell in enumerate(cells))]
    assert [row.text for row in rows_of(tmp_path / "m.csv", "\n".join(lines))[0]] == texts


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        ('"an open quote', 3),
        ('"Fine" is a word', 3),
        ('"a""', 3),
        ('"two\nlines"', 3),
    ],
)
def test_an_open_quote_of_a_csv_is_refused_with_its_line(tmp_path, cell, line):
    content = f'video,text\na.mp4,x\nb.mp4,{cell}\nc.mp4,"y"\nd.mp4,z\n'
    refused(
        tmp_path / "m.csv",
        content,
        rf"m\.csv, line {line}: a field in double quotes must close",
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("fields", "count"), [("c.mp4", 1), ("c.mp4/x/y", 3), ("c.mp4/x/", 3)]
)
def test_a_row_with_more_or_fewer_fields_is_refused_with_its_line(
    tmp_path, suffix, fields, count
):
    content = f"video/text\na.mp4/x\n\n{fields}\n".replace(
        "/", "," if suffix == ".csv" else "\t"
    )
    refused(
        tmp_path / f"m{suffix}",
        content,
        rf"line 4: a row must have 2 fields, got {count}\.",
    )


@pytest.mark.parametrize(
    ("suffix", "line", "message"),
    [
        (".csv", "video;text;split", "must be separated by commas, got .* with semicolons"),
        (".csv", '"video";"text"', "must be separated by commas, got .* with semicolons"),
        (".csv", "video\ttext", "must be separated by commas, got .* with TABs"),
        (".csv", "video|text", r"must be separated by commas, got .* with \|"),
        (".tsv", "video,text", "must be separated by TABs, got .* with commas"),
        (".tsv", "video;text", "must be separated by TABs, got .* with semicolons"),
        (".tsv", '"video"\t"text"', "separated by TABs must have no quotes"),
        (".csv", "video text", "must have the column 'video'"),
        (".csv", "video,text,text", "each column must have its own name, got 'text' twice"),
        (".tsv", "video\ttext\tsplit\tsplit", "got 'split' twice"),
        (".csv", "vido,text", "must have the column 'video'"),
        (".csv", "video,Text", "must have the column 'text'"),
    ],
)
def test_another_delimiter_and_a_wrong_header_are_refused(tmp_path, suffix, line, message):
    refused(tmp_path / f"m{suffix}", f"{line}\n{line}\n", message)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("spilt", "split"), ("Split", "split"), ("strat", "start"), ("start_s", "start"), ("end_time", "end"),
        ("END", "end"), ("langauge", "language"), ("singer", "signer"), ("box", "bbox"),
        ("video_id", None), ("sign", None), ("notes", None), ("mood", None), ("", None),
    ],
)  # fmt: skip
def test_a_misspelt_column_is_refused_and_an_unknown_one_is_noted(tmp_path, name, meant):
    content = f"video,text,{name}\na.mp4,x,1\n"
    if meant:
        refused(tmp_path / "m.csv", content, f"got {name!r} and no {meant!r}")
        refused(
            tmp_path / "m.jsonl",
            json.dumps({"video": "a", "text": "x", name: "1"}),
            f"no {meant!r}",
        )
    else:
        notes = rows_of(tmp_path / "m.csv", content)[1]
        assert notes == [f"columns that are not used: {name or '(without a name)'}"]


def test_a_column_similar_to_an_existing_one_is_noted(tmp_path):
    _, notes = rows_of(tmp_path / "m.csv", "video,text,start,start_s\na.mp4,x,1,1.5\n")
    assert notes == ["columns that are not used: start_s"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.mp4/schön\n".encode("latin-1"), "line 3: .*UTF-8, got byte 0xf6"),
        (b"a.mp4/x\0y\n", "line 3: .*NUL byte"),
        ("a.mp4/x\n".encode("utf-16-le"), "line 3: .*NUL byte"),
    ],
)
def test_text_in_another_encoding_is_refused_with_its_line(
    tmp_path, suffix, content, message
):
    delimiter = b"\t" if suffix == ".tsv" else b","
    head = (
        b'{"video": "b", "text": "x"}\n\n'
        if suffix == ".jsonl"
        else b"video/text\nb.mp4/x\n"
    )
    refused(tmp_path / f"m{suffix}", (head + content).replace(b"/", delimiter), message)


def test_the_message_for_utf16_names_the_encoding(tmp_path):
    refused(
        tmp_path / "m.tsv",
        "video\ttext\na\tx\n".encode("utf-16"),
        r"m\.tsv must be a text file in UTF-8, got UTF-16\. Save it as UTF-8",
    )


BREAKS = ["\n", "\t", "\r", "\v", "\f", "\x00", "\x1c", "\x85", "\u2028", "\u2029", "\x1b"]


@pytest.mark.parametrize("mark", BREAKS)
@pytest.mark.parametrize("column", ["text", "id", "signer"])
def test_a_line_break_or_a_tab_in_json_is_refused_with_its_line(tmp_path, mark, column):
    row = {"video": "a", "text": "x", column: f"a{mark}b"}
    content = '{"video": "b", "text": "x"}\n' + json.dumps(row)
    refused(
        tmp_path / "m.jsonl", content, f"line 2: {column} must be one line without TABs"
    )


@pytest.mark.parametrize("mark", ["\v", "\f", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_other_line_breaks_do_not_split_rows_and_are_refused(tmp_path, mark, suffix):
    content = f"video/text\na/x\nb/x{mark}y\n".replace(
        "/", "," if suffix == ".csv" else "\t"
    )
    refused(tmp_path / f"m{suffix}", content, "line 3: text must be one line without TABs")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": 5}, "text must be a string, got 5"),
        ({"text": None}, "text must be a string, got null"),
        ({"text": True}, "text must be a string, got true"),
        ({"text": ["x", "y"]}, r'text must be a string, got \["x", "y"\]'),
        ({"text": {"en": "x"}}, "text must be a string, got {"),
        ({"video": 3}, "video must be a string, got 3"),
        ({"video": None}, "video must be a string, got null"),
        ({"video": ["a", "b"]}, "video must be a string"),
        ({"split": 1}, "split must be a string, got 1"),
        ({"signer": 7}, "signer must be a string, got 7"),
        ({"id": 7}, "id must be a string, got 7"),
        ({"start": True}, "start must be a number or a string, got true"),
        ({"start": [1]}, "start must be a number or a string"),
        ({"fps": {}}, "fps must be a number or a string"),
        ({"start": float("nan")}, "start must be seconds"),
        ({"start": float("inf")}, "start must be seconds"),
        ({"end": float("-inf")}, "end must be seconds"),
        ({"start": -1}, "start must be seconds"),
        ({"end": 10**400}, "end must be seconds"),
        ({"start": 2, "end": 2}, "end must be above start"),
        ({"end": 0}, "end must be above start"),
        ({"bbox": [[0, 0], [1, 1]]}, "bbox must be"),
        ({"bbox": [0, 0, float("nan"), 1]}, "bbox must be"),
        ({"bbox": 1}, "bbox must be"),
    ],
)  # fmt: skip
def test_a_json_value_of_another_type_is_refused_with_its_line(tmp_path, fields, message):
    content = '{"video": "b", "text": "x"}\n' + json.dumps(
        {"video": "a", "text": "x"} | fields
    )
    refused(tmp_path / "m.jsonl", content, f"line 2: .*{message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": "a"}', "the object must have 'text', got video"),
        ("{}", "the object must have 'text', got no name"),
        ('{"text": "x"}', "video must be a file or folder"),
        (
            '{"video": "a", "text": "x", "text": "y"}',
            "each name must occur once, got 'text' twice",
        ),
        ('[{"video": "a", "text": "x"}]', "a line must be a JSON object"),
        ('{"video": "a", "text": "x"', "Expecting .*: one JSON object per line"),
        ('{"video": "a", "txt": "x"}', "got 'txt' and no 'text'"),
        ('"x"', "a line must be a JSON object"),
        ("null", "a line must be a JSON object"),
    ],
)
def test_a_json_line_that_is_not_a_row_is_refused_with_its_line(tmp_path, line, message):
    refused(
        tmp_path / "m.jsonl",
        f'\ufeff{{"video": "b", "text": "x"}}\n\n{line}\n',
        f"line 3: .*{message}",
    )


def test_null_is_an_empty_field_in_an_optional_column(tmp_path):
    row = {"video": "a", "text": "x", "mood": [1]} | dict.fromkeys(
        ("start", "end", "split", "signer", "language", "id", "bbox", "fps")
    )
    ((found,), _) = rows_of(tmp_path / "m.jsonl", json.dumps(row))
    assert (found.id, found.start_s, found.end_s, found.signer, found.bbox) == (
        "a",
        None,
        None,
        "",
        None,
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ("a.mp4,x,,,", "a.mp4,x,,,"),
            "line 3: a row must occur once, got .* of line 2 again",
        ),
        (("a.mp4,x,0,1.50,", "./a.mp4,x,0.0,0:1.5,"), "line 3: a row must occur once"),
        (("a.mp4,x,,,", "a.mp4,x,0,,"), "line 3: a row must occur once"),
        (
            ("a.mp4,x,,,1", "b.mp4,y,,,1"),
            "line 3: id must be unique, got '1' of line 2 again",
        ),
    ],
)
def test_rows_that_occur_twice_are_refused(tmp_path, rows, message):
    content = "\n".join(["video,text,start,end,id", *rows, "c.mp4,z,,,"])
    refused(tmp_path / "m.csv", content, message)


def test_rows_that_differ_in_one_thing_are_all_kept(tmp_path):
    lines = [
        "a.mp4,x,0,1",
        "a.mp4,x,1,2",
        "a.mp4,y,0,1",
        "b.mp4,x,0,1",
        "a.mp4,x,,",
        "A.mp4,x,0,1",
    ]
    rows, _ = rows_of(tmp_path / "m.csv", "\n".join(["video,text,start,end", *lines]))
    assert len(rows) == 6


@pytest.mark.parametrize(
    "text",
    [
        "\u200b",
        "\ufeff\u200d",
        "\u00a0",
        "\u0301",
        "\u3164",
        "\u2060 \u00ad",
        "\u3000",
        "\u2800",
    ],
)
def test_an_invisible_text_is_reported_and_skipped_like_an_empty_one(tmp_path, text):
    for name in ("a", "b"):
        write_frames(tmp_path / name, 2)
    lines = ["video\ttext\tsplit", "a\tx\ttrain", f"b\t{text}\ttrain", ""]
    (tmp_path / "m.tsv").write_text("\n".join(lines), encoding="utf-8")
    given = {"short_side": 16, "workers": 1, "splits": ("train",)}
    with pytest.raises(
        UserError,
        match=r"1 without text: train b has a(n empty text| text without visible)",
    ):
        build(
            "manifest",
            tmp_path / "m.tsv",
            tmp_path / "out",
            Options(**given),
            language="en",
        )
    build(
        "manifest",
        tmp_path / "m.tsv",
        tmp_path / "out",
        Options(**given, max_skipped=1),
        language="en",
    )
    assert read_manifest(tmp_path / "out")["skipped"]["without text"]["count"] == 1


@pytest.mark.parametrize(
    "value",
    ["1_0", "nan", "inf", "１", "-0.5", "1,5", "1.5s", "0x1", "1:2:3:4", "1e9", "::", "-"],
)
def test_a_wrong_time_is_refused(value):
    with pytest.raises(UserError, match=r"^line 2: start must be seconds"):
        parse_seconds(value, "line 2: start")


def test_all_forms_of_a_time_are_read():
    values = {
        "1": 1,
        " 2.5 ": 2.5,
        "1.": 1,
        ".5": 0.5,
        "1e-07": 1e-7,
        "+1": 1,
        "0:01.5": 1.5,
        "1:00:00": 3600,
    }
    assert {value: parse_seconds(value, "") for value in values} == values


def test_the_tables_of_corpora_are_read_line_by_line(tmp_path):
    release = make_phoenix(tmp_path / "p", counts=(3, 0, 0))
    table = next(release.rglob("*.train.corpus.csv"))
    table.write_text(table.read_text().replace("am tag 1", '"am tag 1'))
    assert len(phoenix14t.read(release, ("train",)).rows["train"]) == 3
    table.write_text(table.read_text().replace("am tag 1", "am\u2028tag 1"))
    with pytest.raises(UserError, match="line 3: translation must be one line"):
        phoenix14t.read(release, ("train",))
    table.write_text(table.read_text().replace("|", ","))
    with pytest.raises(UserError, match=r"must be separated by \|, got .* with commas"):
        phoenix14t.read(release, ("train",))

    root = make_how2sign(tmp_path / "h", raw=False)
    table = next(root.rglob("*.csv"))
    whole = table.read_text()
    table.write_text(whole.replace("Hello, you.", '"Hello, you.'))
    with pytest.raises(UserError, match="line 2: a field in double quotes must close"):
        how2sign.read(root, ("train",))
    # garbled Å, no line break
    table.write_text(whole.replace("Hello, you.", "Ã\x85h, Hello."))
    assert (
        how2sign.read(root, ("train",), repair_mojibake=True).rows["train"][0].text
        == "Åh, Hello."
    )
    assert len(how2sign.read(root, ("train",)).rows["train"]) == 4
    table.write_text(whole.replace("\t", ";"))
    with pytest.raises(
        UserError, match=r"must be separated by commas, got .* with semicolons"
    ):
        how2sign.read(root, ("train",))
    table.write_bytes(whole.encode().replace(b"Hello", b"H\xe4llo"))
    with pytest.raises(UserError, match=r"line 2: .*0xe4"):
        how2sign.read(root, ("train",))

    root = make_openasl(tmp_path / "o", raw=True)
    table = root / "data" / "openasl-v1.0.tsv"
    table.write_text(table.read_text().replace("It's 5.30 pm.", "It's\x855.30 pm."))
    with pytest.raises(UserError, match="line 3: raw-text must be one line"):
        openasl.read(root, ALL)


def test_csl_labels_that_differ_for_one_clip_are_refused(tmp_path):
    root = make_csl_daily(tmp_path, annotation="map")
    table = root / "sentence_label" / "video_map.txt"
    again = table.read_text().splitlines()[1]
    table.write_text(table.read_text() + again + "\n")
    assert len(csl_daily.read(root, ALL).rows["train"]) == 2
    table.write_text(table.read_text() + again.replace("谁", "她") + "\n")
    with pytest.raises(
        UserError, match="one label, got two that differ for S000007_P0003_T00"
    ):
        csl_daily.read(root, ALL)


def test_rows_of_a_corpus_with_one_id_are_kept_and_noted(tmp_path):
    release = make_phoenix(tmp_path / "p", counts=(2, 0, 0))
    table = next(release.rglob("*.train.corpus.csv"))
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    assert table.read_text().startswith(PHOENIX_HEADER)
    build("phoenix14t", release, tmp_path / "out", Options(short_side=16, workers=1))
    note = "1 rows have the id of an earlier row and are kept (01April_2010_train_tagesschau-1)"
    assert note in read_manifest(tmp_path / "out")["notes"]
