"""Checkpoints of a world of one; two ranks and kills at every point are in test_parity
and its scenarios."""

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.training import checkpoint
from flallm_ds.training.fragments import Key

FILE = "rank-00000.000.safetensors"
ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


def fragments(value: float = 1.0) -> checkpoint.Fragments:
    """What a rank of a small model owns: a weight in two parts, and a buffer."""
    yield Key("master", "layer.weight", 0, 30), torch.full((30,), value)
    yield Key("master", "layer.weight", 30, 50), torch.full((20,), value)
    yield Key("buffer", "norm.mean", 0, 2), torch.tensor([0.5, value])


def save(
    folder: Path, step: int, keep: int = 2, content=None, background: bool = False
) -> Path:
    state = {"step": step, "text": "ä"}
    content = fragments() if content is None else content
    saving = checkpoint.Save(folder, step, state, content, ALONE, background=background)
    saving.commit(keep)
    return saving.final


def weight(path: Path) -> list[float]:
    out = torch.zeros(50)
    found = checkpoint.newest(path.parent, ALONE)
    assert found is not None and found.path == path
    found.reader().read(Key("master", "layer.weight", 0, 50), out)
    return out.tolist()


def names(folder: Path) -> list[str]:
    """The names in a folder, once old checkpoints are removed."""
    deadline = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return sorted(path.name for path in folder.iterdir())


def test_a_committed_checkpoint_holds_what_was_written(tmp_path):
    path = save(tmp_path, 1200)
    assert path == tmp_path / "step-00001200" and checkpoint.committed(tmp_path) == [path]
    assert checkpoint.read_state(path) == {"step": 1200, "text": "ä"}
    assert weight(path) == [1.0] * 50
    assert names(tmp_path) == ["step-00001200"]


def test_only_the_newest_are_kept_in_the_order_of_steps(tmp_path):
    for step in (5, 90, 100, 1000):
        save(tmp_path, step, keep=3)
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        f"step-{s:08d}" for s in (90, 100, 1000)
    ]
    assert len(names(tmp_path)) == 3


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 7)
    path = save(tmp_path, 7, content=fragments(2.0))
    assert weight(path)[0] == 2.0 and checkpoint.read_state(path)["step"] == 7


def test_a_checkpoint_is_written_in_the_background_and_committed_later(tmp_path):
    may_finish = threading.Event()

    def slow() -> checkpoint.Fragments:
        may_finish.wait()
        yield from fragments()

    state = {"step": 3}
    saving = checkpoint.Save(tmp_path, 3, state, slow(), ALONE, background=True)
    assert not saving.is_written() and checkpoint.committed(tmp_path) == []
    may_finish.set()
    saving.commit(keep=1)
    assert saving.is_written() and weight(saving.final) == [1.0] * 50


def test_a_folder_without_checkpoints_has_none_committed(tmp_path):
    assert checkpoint.committed(tmp_path / "none") == []


def test_a_checkpoint_without_a_commit_is_never_taken_and_the_next_save_clears_it_away(
    tmp_path,
):
    save(tmp_path, 1)

    checkpoint.Save(tmp_path, 2, {}, fragments(), ALONE, background=False)  # no commit
    assert (tmp_path / ".partial-step-00000002" / FILE).is_file()
    (tmp_path / "step-00000009").mkdir()  # an incomplete copy
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000001"]
    save(tmp_path, 2)
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        "step-00000001",
        "step-00000002",
    ]
    assert not (tmp_path / ".partial-step-00000002").exists()


def test_a_flipped_bit_is_named(tmp_path):
    path = save(tmp_path, 3)
    flip(path / FILE)
    with pytest.raises(
        UserError, match=rf"Cannot read .*step-00000003: {FILE} was changed"
    ):
        checkpoint.newest(tmp_path, ALONE)


def test_a_missing_file_is_named(tmp_path):
    path = save(tmp_path, 3)
    (path / FILE).unlink()
    with pytest.raises(UserError, match=f"{FILE} is missing"):
        checkpoint.newest(tmp_path, ALONE)


def test_a_changed_state_is_named(tmp_path):
    manifest = save(tmp_path, 3) / "manifest.json"
    whole = manifest.read_text()
    for changed in (whole.replace('"step": 3', '"step": 4'), whole[:-9], "{}"):
        assert changed != whole
        manifest.write_text(changed)
        with pytest.raises(UserError, match=r"manifest\.json was changed"):
            checkpoint.read_state(manifest.parent)


def test_a_state_may_be_replaced_whole(tmp_path):
    path = save(tmp_path, 3)
    content = (path / FILE).read_bytes()
    checkpoint.replace_state(tmp_path, 3, {"step": 3, "epoch": 1}, ALONE)
    assert checkpoint.read_state(path) == {"step": 3, "epoch": 1}
    assert (path / FILE).read_bytes() == content


