import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trees import make_phoenix

from flallm_ds.data import index
from flallm_ds.errors import UserError
from shards.build import Options, build
from shards.verify import ShardFault, verify
from shards.writer import ShardWriter, new_folder, write_index

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    build("phoenix14t", make_phoenix(place), place / "shards", Options(workers=1, clips_per_shard=3))
    return place / "shards"


@pytest.fixture
def copy(built, tmp_path) -> Path:
    shutil.copytree(built, tmp_path / "shards")
    return tmp_path / "shards"


def faults(folder: Path, capsys) -> list[str]:
    with pytest.raises(ShardFault):
        verify(folder, workers=1)
    return capsys.readouterr().out.splitlines()


def reseal(folder: Path, name: str) -> None:
    """Make index.json agree with a changed tar, so that only deeper checks can find the change."""
    manifest = json.loads((folder / "index.json").read_text())
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            if shard["file"] == name:
                shard["sha256"] = index.file_sha256(folder / name)
                shard["bytes"] = (folder / name).stat().st_size
    (folder / "index.json").write_text(json.dumps(manifest))


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_whole_shards_are_well(built, capsys):
    verify(built, workers=1)
    assert "all is well: 11 clips, 34 frames, 5 shards" in capsys.readouterr().out


def test_a_truncated_shard_is_one_line_and_exit_code_1(copy):
    path = copy / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-5000])
    done = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "verify.py"), str(copy)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1 and "train-000001.tar must hold" in done.stdout


def test_one_changed_byte_is_found(copy, capsys):
    change(copy / "dev-000000.tar", 4000, b"\x07")
    assert any("dev-000000.tar must have the checksum" in line for line in faults(copy, capsys))


def test_a_missing_and_a_strange_tar_are_found(copy, capsys):
    (copy / "test-000000.tar").rename(copy / "old-000000.tar")
    lines = faults(copy, capsys)
    assert (
        len(lines) == 2 and "old-000000.tar is no part" in lines[0] and "test-000000.tar must be" in lines[1]
    )


def test_a_changed_table_is_found(copy, capsys):
    change(copy / "dev.safetensors", 300, b"xxxx")
    assert "the table of split dev" in faults(copy, capsys)[0]


def test_a_frame_that_does_not_decode_is_found_though_the_checksum_agrees(copy, capsys):
    row = next(index.iter_rows(index.load_index(copy, "dev")))
    change(copy / "dev-000000.tar", row["offset"] + row["size"] - 350, bytes(300))
    reseal(copy, "dev-000000.tar")
    assert any("00000000" in line for line in faults(copy, capsys))


def test_a_json_member_that_disagrees_is_found(copy, capsys):
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


def test_what_is_no_shard_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"index\.json"):
        verify(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="No space left"), new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device", "x.tar")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "", "a/b"])
def test_a_key_that_webdataset_would_cut_is_refused(tmp_path, key):
    with ShardWriter(tmp_path / "x.tar", 0) as tar, pytest.raises(ValueError, match="dot-free"):
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


def test_a_hand_written_folder_is_read(tmp_path):
    import numpy as np
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    with new_folder(tmp_path / "out") as folder:
        with ShardWriter(folder / "train-000000.tar", 0) as tar:
            facts = {"text": "x", "signer": "", "video": "", "language": "de"}
            rows = [tar.add("k", [jpeg], fps=25.0, height=8, width=8, id="a.b", **facts)]
        write_index(
            folder, corpus="c", language="de", options={}, splits={"train": (rows, [tar.shard_entry])}
        )
    verify(tmp_path / "out", workers=1)
    assert index.load_index(tmp_path / "out", "train").strings("id")[0] == "a.b"
