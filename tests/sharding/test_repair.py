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
    """Three tars of three train clips; one tar of dev and one of test, of two clips each."""
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
    """The first byte of the last frame of the second clip; the id of that clip."""
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
    """What each clip's frames are, by id."""
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
    """How many files of each kind a folder has."""
    return Counter(path.suffix for path in folder.iterdir())


@pytest.mark.parametrize("harm", [flip_a_frame, truncate])
def test_drop_takes_out_the_broken_clip_and_leaves_ordinary_shards(
    built, copy, capsys, harm
):
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


def test_drop_takes_a_deleted_shard_out_of_the_index(built, copy, capsys):
    (copy / "train-000001.tar").unlink()
    verify(copy, workers=2, repair="drop")
    assert "dropped 3 clips" in capsys.readouterr().out
    assert [row["shard"] for row in rows(copy)] == [0] * 3 + [1] * 3
    kept = of_shard(built, 0) + of_shard(built, 2)
    assert [row["id"] for row in rows(copy)] == [row["id"] for row in kept]
    entry = read_manifest(copy)["skipped"]["dropped by a repair"]
    assert entry["examples"][0].startswith("train 01April")


def test_what_is_dropped_twice_is_counted_together(copy):
    (copy / "train-000001.tar").unlink()
    verify(copy, workers=1, repair="drop")
    (copy / "train-000002.tar").unlink()
    verify(copy, workers=1, repair="drop")
    entry = read_manifest(copy)["skipped"]["dropped by a repair"]
    assert entry["count"] == 6 and len(entry["examples"]) == 3 and len(rows(copy)) == 3


def test_damage_beside_the_clips_is_undone_without_loss(built, copy, capsys):
    flip(copy / "train-000001.tar", (copy / "train-000001.tar").stat().st_size - 1)
    verify(copy, workers=1, repair="drop")
    assert "damaged beside its clips only" in capsys.readouterr().out
    assert tree(copy) == tree(built)


def test_a_change_that_no_check_can_place_is_said(built, copy, capsys):
    row = of_shard(copy, 1)[0]
    # a field of the AVI header that nobody reads
    flip(copy / "train-000001.tar", row["offset"] + 0x30)
    verify(copy, workers=1, repair="drop")
    out = capsys.readouterr().out
    assert "was changed where no check can tell" in out and "dropped 0 clips" in out
    assert content(copy) == content(built)


def test_a_split_without_a_whole_clip_is_refused_and_nothing_changes(copy):
    (copy / "dev-000000.tar").unlink()
    before = tree(copy)
    with pytest.raises(UserError, match="no clip of dev is whole"):
        verify(copy, workers=1, repair="drop")
    assert tree(copy) == before


@pytest.mark.parametrize(
    "harm", [flip_a_frame, truncate, lambda folder: (folder / "train-000001.tar").unlink()]
)
def test_rebuild_makes_what_was_there(built, copy, release, capsys, harm):
    harm(copy)
    flip(copy / "dev-000000.tar", 3000)
    verify(copy, workers=1, repair="rebuild", source=release)
    out = capsys.readouterr().out
    assert out.count("was rebuilt, byte by byte as it was") == 2
    assert "all is well: 13 clips" in out
    assert tree(copy) == tree(built)


def test_rebuild_knows_the_options_and_the_importers_own(tmp_path):
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


def test_shards_of_an_option_that_is_gone_are_not_rebuilt(copy, release):
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
    assert (
        "train-000001.tar cannot be rebuilt as it was: the source"
        in capsys.readouterr().out
    )
    assert tree(copy) == before


def test_a_video_that_no_longer_decodes_is_named(copy, tmp_path, capsys):
    other = make_phoenix(tmp_path / "other", counts=(9, 2, 2))
    lost = truncate(copy)
    next(other.rglob(f"{lost}/images0001.png")).write_bytes(b"broken")
    with pytest.raises(ShardFault):
        verify(copy, workers=1, repair="rebuild", source=other)
    assert f"cannot be rebuilt as it was: train {lost}: " in capsys.readouterr().out


@pytest.mark.parametrize("how", ["drop", "rebuild"])
def test_a_lost_table_is_restored_from_its_tars(built, copy, release, capsys, how):
    (copy / "train.safetensors").unlink()
    flip(copy / "dev.safetensors", 300)
    verify(copy, workers=1, repair=how, source=release if how == "rebuild" else None)
    assert "the table of train was restored from its tars" in capsys.readouterr().out
    assert tree(copy) == tree(built)


@pytest.mark.parametrize("what", ["table", "file"])
def test_nothing_beside_the_folder_is_touched(copy, what):
    """Whoever made the shards chose the names and the checksums in index.json."""
    path = copy / "index.json"
    manifest = json.loads(path.read_text())
    entry = manifest["splits"]["train"]
    (entry if what == "table" else entry["shards"][0])[what] = "../mine"
    path.write_text(json.dumps(manifest))
    (copy.parent / "mine").write_text("mine")
    with pytest.raises(
        UserError, match=r"file names in index\.json must consist of .*'\.\./mine'"
    ):
        verify(copy, workers=1, repair="drop")
    assert (copy.parent / "mine").read_text() == "mine"


def test_a_lost_table_of_broken_tars_is_one_sentence(copy, capsys):
    (copy / "train.safetensors").unlink()
    truncate_at = (copy / "train-000001.tar").stat().st_size // 2
    os.truncate(copy / "train-000001.tar", truncate_at)
    with pytest.raises(ShardFault, match="the table of split train"):
        verify(copy, workers=1, repair="drop")
    assert (
        "the table of train cannot be restored, because its tars are not whole"
        in capsys.readouterr().out
    )


def test_a_strange_tar_is_left_alone(copy):
    (copy / "mine.tar").write_bytes(b"x")
    with pytest.raises(ShardFault, match="no repair touches it"):
        verify(copy, workers=1, repair="drop")
    assert (copy / "mine.tar").read_bytes() == b"x"


def test_whole_shards_are_not_touched(copy, built, release):
    times = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    verify(copy, workers=1, repair="drop")
    verify(copy, workers=1, repair="rebuild", source=release)
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == times


@pytest.mark.parametrize(
    "given",
    [{"repair": "rebuild"}, {"source": Path()}, {"repair": "drop", "source": Path()}],
)
def test_rebuild_and_source_go_together(copy, given):
    with pytest.raises(
        UserError, match="--repair=rebuild and --source must be given together"
    ):
        verify(copy, workers=1, **given)


def test_wrong_sources_are_one_sentence(copy, tmp_path):
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


def test_a_second_repair_is_refused_while_one_is_at_work(copy):
    (copy / "train-000001.tar").unlink()
    before = tree(copy)
    handle = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another is at work"):
            verify(copy, workers=1, repair="drop")
    finally:
        os.close(handle)
    assert tree(copy) == before


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that is killed at its n-th write, rename or removal;
    whether it came so far."""
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
def test_a_repair_that_is_killed_at_any_step_loses_nothing_and_is_started_again(
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
    """Ids of the train clips whose frames are all where the index says."""
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
        [sys.executable, str(ROOT / "shards" / "verify.py"), str(copy), "--repair=mend"],
        capture_output=True, text=True, cwd="/", timeout=120,
    )  # fmt: skip
    assert wrong.returncode == 2 and "--repair must be one of drop, rebuild" in wrong.stderr
