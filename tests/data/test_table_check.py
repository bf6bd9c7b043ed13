"""Shard folders whose index or table says what cannot be: one sentence where they are
loaded, no hang."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from safetensors.numpy import load_file, save_file

from flallm_ds import command
from flallm_ds.data.index import (
    STRING_COLUMNS,
    fingerprint,
    iter_rows,
    load_index,
    read_manifest,
)
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.readers import VideoReader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import UserError
from flallm_ds.files import file_sha256, publish_folder
from flallm_ds.sharding.preview import preview
from flallm_ds.sharding.stats import stats
from flallm_ds.sharding.verify import ShardFault, verify
from flallm_ds.sharding.writer import ShardWriter, write_index

NUM_CLIPS = 6  # three in each of two tars


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Shards by the real writer, with texts that are not ASCII."""
    place = tmp_path_factory.mktemp("table")
    folder = place / "unfinished"
    folder.mkdir()
    jpeg = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    rows, tars = [], []
    for shard in range(2):
        with ShardWriter(folder / f"train-{shard:06d}.tar", shard) as tar:
            for number in range(3 * shard, 3 * shard + 3):
                facts = {
                    "id": f"i{number}",
                    "text": "schön 天🤟" * number,
                    "signer": "ä" * (number % 2),
                }
                facts |= {"video": "", "language": "de"}
                rows.append(
                    tar.add(
                        f"{number:08d}", [jpeg] * 5, fps=25.0, height=8, width=8, **facts
                    )
                )
        tars.append(tar.shard_entry)
    write_index(
        folder, corpus="c", language="de", options={}, splits={"train": (rows, tars)}
    )
    publish_folder(folder, place / "shards")
    return place / "shards"


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "shards"))


def rewrite(folder: Path, changes: dict) -> None:
    """Put other columns into the table (None removes one), and make index.json agree."""
    table = load_file(folder / "train.safetensors") | changes
    save_file(
        {n: np.ascontiguousarray(v) for n, v in table.items() if v is not None},
        folder / "train.safetensors",
    )
    seal(folder)


def seal(folder: Path) -> None:
    manifest = json.loads((folder / "index.json").read_text())
    manifest["splits"]["train"]["table_sha256"] = file_sha256(folder / "train.safetensors")
    (folder / "index.json").write_text(json.dumps(manifest))


def with_value(folder: Path, column: str, row: int, value) -> dict:
    values = load_file(folder / "train.safetensors")[column].copy()
    values[row] = value
    return {column: values}


