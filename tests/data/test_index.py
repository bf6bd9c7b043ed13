import json
from pathlib import Path

import numpy as np
import pytest

from flallm_ds.data.codecs.avi import frame_spans
from flallm_ds.data.index import (
    COLUMNS,
    STRING_COLUMNS,
    Index,
    Shard,
    StringColumn,
    fingerprint,
    iter_rows,
    load_index,
    write_table,
)
from flallm_ds.data.storage.store import LocalStore
from flallm_ds.errors import UserError


def row(number: int) -> dict:
    numbers = {
        "shard": 0,
        "offset": 1024 * number + 512,
        "size": 500,
        "num_frames": 20 + number,
    }
    strings = {name: f"{name} {number} ä天🤟" for name in STRING_COLUMNS}
    return {**numbers, "height": 64, "width": 48 + number, "fps": 25.0, **strings}


def write_folder(root: Path, rows: list[dict]) -> None:
    entry = write_table(root / "train.safetensors", rows)
    entry["shards"] = [
        {"file": "train-000000.tar", "bytes": 10_240, "sha256": "aa", "clips": len(rows)}
    ]
    (root / "train-000000.tar").write_bytes(bytes(10_240))
    manifest = {"format": "flallm_ds shards 1", "corpus": "toy", "splits": {"train": entry}}
    (root / "index.json").write_text(json.dumps(manifest))


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(number) for number in range(5)] + [row(5) | {"text": "", "signer": ""}]
    write_folder(tmp_path, rows)
    index = load_index(tmp_path, "train")
    assert list(iter_rows(index)) == rows
    assert len(index) == 6 and index.corpus == "toy"
    assert index.frame_hw == (64, 53)
    assert index.num_frames.tolist() == [20, 21, 22, 23, 24, 25]
    assert {name: a.dtype for name, a in index.arrays.items() if name in COLUMNS} == {
        name: np.dtype(dtype) for name, dtype in COLUMNS.items()
    }
    index.check_files()


def test_the_offsets_of_real_shards_are_those_of_the_clips(tiny_corpus):
    index = load_index(tiny_corpus / "shards", "train")
    for number in (0, 17, 39):
        arrays = index.arrays
        tar = index.shard_path(int(arrays["shard"][number])).read_bytes()
        begin, size = int(arrays["offset"][number]), int(arrays["size"][number])
        assert len(frame_spans(tar[begin : begin + size])) == index.num_frames[number]


def test_strings_are_read_one_by_one_from_the_end_too():
    strings = ["", "ä", "", "天🤟", "z"]
    arrays = StringColumn.columns("text", strings)
    column = StringColumn(arrays["text"], arrays["text_ends"])
    assert list(column) == strings and len(column) == 5 and "天🤟" in column


def test_a_million_clips_are_an_index():
    num = 1_000_000
    arrays = {name: np.ones(num, dtype) for name, dtype in COLUMNS.items()}
    arrays |= StringColumn.columns("key", [f"clip{number}" for number in range(num)])
    index = Index(
        LocalStore("."), "toy", "train", "ab", (Shard("a.tar", 1, "aa", num),), arrays
    )
    assert len(index) == num and index.strings("key")[num - 1] == "clip999999"


def test_a_missing_shard_is_found_at_the_start(tiny_shards):
    (tiny_shards / "train-000002.tar").unlink()
    index = load_index(tiny_shards, "train")
    with pytest.raises(
        UserError, match=r"train-000002\.tar must have .*, got no file\..*verify"
    ):
        index.check_files()
    load_index(tiny_shards, "dev").check_files()


def test_a_shard_of_another_size_is_found_at_the_start(tiny_shards):
    with (tiny_shards / "dev-000000.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        UserError, match=r"dev-000000\.tar must have .* as its index says, got [\d,]+\."
    ):
        load_index(tiny_shards, "dev").check_files()


def test_an_unknown_split_is_refused_with_the_known_ones(tiny_corpus):
    with pytest.raises(UserError, match=r"one of train, dev, test for .*, got 'val'"):
        load_index(tiny_corpus / "shards", "val")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_changed_table_is_refused(tiny_shards, damage):
    table = tiny_shards / "train.safetensors"
    content = bytearray(table.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        table.unlink()
    else:
        table.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(UserError, match=r"split train, .* is missing or was changed"):
        load_index(tiny_shards, "train")
    load_index(tiny_shards, "dev")


def test_a_folder_that_holds_no_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must contain index\.json"):
        load_index(tmp_path, "train")


FORMAT = '"format": "flallm_ds shards 1"'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "as JSON: "),
        ('{"format": "x"}', "got 'x'"),
        ("[]", "got None"),
        (f"{{{FORMAT}}}", r"a field is missing or has a wrong type \('corpus'\)"),
        (
            f'{{{FORMAT}, "corpus": "a", "splits": []}}',
            "a field is missing or has a wrong type",
        ),
        (
            f'{{{FORMAT}, "corpus": "a", "splits": {{"train": {{"table": "../a"}}}}}}',
            "File names in index.json",
        ),
    ],
)
def test_an_index_of_another_format_is_refused(tmp_path, content, reason):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        load_index(tmp_path, "train")


def test_the_fingerprint_changes_with_texts_and_with_video():
    entry = {"table_sha256": "aa", "shards": [{"sha256": "bb"}, {"sha256": "cc"}]}
    prints = [
        fingerprint(entry),
        fingerprint(entry | {"table_sha256": "ab"}),
        fingerprint(entry | {"shards": entry["shards"][::-1]}),
        fingerprint(entry | {"shards": entry["shards"][:1]}),
    ]
    assert len(set(prints)) == 4 and all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    assert fingerprint(dict(entry) | {"clips": 3}) == prints[0]
