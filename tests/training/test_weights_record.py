"""weights.json: what a run really began with. Of a real run:
tests/training/test_backbone_training.py."""

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
    """The hub's cache with microsoft/resnet-18 in it, as its client lays it out; no network."""
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
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in cached.iterdir()
    }
    assert digests(entry) == files and "model.safetensors" in files
    assert {f["file"]: f["bytes"] for f in entry["files"]} == {
        p.name: p.stat().st_size for p in cached.iterdir()
    }


def test_random_weights_are_no_files(tmp_path):
    assert loaded(config_of(tmp_path, "none"))["visual.weights"]["files"] == []


def test_a_file_is_recorded_itself(tmp_path):
    torch.save({}, tmp_path / "resnet18.pth")
    for weights in (
        str(tmp_path / "resnet18.pth"),
        f"timm/resnet18@{tmp_path / 'resnet18.pth'}",
    ):
        entry = loaded(config_of(tmp_path, weights))["visual.weights"]
        assert list(digests(entry)) == ["resnet18.pth"] and entry["revision"] is None


def test_an_llm_is_recorded_as_far_as_it_was_read(tmp_path):
    """Stage 1 reads its tokenizer; random weights come from its config alone."""
    joint = loaded(config_of(tmp_path, "none", "joint"))["llm.name"]
    assert digests(joint)["model.safetensors"] == hashlib.sha256(b"the LLM").hexdigest()
    for config in (
        config_of(tmp_path, "none"),
        config_of(tmp_path, "none", "joint", pretrained=False),
    ):
        assert list(digests(loaded(config)["llm.name"])) == ["config.json"]


def test_it_is_written_once_and_read_without_folders(tmp_path):
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


def test_a_run_that_was_begun_without_it_goes_on_without_it(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    record_weights(config_of(tmp_path, "none"), tmp_path / "run", WORLD)
    assert not (tmp_path / "run" / FILE).exists() and read_weights(tmp_path / "run") == {}
