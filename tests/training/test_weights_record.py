"""Test weights.json. tests/training/test_backbone_training.py tests that of a real run."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from flallm_ds.config import LlmConfig, RunConfig, VisualConfig
from flallm_ds.dist import World
from flallm_ds.training.weights_record import FILE, loaded, read_weights, record_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORLD = World(0, 1, 0, 1)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache of the hub that contains microsoft/resnet-18, without a network."""
    repo = tmp_path / "hub" / "models--microsoft--resnet-18"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    model = ResNetModel(
        ResNetConfig(embedding_size=64, hidden_sizes=[64, 64], depths=[1, 1])
    )
    model.save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def config_of(tmp_path: Path, weights: str, stage="visual", **llm) -> RunConfig:
    folder = tmp_path / "llm"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"the LLM")
    return RunConfig(
        stage=stage,
        run=str(tmp_path / "run"),
        visual=VisualConfig(weights=weights),
        llm=LlmConfig(name=str(folder), **llm),
    )


def digests(entry: dict) -> dict[str, str]:
    return {file["file"]: file["sha256"] for file in entry["files"]}


def test_a_model_of_the_hub_has_its_revision_and_digests(cached, tmp_path):
    entry = loaded(config_of(tmp_path, "microsoft/resnet-18"))["visual.weights"]
    assert entry["name"] == "microsoft/resnet-18" and entry["revision"] == COMMIT
    assert entry["path"] == str(cached)
    files = {file["file"]: file for file in entry["files"]}
    assert "model.safetensors" in files
    for path in cached.iterdir():
        file = files.pop(path.name)
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert file["bytes"] == path.stat().st_size
    assert not files


def test_random_weights_have_no_files(tmp_path):
    assert loaded(config_of(tmp_path, "none"))["visual.weights"]["files"] == []


def test_weights_in_a_file_are_recorded_without_a_revision(tmp_path):
    torch.save({}, tmp_path / "resnet18.pth")
    for weights in (
        str(tmp_path / "resnet18.pth"),
        f"timm/resnet18@{tmp_path / 'resnet18.pth'}",
    ):
        entry = loaded(config_of(tmp_path, weights))["visual.weights"]
        assert list(digests(entry)) == ["resnet18.pth"] and entry["revision"] is None


def test_only_the_files_of_an_llm_that_were_read_are_recorded(tmp_path):
    """Stage 1 reads the tokenizer; random weights need only the config."""
    joint = loaded(config_of(tmp_path, "none", "joint"))["llm.name"]
    assert digests(joint)["model.safetensors"] == hashlib.sha256(b"the LLM").hexdigest()
    for config in (
        config_of(tmp_path, "none"),
        config_of(tmp_path, "none", "joint", pretrained=False),
    ):
        assert list(digests(loaded(config)["llm.name"])) == ["config.json"]


def test_the_record_is_written_once_and_read_without_paths(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    config = config_of(tmp_path, "none", "joint")
    record_weights(config, folder, WORLD)
    before = (folder / FILE).read_text()
    assert json.loads(before) == loaded(config)
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"another")
    record_weights(config, folder, WORLD)
    assert (folder / FILE).read_text() == before
    assert read_weights(folder)["llm.name"]["name"] == "llm" and str(
        tmp_path
    ) not in json.dumps(read_weights(folder))


def test_a_run_of_an_older_version_gets_no_record(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    record_weights(config_of(tmp_path, "none"), tmp_path / "run", WORLD)
    assert not (tmp_path / "run" / FILE).exists() and read_weights(tmp_path / "run") == {}
