"""`flallm checkpoints`: what it prints, refuses and removes."""

from pathlib import Path

import pytest
import torch

from flallm_ds.cli.checkpoints import export, ls, prune, verify
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.training import checkpoint
from flallm_ds.training.fragments import Key

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5 and 10."""
    for step in (5, 10):
        state = {"position": {"epoch": 0, "step": step}}
        fragments = [(Key("master", "weight", 0, 40), torch.full((40,), float(step)))]
        saving = checkpoint.Save(
            tmp_path / "checkpoints", step, state, fragments, ALONE, background=False
        )
        saving.commit(keep=2)
    return tmp_path


def test_ls_lists_position_size_and_ranks(run, capsys):
    ls(run)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step-00000005  epoch 0  step 5  0.000 GB  1 ranks")
    assert second.startswith("step-00000010  epoch 0  step 10")


def test_verify_names_the_damaged_file(run, capsys):
    verify(run)
    assert capsys.readouterr().out.count("complete") == 2
    file = run / "checkpoints" / "step-00000010" / "rank-00000.000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot resume from step-00000010 of "):
        verify(run)
    said = capsys.readouterr().out
    assert "step-00000005: complete" in said
    assert "step-00000010: rank-00000.000.safetensors was changed" in said


def test_prune_keeps_the_newest(run, capsys):
    prune(run, keep=1)
    assert capsys.readouterr().out == "removed step-00000005\n"
    (left,) = checkpoint.committed(run / "checkpoints")
    assert left.name == "step-00000010"
    with pytest.raises(UserError, match="--keep must be at least 1, got 0"):
        prune(run, keep=0)


def test_export_lists_the_steps_and_overwrites_nothing(run, tmp_path):
    with pytest.raises(UserError, match=r"--step must be .* of .* \(5, 10\), got 7\."):
        export(run, out=tmp_path / "out", step=7)
    with pytest.raises(UserError, match=r"--out must be a new or an empty folder, got "):
        export(run, out=run)


def export_any(run: Path) -> None:
    export(run, out=run / "out")


@pytest.mark.parametrize("command", [ls, verify, prune, export_any])
def test_a_folder_without_checkpoints_is_refused(tmp_path, command):
    with pytest.raises(UserError, match=r"Cannot find a checkpoint in "):
        command(tmp_path)