def is_one_sentence(target, arguments: list, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    monkeypatch.setattr("flallm_ds.command.end_process", sys.exit)
    with pytest.raises(SystemExit) as stop:
        command.main(target)
    captured = capsys.readouterr()
    assert stop.value.code == (1 if target is verify else 2)
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


def test_a_real_table_is_loaded_as_it_was_written(written):
    index = load_index(written, "train")
    rows = list(iter_rows(index))
    assert [row["text"] for row in rows] == [
        "schön 天🤟" * number for number in range(NUM_CLIPS)
    ]
    assert index.fingerprint == fingerprint(read_manifest(written)["splits"]["train"])


def test_checked_columns_are_not_kept_in_memory(written):
    assert load_index(written, "train").arrays._read == {}


BAD_NUMBERS = [
    (
        "num_frames",
        10**9,
        "num_frames must be from 1 to 1,048,576, got 1,000,000,000 in row 4",
    ),
    ("num_frames", 0, "num_frames must be from 1 to 1,048,576, got 0 in row 4"),
    ("num_frames", -5, "num_frames must be from 1 to 1,048,576, got -5 in row 4"),
    ("num_frames", 2**31 - 1, "num_frames must be from 1"),
    (
        "num_frames",
        2**20,
        "num_frames must be at most size, a byte a frame, got 1,048,576 in row 4",
    ),
    ("fps", np.nan, "fps must be from 0.001 to 10,000, got nan in row 4"),
    ("fps", 0, "fps must be from 0.001 to 10,000, got 0 in row 4"),
    ("fps", np.inf, "got inf in row 4"),
    ("fps", -np.inf, "got -inf in row 4"),
    ("fps", -25, "got -25 in row 4"),
    ("fps", 1e-20, "fps must be from 0.001"),
    ("height", 0, "height must be from 1 to 8,192, got 0 in row 4"),
    ("height", -1, "height must be from"),
    ("width", 65_535, "width must be from 1 to 8,192, got 65,535 in row 4"),
    ("width", 2**31 - 1, "width must be from"),
    ("shard", 2, "shard must be from 0 to 1, the last of the split's tars, got 2 in row 4"),
    ("shard", -1, "shard must be from 0 to 1"),
    ("shard", 0, "overlaps with row"),
    ("offset", -512, "offset must be within the clip's tar, got -512 in row 4"),
    ("offset", 10**9, "offset must be within the clip's tar"),
    ("offset", 2**63 - 1, "offset must be within the clip's tar"),
    ("offset", 512, "offset must be behind the previous clip in the tar, got 512 in row"),
    ("size", 0, "size must be from 1 to 2,147,483,648, got 0 in row 4"),
    ("size", -1, "size must be from 1"),
    (
        "size",
        2**62,
        "size must be from 1 to 2,147,483,648, got 4,611,686,018,427,387,904 in row 4",
    ),
    ("size", 2**31, "size must end within the clip's tar, got 2,147,483,648 in row 4"),
    ("size", 10_000, "overlaps with row 4"),
]


@pytest.mark.parametrize(("column", "value", "said"), BAD_NUMBERS)
def test_an_invalid_number_is_named_with_its_row(folder, column, value, said):
    rewrite(folder, with_value(folder, column, 4, value))
    with pytest.raises(UserError) as error:
        load_index(folder, "train")
    assert said in str(error.value)
    assert f"{folder}/train.safetensors: " in str(error.value)


def test_a_clip_of_more_than_a_day_is_refused(folder):
    rewrite(
        folder,
        with_value(folder, "num_frames", 1, 200) | {"fps": np.full(6, 1e-3, np.float32)},
    )
    with pytest.raises(
        UserError, match=r"num_frames / fps must be at most 86,400 s, got 200000 in row 1"
    ):
        load_index(folder, "train")


@pytest.mark.parametrize(
    "name", ["shard", "fps", "text", "text_ends", "key", "language_ends"]
)
def test_a_missing_column_is_named(folder, name):
    rewrite(folder, {name: None})
    with pytest.raises(UserError, match=f"must have a column {name}, got none"):
        load_index(folder, "train")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"width": np.full(5, 8, np.int32)},
            r"column width must have one entry for each clip \(6.*got 5",
        ),
        (
            {"num_frames": np.full(9, 5, np.int32)},
            r"column shard must have one entry for each clip \(9.*got 6",
        ),
        (
            {"id_ends": np.zeros(7, np.int64)},
            r"column id_ends must have one entry for each clip .* got 7",
        ),
        (
            {"fps": np.full(6, 25, np.float64)},
            "column fps must have 1 dimension of float32, got 1 of float64",
        ),
        (
            {"fps": np.full(6, 25, np.int32)},
            "column fps must have 1 dimension of float32",
        ),
        (
            {"size": np.full((6, 1), 9, np.int64)},
            "column size must have 1 dimension of int64, got 2 of int64",
        ),
        (
            {"text": np.zeros(4, np.int8)},
            "column text must have 1 dimension of uint8, got 1 of int8",
        ),
        (
            {"key_ends": np.arange(6, dtype=np.uint64)},
            "column key_ends must have 1 dimension of int64",
        ),
    ],
)
def test_a_column_of_another_length_or_type_is_named(folder, changes, said):
    rewrite(folder, changes)
    with pytest.raises(UserError, match=said):
        load_index(folder, "train")


@pytest.mark.parametrize("name", STRING_COLUMNS)
@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([5, 4, 6, 7, 8, 9], "_ends must ascend, and end within .*, got 4 in row 1"),
        ([-1, 4, 6, 7, 8, 9], "_ends must ascend, and end within .*, got -1 in row 0"),
        (
            [1, 2, 3, 4, 5, 10**9],
            "_ends must ascend, and end within .*, got 1,000,000,000 in row 5",
        ),
        ([1, 2, 3, 4, 5, 6], r"_ends must reach the end of .* \(12 bytes\), got 6"),
    ],
)
def test_string_ends_in_wrong_order_or_out_of_range_are_named(folder, name, ends, said):
    rewrite(
        folder, {name: np.full(12, 97, np.uint8), f"{name}_ends": np.array(ends, np.int64)}
    )
    with pytest.raises(UserError, match=name + said):
        load_index(folder, "train")


