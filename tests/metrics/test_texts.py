"""Tests of reading hypotheses and references of any project."""

import json
from pathlib import Path

import pytest

from flallm_ds.errors import UserError
from flallm_ds.metrics.texts import read_columns, read_pairs

MEANT = ["im norden regen", "", "morgen sonne\u2028und wind"]
SAID = ["im norden schnee", "sonne", "morgen regen"]
IDS = ["c", "a", "b"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def jsonl(path: Path, **columns: list[str]) -> Path:
    lines = []
    for values in zip(*columns.values(), strict=True):
        lines.append(json.dumps(dict(zip(columns, values, strict=True))))
    return write(path, "\n".join(lines) + "\n")


def table(path: Path, mark: str, header: str, *columns: list[str]) -> Path:
    rows = [mark.join(row) for row in zip(*columns, strict=True)]
    return write(path, "\n".join([header] * bool(header) + rows) + "\n")


def test_plain_lines_are_paired_in_order_with_empty_sentences_kept(tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        said = write(tmp_path / "said.txt", end.join(SAID) + end)
        meant = write(tmp_path / "meant.txt", "\ufeff" + end.join(MEANT))
        pairs = read_pairs(said, meant)
        assert (pairs.hypotheses, pairs.references) == (SAID, MEANT) and not pairs.ids


def test_tables_are_joined_by_id_in_any_order(tmp_path: Path) -> None:
    meant = ["im norden regen", '"gut", sagt er', "schnee"]
    references = [
        jsonl(tmp_path / "meant.jsonl", key=IDS, reference=meant),
        table(tmp_path / "meant.tsv", "\t", "id\ttext", IDS, ['im norden regen', '"""gut"", sagt er"', "schnee"]),
        table(tmp_path / "a.csv", "|", "name|video|translation", IDS, IDS, meant),
        table(tmp_path / "b.csv", ";", "", IDS, ["im norden regen", '"""gut"", sagt er"', "schnee"]),
    ]  # fmt: skip
    order = [2, 0, 1]
    said = jsonl(
        tmp_path / "said.jsonl", id=[IDS[n] for n in order], prediction=[SAID[n] for n in order]
    )  # fmt: skip
    for path in references:
        pairs = read_pairs(said, path)
        assert (pairs.hypotheses, pairs.references, pairs.ids) == (SAID, meant, IDS)


def test_lines_of_uni_sign_are_read_by_id(tmp_path: Path) -> None:
    said = [
        f"sample: {one}, prediction: {text}" for one, text in zip(IDS, SAID, strict=True)
    ]
    label = "ground-truth"  # codespell:ignore truth
    meant = [
        f"sample: {one}, {label}: {text}" for one, text in zip(IDS, MEANT, strict=True)
    ]
    pairs = read_pairs(
        write(tmp_path / "said.txt", "\n".join(reversed(said))),
        write(tmp_path / "meant.txt", "\n".join(meant)),
    )
    assert (pairs.hypotheses, pairs.references) == (SAID, MEANT)


def test_one_table_may_have_both_columns_and_languages(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "test.hypotheses.jsonl",
        key=IDS, hypothesis=SAID, reference=MEANT, language=["de", "de", "en"],
    )  # fmt: skip
    pairs = read_pairs(path)
    assert (pairs.hypotheses, pairs.references) == (SAID, MEANT)
    assert pairs.languages == ["de", "de", "en"]
    with pytest.raises(UserError, match=r"columns hypothesis and reference .*got text"):
        read_pairs(write(tmp_path / "said.txt", "a\nb\n"))


def test_missing_and_repeated_ids_are_named(tmp_path: Path) -> None:
    meant = jsonl(tmp_path / "meant.jsonl", id=IDS, reference=MEANT)
    fewer = jsonl(tmp_path / "said.jsonl", id=["c", "b"], hypothesis=SAID[:2])
    with pytest.raises(UserError, match=r"got none for 'a' \(1 missing in all\)"):
        read_pairs(fewer, meant)
    more = jsonl(tmp_path / "said.jsonl", id=[*IDS, "d"], hypothesis=[*SAID, "x"])
    with pytest.raises(UserError, match=r"meant.jsonl must have every id .*none for 'd'"):
        read_pairs(more, meant)
    twice = jsonl(tmp_path / "said.jsonl", id=["c", "a", "a"], hypothesis=SAID)
    with pytest.raises(UserError, match="must come once, got 'a' twice"):
        read_pairs(twice, meant)
    with pytest.raises(UserError, match="Both files or none must have ids"):
        read_pairs(write(tmp_path / "said.txt", "\n".join(SAID)), meant)


LABELLED = {
    "prediction: ": [f"prediction: {text}" for text in SAID],
    "H-": [f"H-{n}\t-0.3\t{text}" for n, text in enumerate(SAID)],
    "clip_": [f"clip_{n} {text}" for n, text in enumerate(SAID * 4)],
}


def test_files_of_different_lengths_and_empty_ones_are_named(tmp_path: Path) -> None:
    said, meant, empty = (
        tmp_path / name for name in ("said.txt", "meant.txt", "empty.txt")
    )
    said.write_text("eins\nzwei\n")
    meant.write_text("eins\n")
    empty.write_text("")
    with pytest.raises(
        UserError, match=r"said\.txt must have a hypothesis for each of the 1"
    ):
        read_pairs(said, meant)
    with pytest.raises(UserError, match=r"empty\.txt must have at least one sentence"):
        read_pairs(said, empty)
    with pytest.raises(UserError, match=r"empty\.txt must have a hypothesis .* got 0"):
        read_pairs(empty, meant)


@pytest.mark.parametrize("label", LABELLED)
def test_labelled_lines_are_refused_with_how_to_strip_them(
    tmp_path: Path, label: str
) -> None:
    meant = jsonl(
        tmp_path / "meant.jsonl", reference=LABELLED[label]
    )  # references: any common beginning of ten lines
    with pytest.raises(UserError, match=f"that begin with '{label}.*sed 's/") as error:
        read_columns(meant)
    assert "columns id and text" in str(error.value)


def test_hypotheses_of_a_model_that_always_begins_alike_are_accepted(
    tmp_path: Path,
) -> None:
    said = [f"und nun die wettervorhersage {n}" for n in range(20)]
    assert read_columns(write(tmp_path / "said.txt", "\n".join(said)))["text"] == said
    same = ["wetter: regen"] * 20
    assert read_columns(write(tmp_path / "said.txt", "\n".join(same)))["text"] == same


BAD = {
    "a.jsonl": ('{"hypothesis": "x"}\nnot json\n', "line 2: it is not JSON"),
    "b.jsonl": ('{"hypothesis": "x"}\n{"other": 1}\n', "line 2 must have a text"),
    "c.jsonl": ("[1]\n", "must be an object"),
    "d.csv": ("id,text\na,b\nc\n", "must have 2 fields, got 1 in row 2"),
    "e.csv": ("a,b,c\n1,2,3\n", "must have a header with columns such as id and text"),
    "f.csv": ('id,text\na,"b\n', "Cannot read .* as a table"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(UserError, match=message):
        read_columns(write(tmp_path / name, content))


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_columns(tmp_path / "said.txt")


def test_tables_of_real_corpora_are_read_by_id(shared_data: Path) -> None:
    name = "full-test-split.PHOENIX-2014-T.test.corpus.csv"
    phoenix = shared_data / "phoenix14t" / name
    how2sign = next(shared_data.rglob("how2sign_realigned_val.csv"))
    for path, count in ((phoenix, 642), (how2sign, 1741)):
        columns = read_columns(path)
        assert len(columns["text"]) == len(set(columns["id"])) == count
        assert all(columns["text"])
