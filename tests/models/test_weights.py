"""Weights written tensor by tensor load as those of transformers; damaged ones raise
errors."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from flallm_ds.errors import UserError
from flallm_ds.models.weights import Weights, load_weights, named_state, write_weights
from tests.helpers.tensors import same_tensors

# Tensors of 400 bytes.
TENSORS = {f"layer{n}.weight": torch.full((10, 10), float(n)) for n in range(5)}
FILES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_tensors_come_back_from_several_files(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS.items(), file_bytes=900)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *FILES,
        "model.safetensors.index.json",
    ]
    assert all(path.stat().st_size < 1300 for path in tmp_path.glob("model-*"))
    assert same_tensors(dict(Weights(tmp_path)), TENSORS)


def test_tensors_that_fit_into_one_file_are_written_to_one(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_larger_than_a_file_gets_its_own_file(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS.items(), file_bytes=1)
    assert len(list(tmp_path.glob("model-*"))) == 5
    assert Weights(tmp_path).names == list(TENSORS)


def test_transformers_reads_the_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=8, num_layers=1)
    )
    write_weights(tmp_path, named_state(model), file_bytes=2000)
    model.config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*"))) > 1
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in named_state(model):
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_failed_write_leaves_no_file_that_can_be_loaded(tmp_path: Path) -> None:
    def tensors():
        yield "a", torch.zeros(10)
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError):
        write_weights(tmp_path, tensors(), file_bytes=1)
    with pytest.raises(
        UserError, match=r"model\.safetensors: it is not a complete safetensors file"
    ):
        Weights(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "another file", "index"])
def test_the_error_for_a_damaged_file_names_the_file(tmp_path: Path, damage: str) -> None:
    write_weights(tmp_path, TENSORS.items(), file_bytes=900)
    path = tmp_path / FILES[1]
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "another file":
        path.write_bytes(b"<html>404</html>")
    else:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": []}))
    with pytest.raises(UserError, match="index" if damage == "index" else path.name):
        Weights(tmp_path)


def test_a_missing_tensor_or_another_shape_raises_an_error(
    tmp_path: Path,
) -> None:
    write_weights(tmp_path, [("weight", torch.ones(2, 3))])
    with pytest.raises(UserError, match="bias is missing"):
        load_weights(nn.Linear(3, 2), Weights(tmp_path))
    with pytest.raises(UserError, match=r"weight has the shape \(2, 3\), and \(4, 3\) by"):
        load_weights(nn.Linear(3, 4, bias=False), Weights(tmp_path))