@pytest.mark.parametrize(
    ("strings", "row"),
    [
        ([b"a", b"b", b"\xff", b"c", b"", b"d"], 2),
        ([b"a", b"\xc3", b"\xa4", b"c", b"", b"d"], 1),  # a character in two rows
        ([b"\xed\xa0\x80", b"b", b"", b"c", b"", b"d"], 0),  # half of a surrogate pair
        ([b"\x80", b"b", b"", b"c", b"", b"d"], 0),
        ([b"a", b"b", b"", b"c", b"", b"\xf0\x9f"], 5),
    ],
)
def test_text_that_is_not_utf8_is_named_with_its_row(folder, strings, row):
    ends = np.cumsum([len(string) for string in strings])
    rewrite(folder, {"text": np.frombuffer(b"".join(strings), np.uint8), "text_ends": ends})
    with pytest.raises(UserError, match="text must be UTF-8, got other bytes in row"):
        load_index(folder, "train")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["a", "b", "c", "d", "b", "e"], "got 'b' in rows 1 and 4"),
        (["a", "b", "", "d", "f", "e"], "got '' in row 2"),
    ],
)
def test_keys_must_be_unique_and_not_empty(folder, keys, said):
    ends = np.cumsum([len(key) for key in keys])
    rewrite(
        folder, {"key": np.frombuffer("".join(keys).encode(), np.uint8), "key_ends": ends}
    )
    with pytest.raises(
        UserError, match=f"key must be unique in a split and not empty, {said}"
    ):
        load_index(folder, "train")


@pytest.mark.parametrize("target", [verify, stats, preview])
@pytest.mark.parametrize(
    ("column", "value"), [("num_frames", 10**9), ("fps", np.nan), ("size", 2**62)]
)
def test_every_command_reports_it_in_one_sentence(
    folder, tmp_path, monkeypatch, capsys, target, column, value
):
    rewrite(folder, with_value(folder, column, 3, value))
    arguments = [folder, *([f"--out={tmp_path / 'look'}"] if target is preview else [])]
    said = is_one_sentence(target, arguments, monkeypatch, capsys)
    assert f"{column} must be from" in said and "in row 3" in said


def test_a_wrong_table_cannot_be_repaired(folder, capsys):
    rewrite(folder, with_value(folder, "fps", 3, np.nan))
    with pytest.raises(ShardFault, match=r"fps must be from .* got nan in row 3"):
        verify(folder, workers=1, repair="drop")
    assert "Cannot restore the table of train" in capsys.readouterr().out


# --- the files themselves


def headers() -> dict[str, bytes]:
    whole = json.dumps(
        {"fps": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}}
    ).encode()
    return {
        "a wrong header length": (2**62).to_bytes(8, "little") + b"{}",
        "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
        "truncated": b"\x02\0",
        "empty": b"",
        "a wrong shape": len(whole).to_bytes(8, "little") + whole + bytes(8),
        "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "not safetensors": b"PK\x03\x04" * 100,
    }


@pytest.mark.parametrize("content", headers().values(), ids=headers())
def test_a_damaged_table_is_one_sentence(folder, content):
    (folder / "train.safetensors").write_bytes(content)
    seal(folder)
    with pytest.raises(
        UserError, match=r"Cannot use the table of split train, .*train\.safetensors: "
    ):
        load_index(folder, "train")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_a_type_that_numpy_does_not_have_is_one_sentence(folder, dtype):
    size = 2 if dtype == "BF16" else 1
    header = json.dumps(
        {"fps": {"dtype": dtype, "shape": [6], "data_offsets": [0, 6 * size]}}
    ).encode()
    (folder / "train.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(6 * size)
    )
    seal(folder)
    with pytest.raises(UserError, match="Cannot use the table of split train"):
        load_index(folder, "train")


def replace_with(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)


KINDS = ["fifo", "folder", "device", "link to itself"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["index.json", "train.safetensors"])
def test_an_index_that_is_not_a_file_is_refused_without_waiting(folder, kind, name):
    replace_with(folder / name, kind)
    with pytest.raises(UserError, match=r"index\.json|table of split train"):
        load_index(folder, "train")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tar_that_is_not_a_file_is_refused_without_waiting(
    folder, tmp_path, kind, capsys
):
    replace_with(folder / "train-000001.tar", kind)
    index = load_index(folder, "train")
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        index.check_files()
    with pytest.raises(OSError):
        VideoReader(index, FrameSampling(), 0, False).read(4)
    with pytest.raises(ShardFault, match=r"train-000001\.tar"):
        verify(folder, workers=1)
    preview(folder, out=tmp_path / "look")
    assert "00000004 is broken" in capsys.readouterr().out


