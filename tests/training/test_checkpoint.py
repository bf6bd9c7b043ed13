"""Test checkpoints of one rank. test_parity.py tests those of two ranks, and kills."""

import errno
import os
from pathlib import Path

import pytest
import torch

from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.training import checkpoint

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


def write_weights(folder: Path, value: float = 1.0) -> None:
    (folder / "engine").mkdir()
    torch.save(torch.full((50,), value), folder / "engine" / "model.pt")


def save(folder: Path, step: int, keep: int = 2, write=write_weights) -> Path:
    return checkpoint.save(folder, step, {"step": step, "text": "ä"}, write, ALONE, keep)


def test_a_committed_checkpoint_contains_state_and_weights(tmp_path):
    path = save(tmp_path, 1200)
    assert path == tmp_path / "step-00001200" and checkpoint.committed(tmp_path) == [path]
    assert checkpoint.read_state(path) == {"step": 1200, "text": "ä"}
    assert torch.load(path / "engine" / "model.pt").tolist() == [1.0] * 50
    assert [p.name for p in tmp_path.iterdir()] == ["step-00001200"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 90, 100, 1000):
        save(tmp_path, step, keep=3)
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        f"step-{s:08d}" for s in (90, 100, 1000)
    ]
    assert len(list(tmp_path.iterdir())) == 3


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 7)
    path = save(tmp_path, 7, write=lambda folder: write_weights(folder, 2.0))
    assert (
        torch.load(path / "engine" / "model.pt")[0] == 2.0
        and checkpoint.read_state(path)["step"] == 7
    )


def test_a_folder_without_checkpoints_has_none_committed(tmp_path):
    assert checkpoint.committed(tmp_path / "none") == []


def test_an_incomplete_checkpoint_is_not_used_and_the_next_save_removes_it(tmp_path):
    save(tmp_path, 1)

    def killed(folder: Path) -> None:
        write_weights(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, write=killed)
    assert (tmp_path / ".partial-step-00000002" / "engine" / "model.pt").is_file()
    # An incomplete copy by a user.
    (tmp_path / "step-00000009" / "engine").mkdir(parents=True)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000001"]
    save(tmp_path, 2)
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        "step-00000001",
        "step-00000002",
    ]
    assert not (tmp_path / ".partial-step-00000002").exists()


def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path):
    path = save(tmp_path, 3)
    file = path / "engine" / "model.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"Cannot read .*step-00000003: engine/model\.pt was changed"
    ):
        checkpoint.read_state(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    path = save(tmp_path, 3)
    (path / "engine" / "model.pt").unlink()
    with pytest.raises(UserError, match=r"engine/model\.pt is missing"):
        checkpoint.read_state(path)


def test_a_changed_state_is_an_error_that_names_the_manifest(tmp_path):
    manifest = save(tmp_path, 3) / "manifest.json"
    whole = manifest.read_text()
    for changed in (whole.replace('"step": 3', '"step": 4'), whole[:-9], "{}"):
        assert changed != whole
        manifest.write_text(changed)
        with pytest.raises(UserError, match=r"manifest\.json was changed"):
            checkpoint.read_state(manifest.parent)


def test_replace_state_leaves_the_engine_unchanged(tmp_path):
    path = save(tmp_path, 3)
    engine = (path / "engine" / "model.pt").read_bytes()
    checkpoint.replace_state(tmp_path, 3, {"step": 3, "epoch": 1}, ALONE)
    assert checkpoint.read_state(path) == {"step": 3, "epoch": 1}
    assert (path / "engine" / "model.pt").read_bytes() == engine


def test_a_failed_replace_state_keeps_the_old_state(tmp_path):
    path = save(tmp_path, 3)
    (path / ".partial-manifest.json").mkdir()
    with pytest.raises(UserError, match="Cannot write checkpoint"):
        checkpoint.replace_state(tmp_path, 3, {"step": 4}, ALONE)
    assert checkpoint.read_state(path)["step"] == 3


def no_space(folder: Path) -> None:
    write_weights(folder)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(folder: Path) -> None:
    """Fill the disk: torch.save then raises a RuntimeError, not an OSError."""
    torch.save(torch.zeros(1_000_000), "/dev/full")


@pytest.mark.parametrize("write", [no_space, full_disk])
def test_a_full_disk_is_an_error_and_leaves_earlier_checkpoints_complete(tmp_path, write):
    earlier = save(tmp_path, 1, keep=1)
    with pytest.raises(
        UserError, match=r"step-00000002: .* \(rank 0\)\. Earlier checkpoints are complete"
    ):
        save(tmp_path, 2, keep=1, write=write)
    assert (
        checkpoint.committed(tmp_path) == [earlier]
        and checkpoint.read_state(earlier)["step"] == 1
    )


def test_a_failed_commit_is_an_error(tmp_path):
    """If the disk fills between the shards and the manifest, every rank must raise the
    error: otherwise the others would wait."""
    earlier = save(tmp_path, 1)

    def blocked(folder: Path) -> None:
        write_weights(folder)
        (folder / "manifest.json").mkdir()

    with pytest.raises(UserError, match="Cannot write checkpoint"):
        save(tmp_path, 2, write=blocked)
    assert checkpoint.committed(tmp_path) == [earlier]


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="Cannot write checkpoint"):
        save(tmp_path / "checkpoints", 1)


# --- damaged checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES = {
    "flipped": lambda folder: flip(folder / "engine" / "model.pt"),
    "truncated": lambda folder: cut(folder / "engine" / "model.pt"),
    "empty": lambda folder: (folder / "engine" / "model.pt").write_bytes(b""),
    "missing": lambda folder: (folder / "engine" / "model.pt").unlink(),
    "a folder": lambda folder: [
        (folder / "engine" / "model.pt").unlink(),
        (folder / "engine" / "model.pt").mkdir(),
    ],
    "flipped manifest": lambda folder: flip(folder / "manifest.json"),
    "truncated manifest": lambda folder: cut(folder / "manifest.json"),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "bytes for a manifest": lambda folder: (folder / "manifest.json").write_bytes(
        b"\xff\x00"
    ),
    "a list for a manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, damage):
    before, newest = save(tmp_path, 5), save(tmp_path, 10)
    damage(newest)
    found = checkpoint.newest(tmp_path)
    assert (found.path, found.state["step"], list(found.damaged)) == (before, 5, [newest])
    (sentence,) = found.damaged.values()
    assert sentence.startswith(f"Cannot read checkpoint {newest}: ")
    checkpoint.set_aside(found.damaged)
    assert checkpoint.newest(tmp_path).damaged == {}
    save(tmp_path, 7, keep=1)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000007"]
    assert (tmp_path / "damaged-step-00000010").is_dir(), "a user may still need it"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path, damage):
    """The run must not start from scratch as if it had no checkpoint."""
    for step in (5, 10):
        damage(save(tmp_path, step))
    with pytest.raises(
        UserError,
        match=r"Cannot resume .*no checkpoint is complete\. Cannot read .*step-00000010: ",
    ):
        checkpoint.newest(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.newest(tmp_path / "none") is None
