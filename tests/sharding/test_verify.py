import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flallm_ds.data import index
from flallm_ds.errors import UserError
from flallm_ds.files import file_sha256, publish_folder
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.verify import ShardFault, verify
from flallm_ds.sharding.writer import ShardWriter, write_index
from tests.helpers.paths import ROOT
from tests.helpers.trees import make_phoenix, write_video


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return make_phoenix(tmp_path_factory.mktemp("phoenix"))


@pytest.fixture(scope="module")
def built(release, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    build("phoenix14t", release, place / "shards", Options(workers=1, clips_per_shard=3))
    return place / "shards"


@pytest.fixture(scope="module")
def h264(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("h264")
    write_video(place / "a.mp4", 20)
    write_video(place / "b.mp4", 12)
    (place / "m.csv").write_text("video,text,split\na.mp4,x,train\nb.mp4,y,train\n")
    options = Options(workers=1, short_side=32, clip_format="h264", gop=4)
    build("manifest", place / "m.csv", place / "shards", options, language="de")
    return place / "shards"


@pytest.fixture
def copy(built, tmp_path) -> Path:
    shutil.copytree(built, tmp_path / "shards")
    return tmp_path / "shards"


def faults(folder: Path, capsys) -> list[str]:
    with pytest.raises(ShardFault):
        verify(folder, workers=1)
    return without_notes(capsys.readouterr().out)


def without_notes(out: str) -> list[str]:
    return [line for line in out.splitlines() if not line.startswith("note: ")]


def reseal(folder: Path, name: str) -> None:
    """Write the checksum of a changed tar into index.json, so that other checks must find
    the change."""
    manifest = json.loads((folder / "index.json").read_text())
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            if shard["file"] == name:
                shard["sha256"] = file_sha256(folder / name)
                shard["bytes"] = (folder / name).stat().st_size
    (folder / "index.json").write_text(json.dumps(manifest))


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_undamaged_shards_have_no_faults(built, capsys):
    verify(built, workers=1)
    assert "all is well: 11 clips, 34 frames, 5 shards" in capsys.readouterr().out


def test_a_truncated_shard_gives_one_line_and_exit_code_1(copy):
    path = copy / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-5000])
    done = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "verify.py"), str(copy)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = without_notes(done.stdout)
    assert len(lines) == 1 and "train-000001.tar must have" in lines[0]
    assert len(done.stderr.splitlines()[-1:]) == 1 and "got 1 fault(s)" in done.stderr


def test_one_changed_byte_is_found(copy, capsys):
    change(copy / "dev-000000.tar", 4000, b"\x07")
    found = "\n".join(faults(copy, capsys))
    assert "dev-000000.tar must have the checksum" in found


def test_a_missing_and_an_unknown_tar_are_found(copy, capsys):
    (copy / "test-000000.tar").rename(copy / "old-000000.tar")
    missing, unknown = faults(copy, capsys)
    assert missing == "Cannot read test-000000.tar: No such file or directory."
    assert "old-000000.tar is not in index.json" in unknown


def test_a_changed_table_is_found(copy, capsys):
    change(copy / "dev.safetensors", 300, b"xxxx")
    assert "the table of split dev" in faults(copy, capsys)[0]


def test_a_frame_that_does_not_decode_is_found_even_with_a_correct_checksum(copy, capsys):
    row = next(index.iter_rows(index.load_index(copy, "dev")))
    change(copy / "dev-000000.tar", row["offset"] + row["size"] - 350, bytes(300))
    reseal(copy, "dev-000000.tar")
    assert "00000000" in "\n".join(faults(copy, capsys))


def test_a_json_member_with_other_values_is_found(copy, capsys):
    path = copy / "dev-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"am tag 1", b"am tag 7"))
    reseal(copy, "dev-000000.tar")
    (line,) = faults(copy, capsys)
    assert "00000001 must have a JSON member that agrees" in line


def test_members_in_another_order_are_found(copy, capsys):
    path = copy / "dev-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"00000000.avi", b"00000002.avi", 1))
    reseal(copy, "dev-000000.tar")
    assert len(faults(copy, capsys)) >= 1


def test_h264_clips_are_checked(h264, tmp_path, capsys):
    verify(h264, workers=1)
    assert "all is well: 2 clips, 32 frames" in capsys.readouterr().out
    shutil.copytree(h264, tmp_path / "shards")
    row = next(index.iter_rows(index.load_index(h264, "train")))
    change(
        tmp_path / "shards" / "train-000000.tar",
        row["offset"] + row["size"] // 3,
        bytes(300),
    )
    reseal(tmp_path / "shards", "train-000000.tar")
    assert "is broken" in "\n".join(faults(tmp_path / "shards", capsys))


def test_overlaps_of_splits_are_printed_and_are_not_faults(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", 12)
    rows = [
        "a.mp4,guten tag,0,0.5,train,anna",
        "a.mp4,guten tag,0.5,1,test,anna",
        "a.mp4,x,0,1,dev,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(["video,text,start,end,split,signer", *rows]))
    build(
        "manifest",
        tmp_path / "m.csv",
        tmp_path / "shards",
        Options(workers=1),
        language="de",
    )
    capsys.readouterr()
    verify(tmp_path / "shards", workers=1)
    lines = capsys.readouterr().out.splitlines()
    leak = "1 source videos (1 clips of test: a.mp4), which is leakage"
    assert f"warning: train and test share {leak}" in lines
    assert sum(line.startswith("warning: ") for line in lines) == 3
    assert "all is well" in lines[-1]
    shared = "1 signers (1 clips of test: anna) and 1 texts (1 clips of test: guten tag)"
    assert f"note: train and test share {shared}" in lines


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"index\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("key", ["a.b", "", "a/b"])
def test_a_key_that_webdataset_cannot_read_is_refused(tmp_path, key):
    with (
        ShardWriter(tmp_path / "x.tar", 0) as tar,
        pytest.raises(ValueError, match="key must be a name"),
    ):
        tar.add(
            key,
            [b"\xff\xd8\xff\xd9"],
            fps=25,
            height=8,
            width=8,
            id="",
            text="",
            signer="",
            video="",
            language="",
        )


def test_a_folder_from_the_shard_writer_is_valid(tmp_path):
    import numpy as np
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    folder = tmp_path / "unfinished"
    folder.mkdir()
    with ShardWriter(folder / "train-000000.tar", 0) as tar:
        facts = {"text": "x", "signer": "", "video": "", "language": "de"}
        rows = [tar.add("k", [jpeg], fps=25.0, height=8, width=8, id="a.b", **facts)]
    write_index(
        folder,
        corpus="c",
        language="de",
        options={},
        splits={"train": (rows, [tar.shard_entry])},
    )
    publish_folder(folder, tmp_path / "out")
    verify(tmp_path / "out", workers=1)
    assert index.load_index(tmp_path / "out", "train").strings("id")[0] == "a.b"