def test_a_truncated_tar_allocates_no_memory_for_its_missing_bytes(
    folder, tmp_path, capsys
):
    """Its size in index.json is wrong too, because a clip's place is checked against it."""
    manifest = json.loads((folder / "index.json").read_text())
    manifest["splits"]["train"]["shards"][1]["bytes"] = 2**40
    (folder / "index.json").write_text(json.dumps(manifest))
    rewrite(folder, with_value(folder, "size", 5, 2**31))
    index = load_index(folder, "train")
    with pytest.raises(ValueError, match="must hold 2147483648 bytes at"):
        VideoReader(index, FrameSampling(), 0, False).read(
            5, lambda size: pytest.fail("memory was allocated")
        )
    preview(folder, out=tmp_path / "look")
    assert "00000005 is broken: its shard ends before it" in capsys.readouterr().out


def test_a_split_without_clips_is_refused_where_clips_are_read(folder):
    table = load_file(folder / "train.safetensors")
    rewrite(folder, {name: column[:0] for name, column in table.items()})
    assert len(load_index(folder, "train")) == 0
    with pytest.raises(UserError, match=r"Split train must contain a clip, got none"):
        open_indexes(folder, "train")


# --- index.json


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "content", ["[" * 10**6, '{"a":' * 10**5, "1" * 10_000, "\udcff", "NaN", ""]
)
def test_an_index_of_invalid_json_is_one_sentence(folder, content):
    (folder / "index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"index\.json"):
        read_manifest(folder)


def test_an_index_that_is_too_large_is_not_read(folder):
    with (folder / "index.json").open("r+b") as file:
        file.truncate(2**33)  # sparse
    with pytest.raises(
        UserError,
        match=r"index\.json as JSON: the file is larger than 268,435,456 bytes",
    ):
        read_manifest(folder)


def shard_entry(**changes) -> dict:
    return {"file": "train-000000.tar", "bytes": 3, "sha256": "aa", "clips": 1} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": {}},
        {"splits": None},
        {"splits": {"train": None}},
        {"splits": {"train": []}},
        {"corpus": 3},
        {"language": ["de"]},
        {"options": []},
        {"skipped": 1},
        {"replaced": 3},
        {"replaced": ["../x"]},
        {"clips": "3"},
        {"clips": -1},
        {"clips": 1.5},
        {"clips": True},
        {"frames": None},
        {"frames": 2**64},
        {"table": "../train.safetensors"},
        {"table": "/etc/passwd"},
        {"table": 3},
        {"table_sha256": None},
        {"table_sha256": 3},
        {"shards": None},
        {"shards": {}},
        {"shards": [3]},
        {"shards": [{}]},
        {"shards": [shard_entry(more=1)]},
        {"shards": [shard_entry(file="../x.tar")]},
        {"shards": [shard_entry(file="/x.tar")]},
        {"shards": [shard_entry(file="")]},
        {"shards": [shard_entry(bytes=-1)]},
        {"shards": [shard_entry(bytes=2**63)]},
        {"shards": [shard_entry(bytes=1.0)]},
        {"shards": [shard_entry(bytes="3")]},
        {"shards": [shard_entry(clips=None)]},
        {"shards": [shard_entry(sha256=["aa"])]},
        {"shards": [shard_entry(), shard_entry()]},
    ],
    ids=str,
)
def test_an_index_with_a_field_of_another_type_is_one_sentence(folder, changes):
    manifest = json.loads((folder / "index.json").read_text())
    for name, value in changes.items():
        (manifest["splits"]["train"] if name in manifest["splits"]["train"] else manifest)[
            name
        ] = value
    (folder / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"index\.json"):
        load_index(folder, "train")


def test_the_name_of_a_split_is_a_plain_name(folder):
    """A repair writes a file with the name of the split."""
    manifest = json.loads((folder / "index.json").read_text())
    manifest["splits"]["../../train"] = manifest["splits"].pop("train")
    (folder / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"File names in index\.json"):
        verify(folder, workers=1, repair="drop")
