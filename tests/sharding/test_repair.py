import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from flallm_ds.data.codecs.decode import jpegs_of
from flallm_ds.data.index import iter_rows, load_index, read_manifest
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import Options, build
from flallm_ds.sharding.verify import ShardFault, verify
from tests.helpers.paths import ROOT
from tests.helpers.trees import make_phoenix, write_video


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return make_phoenix(tmp_path_factory.mktemp("phoenix"), counts=(9, 2, 2))


@pytest.fixture(scope="module")
def built(release, tmp_path_factory) -> Path:
    """Build three tars of three training clips each. Dev and test have one tar of two."""
    place = tmp_path_factory.mktemp("repair")
    build("phoenix14t", release, place / "shards", Options(workers=1, clips_per_shard=3))
    return place / "shards"


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder: Path, split: str = "train") -> list[dict]:
    return list(iter_rows(load_index(folder, split)))


def of_shard(folder: Path, number: int) -> list[dict]:
    return [row for row in rows(folder) if row["shard"] == number]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def flip_a_frame(folder: Path) -> str:
    """Flip the first byte of the last frame of a clip, and return the id of that clip."""
    row = of_shard(folder, 1)[1]
    with (folder / "train-000001.tar").open("rb") as file:
        file.seek(row["offset"])
        member = file.read(row["size"])
    flip(folder / "train-000001.tar", row["offset"] + member.rindex(b"\xff\xd8"))
    return str(row["id"])