def test_a_state_that_cannot_be_replaced_stays(tmp_path):
    path = save(tmp_path, 3)
    (path / ".partial-manifest.json").mkdir()
    with pytest.raises(UserError, match="Cannot read or write"):
        checkpoint.replace_state(tmp_path, 3, {"step": 4}, ALONE)
    assert checkpoint.read_state(path)["step"] == 3


def no_space() -> checkpoint.Fragments:
    yield from fragments()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_is_an_error_and_leaves_earlier_checkpoints_complete(
    tmp_path, background
):
    earlier = save(tmp_path, 1, keep=1)
    with pytest.raises(
        UserError,
        match=r"Cannot write .*step-00000002: .*No space.* \(rank 0\)\. Earlier .* complete",
    ):
        save(tmp_path, 2, keep=1, content=no_space(), background=background)
    assert checkpoint.committed(tmp_path) == [earlier]
    assert checkpoint.read_state(earlier)["step"] == 1


def test_a_commit_that_cannot_be_written_is_an_error_too(tmp_path):
    """The disk fills between the files and the manifest: every rank must know, or the
    others wait."""
    earlier = save(tmp_path, 1)

    def blocked() -> checkpoint.Fragments:
        yield from fragments()
        (tmp_path / ".partial-step-00000002" / "manifest.json").mkdir()

    with pytest.raises(UserError, match="Cannot write checkpoint"):
        save(tmp_path, 2, content=blocked())
    assert checkpoint.committed(tmp_path) == [earlier]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="Cannot write checkpoint"):
        save(tmp_path / "checkpoints", 1)


def test_a_checkpoint_of_the_first_version_is_refused(tmp_path):
    path = tmp_path / "step-00000003"
    path.mkdir()
    old = {"files": {"engine/model.pt": "00"}, "state": {}, "sha256": "00"}
    (path / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"was written by version 0\.1 .*Resume with that"):
        checkpoint.newest(tmp_path, ALONE)


# --- damaged checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def other_run(folder: Path) -> Path:
    """A checkpoint of the same step and shapes, of another run."""
    run = folder.parent.with_name(f"{folder.parent.name}_other")
    return save(run, int(folder.name.removeprefix("step-")), content=fragments(3.0))


def other_step(folder: Path) -> None:
    """A whole checkpoint in the place of another one."""
    shutil.rmtree(folder)
    earlier = save(folder.parent.with_name(f"{folder.parent.name}_earlier"), 4)
    shutil.copytree(earlier, folder)


DAMAGES = {
    "flipped": lambda folder: flip(folder / FILE),
    "truncated": lambda folder: cut(folder / FILE),
    "empty": lambda folder: (folder / FILE).write_bytes(b""),
    "missing": lambda folder: (folder / FILE).unlink(),
    "a folder": lambda folder: [
        (folder / FILE).unlink(),
        (folder / FILE).mkdir(),
    ],
    "flipped manifest": lambda folder: flip(folder / "manifest.json"),
    "truncated manifest": lambda folder: cut(folder / "manifest.json"),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "bytes for a manifest": lambda folder: (folder / "manifest.json").write_bytes(
        b"\xff\x00"
    ),
    "a list for a manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "a file of another run": lambda folder: shutil.copy(other_run(folder) / FILE, folder),
    "a manifest of another run": lambda folder: shutil.copy(
        other_run(folder) / "manifest.json", folder
    ),
    "another step": other_step,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    before, newest = save(tmp_path, 5), save(tmp_path, 10)
    damage(newest)
    found = checkpoint.newest(tmp_path, ALONE)
    assert (found.path, found.state["step"], list(found.damaged)) == (before, 5, [newest])
    (sentence,) = found.damaged.values()
    assert sentence.startswith(f"Cannot read checkpoint {newest}: ")
    checkpoint.set_aside(found.damaged)
    assert checkpoint.newest(tmp_path, ALONE).damaged == {}
    save(tmp_path, 7, keep=1)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000007"]
    assert (tmp_path / "damaged-step-00000010").is_dir(), (
        "it may still be of use to somebody"
    )


def test_files_that_are_not_of_a_checkpoint_are_ignored(tmp_path):
    """A file of a rank of another run, and what a file system or a user leaves there."""
    path = save(tmp_path, 5)
    shutil.copy(other_run(path) / FILE, path / "rank-00001.000.safetensors")
    (path / ".nfs0001").write_text("a file that was open when it was removed")
    (path / "notes").mkdir()
    found = checkpoint.newest(tmp_path, ALONE)
    assert [file.name for file in found.files] == [FILE] and not found.damaged
    assert weight(path) == [1.0] * 50


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path, damage):
    """It must not start from scratch as if there had been none."""
    for path in [save(tmp_path, step) for step in (5, 10)]:
        damage(path)
    with pytest.raises(
        UserError,
        match=r"Cannot resume .*no checkpoint is complete\. .*Cannot read .*step-00000010: ",
    ):
        checkpoint.newest(tmp_path, ALONE)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.newest(tmp_path / "none", ALONE) is None