def truncate(folder: Path) -> str:
    row = of_shard(folder, 1)[2]
    os.truncate(folder / "train-000001.tar", row["offset"] + row["size"] // 2)
    return str(row["id"])


def content(folder: Path) -> dict[str, list[bytes]]:
    """Return the JPEGs of each training clip, by id."""
    found = {}
    for row in rows(folder):
        shard = read_manifest(folder)["splits"]["train"]["shards"][row["shard"]]["file"]
        with (folder / shard).open("rb") as file:
            file.seek(row["offset"])
            member = file.read(row["size"])
        found[row["id"]] = list(
            map(bytes, jpegs_of(member, slice(None), row["num_frames"]))
        )
    return found


def suffixes(folder: Path) -> Counter[str]:
    """Return the number of files of each kind in a folder."""
    return Counter(path.suffix for path in folder.iterdir())


@pytest.mark.parametrize("harm", [flip_a_frame, truncate])
def test_drop_removes_the_broken_clip_and_leaves_valid_shards(built, copy, capsys, harm):
    lost = harm(copy)
    verify(copy, workers=1, repair="drop")
    out = capsys.readouterr().out
    assert f"dropped 1 clips\n  train {lost}" in out and "all is well: 12 clips" in out
    expected = content(built)
    del expected[lost]
    assert content(copy) == expected and rows(copy, "dev") == rows(built, "dev")
    assert load_index(copy, "train").fingerprint != load_index(built, "train").fingerprint
    assert load_index(copy, "dev").fingerprint == load_index(built, "dev").fingerprint
    assert read_manifest(copy)["skipped"]["dropped by a repair"]["count"] == 1
    urls = sorted(map(str, copy.glob("train-*.tar")))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert keys == [row["key"] for row in rows(copy)]
    assert suffixes(copy) == suffixes(built)
    verify(copy, workers=1)


def test_drop_removes_a_deleted_shard_from_the_index(built, copy, capsys):
    (copy / "train-000001.tar").unlink()
    verify(copy, workers=2, repair="drop")
    assert "dropped 3 clips" in capsys.readouterr().out
    assert [row["shard"] for row in rows(copy)] == [0] * 3 + [1] * 3
    kept = of_shard(built, 0) + of_shard(built, 2)
    assert [row["id"] for row in rows(copy)] == [row["id"] for row in kept]
    entry = read_manifest(copy)["skipped"]["dropped by a repair"]
    assert entry["examples"][0].startswith("train 01April")


def test_clips_of_two_drops_are_counted_together(copy):
    (copy / "train-000001.tar").unlink()
    verify(copy, workers=1, repair="drop")
    (copy / "train-000002.tar").unlink()
    verify(copy, workers=1, repair="drop")
    entry = read_manifest(copy)["skipped"]["dropped by a repair"]
    assert entry["count"] == 6 and len(entry["examples"]) == 3 and len(rows(copy)) == 3


def test_damage_outside_the_clips_is_repaired_without_loss(built, copy, capsys):
    flip(copy / "train-000001.tar", (copy / "train-000001.tar").stat().st_size - 1)
    verify(copy, workers=1, repair="drop")
    assert "damaged outside its clips only" in capsys.readouterr().out
    assert tree(copy) == tree(built)


def test_a_change_that_no_check_can_locate_is_reported(built, copy, capsys):
    row = of_shard(copy, 1)[0]
    # A field of the AVI header that no decoder reads.
    flip(copy / "train-000001.tar", row["offset"] + 0x30)
    verify(copy, workers=1, repair="drop")
    out = capsys.readouterr().out
    assert "a change that no check can locate" in out and "dropped 0 clips" in out
    assert content(copy) == content(built)


def test_drop_refuses_a_split_without_undamaged_clips_and_changes_nothing(copy):
    (copy / "dev-000000.tar").unlink()
    before = tree(copy)
    with pytest.raises(UserError, match="broken clips of dev: no clip would remain"):
        verify(copy, workers=1, repair="drop")
    assert tree(copy) == before


@pytest.mark.parametrize(
    "harm", [flip_a_frame, truncate, lambda folder: (folder / "train-000001.tar").unlink()]
)
def test_rebuild_restores_the_original_bytes(built, copy, release, capsys, harm):
    harm(copy)
    flip(copy / "dev-000000.tar", 3000)
    verify(copy, workers=1, repair="rebuild", source=release)
    out = capsys.readouterr().out
    assert out.count("was rebuilt and is identical to the original") == 2
    assert "all is well: 13 clips" in out
    assert tree(copy) == tree(built)


def test_rebuild_uses_the_options_of_the_build_and_of_the_importer(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    write_video(tmp_path / "b.mp4", 12)
    (tmp_path / "how2sign.csv").write_text(
        "video,text,split\na.mp4,x,train\nb.mp4,y,train\na.mp4,z,dev\n"
    )
    options = Options(
        workers=1, short_side=32, clip_format="h264", gop=4, fps=5.0, crop=(0.0, 0.0, 0.5, 1.0),
        mb_per_shard=0.1, splits=("train",),
    )  # fmt: skip
    build(
        "manifest", tmp_path / "how2sign.csv", tmp_path / "shards", options, language="de"
    )
    before = tree(tmp_path / "shards")
    (tmp_path / "shards" / "train-000000.tar").unlink()
    verify(
        tmp_path / "shards", workers=1, repair="rebuild", source=tmp_path / "how2sign.csv"
    )
    assert tree(tmp_path / "shards") == before


def test_shards_that_were_built_with_a_removed_option_are_not_rebuilt(copy, release):
    path = copy / "index.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["align"] = "facebook/wav2vec2-base-960h"
    path.write_text(json.dumps(manifest))
    (copy / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"Cannot rebuild .* built with --align"):
        verify(copy, workers=1, repair="rebuild", source=release)


def test_a_source_that_has_changed_replaces_nothing(copy, tmp_path, capsys):
    other = make_phoenix(tmp_path / "other", counts=(9, 2, 2))
    lost = flip_a_frame(copy)
    next(other.rglob(f"{lost}/images0001.png")).unlink()
    before = tree(copy)
    with pytest.raises(ShardFault):
        verify(copy, workers=1, repair="rebuild", source=other)
    assert "Cannot rebuild train-000001.tar: the source" in capsys.readouterr().out
    assert tree(copy) == before


def test_a_video_that_no_longer_decodes_is_named(copy, tmp_path, capsys):
    other = make_phoenix(tmp_path / "other", counts=(9, 2, 2))
    lost = truncate(copy)
    next(other.rglob(f"{lost}/images0001.png")).write_bytes(b"broken")
    with pytest.raises(ShardFault):
        verify(copy, workers=1, repair="rebuild", source=other)
    assert f"Cannot rebuild train-000001.tar: train {lost}: " in capsys.readouterr().out


@pytest.mark.parametrize("how", ["drop", "rebuild"])
def test_a_lost_table_is_restored_from_the_tars(built, copy, release, capsys, how):
    (copy / "train.safetensors").unlink()
    flip(copy / "dev.safetensors", 300)
    verify(copy, workers=1, repair=how, source=release if how == "rebuild" else None)
    assert "the table of train was restored from its tars" in capsys.readouterr().out
    assert tree(copy) == tree(built)


@pytest.mark.parametrize("what", ["table", "file"])
def test_no_file_outside_the_folder_is_changed(copy, what):
    """The file names in index.json may be hostile."""
    path = copy / "index.json"
    manifest = json.loads(path.read_text())
    entry = manifest["splits"]["train"]
    (entry if what == "table" else entry["shards"][0])[what] = "../mine"
    path.write_text(json.dumps(manifest))
    (copy.parent / "mine").write_text("mine")
    with pytest.raises(
        UserError, match=r"File names in index\.json must consist of .*'\.\./mine'"
    ):
        verify(copy, workers=1, repair="drop")
    assert (copy.parent / "mine").read_text() == "mine"


def test_a_lost_table_of_damaged_tars_is_not_restored(copy, capsys):
    (copy / "train.safetensors").unlink()
    truncate_at = (copy / "train-000001.tar").stat().st_size // 2
    os.truncate(copy / "train-000001.tar", truncate_at)
    with pytest.raises(ShardFault, match="the table of split train"):
        verify(copy, workers=1, repair="drop")
    out = capsys.readouterr().out
    assert "Cannot restore the table of train: the tars are damaged" in out


def test_a_tar_that_is_not_in_the_index_is_not_changed(copy):
    (copy / "mine.tar").write_bytes(b"x")
    with pytest.raises(ShardFault, match="--repair ignores it"):
        verify(copy, workers=1, repair="drop")
    assert (copy / "mine.tar").read_bytes() == b"x"


def test_undamaged_shards_are_not_changed(copy, built, release):
    times = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    verify(copy, workers=1, repair="drop")
    verify(copy, workers=1, repair="rebuild", source=release)
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == times


@pytest.mark.parametrize(
    "given",
    [{"repair": "rebuild"}, {"source": Path()}, {"repair": "drop", "source": Path()}],
)
def test_rebuild_and_source_must_be_given_together(copy, given):
    with pytest.raises(
        UserError, match="--repair=rebuild and --source must be given together"
    ):
        verify(copy, workers=1, **given)


def test_wrong_sources_are_refused(copy, tmp_path):
    (copy / "dev-000000.tar").unlink()
    before = tree(copy)
    with pytest.raises(UserError, match="--source must be an existing"):
        verify(copy, workers=1, repair="rebuild", source=tmp_path / "nowhere")
    with pytest.raises(UserError, match="PHOENIX"):
        verify(copy, workers=1, repair="rebuild", source=tmp_path)
    manifest = read_manifest(copy)
    del manifest["importer"]
    (copy / "index.json").write_text(json.dumps(manifest))
    before["index.json"] = (copy / "index.json").read_bytes()
    with pytest.raises(UserError, match="not name a known importer"):
        verify(copy, workers=1, repair="rebuild", source=tmp_path)
    assert tree(copy) == before


def test_a_second_repair_is_refused_while_one_is_running(copy):
    (copy / "train-000001.tar").unlink()
    before = tree(copy)
    handle = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another repair"):
            verify(copy, workers=1, repair="drop")
    finally:
        os.close(handle)
    assert tree(copy) == before


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that is killed at a given write, rename or removal.

    Returns False if the process ended before that step.
    """
    pid = os.fork()
    if pid == 0:
        seen = 0

        def hook(event: str, details: tuple) -> None:
            nonlocal seen
            steps = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
            if event == "open" and isinstance(details[2], int):
                steps = bool(details[2] & (os.O_WRONLY | os.O_RDWR))
            if steps:
                seen += 1
                if seen > step:
                    os._exit(9)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("how", ["drop", "rebuild"])
def test_a_repair_killed_at_any_step_loses_nothing_and_can_be_started_again(
    built, tmp_path, release, how
):
    harmed = Path(shutil.copytree(built, tmp_path / "harmed"))
    flip_a_frame(harmed)
    (harmed / "train-000002.tar").unlink()
    (harmed / "dev.safetensors").unlink()
    source = release if how == "rebuild" else None
    undisturbed = Path(shutil.copytree(harmed, tmp_path / "undisturbed"))
    verify(undisturbed, workers=1, repair=how, source=source)
    whole = readable(harmed)
    step = 0
    while True:
        folder = Path(shutil.copytree(harmed, tmp_path / f"{step}"))
        killed = killed_at(
            step, lambda folder=folder: verify(folder, workers=1, repair=how, source=source)
        )
        assert whole <= readable(folder), step
        verify(folder, workers=1, repair=how, source=source)
        assert tree(folder) == tree(undisturbed), step
        shutil.rmtree(folder)
        if not killed:
            break
        step += 1
    assert step > 10


def readable(folder: Path) -> set[str]:
    """Return the ids of the training clips whose frames can all be read."""
    found = set()
    shards = read_manifest(folder)["splits"]["train"]["shards"]
    for row in rows(folder):
        path = folder / shards[row["shard"]]["file"]
        if path.exists():
            with path.open("rb") as file:
                file.seek(row["offset"])
                member = file.read(row["size"])
            try:
                jpegs_of(member, slice(None), row["num_frames"])
            except ValueError:
                continue
            found.add(row["id"])
    return found


def test_the_command_repairs(copy, release):
    flip_a_frame(copy)
    words = [str(copy), "--repair=rebuild", f"--source={release}", "--workers=2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "verify.py"), *words],
        capture_output=True, text=True, cwd="/", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "all is well" in done.stdout, done.stderr
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "shards" / "verify.py"), str(copy), "--repair=fix"],
        capture_output=True, text=True, cwd="/", timeout=120,
    )  # fmt: skip
    assert wrong.returncode == 2 and "--repair must be one of drop, rebuild" in wrong.stderr
