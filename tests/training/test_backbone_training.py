"""Backbones of transformers and timm in the real trainer: two ranks, ZeRO-2 and ZeRO-3,
one launch."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from flallm_ds import export
from flallm_ds.models.backbones.build import build_backbone
from tests.helpers.launching import losses, run_scenarios, tiny_options

VISUAL = {
    "plain": {},
    "lora": {"visual.tune": "lora", "visual.lora_rank": 2, "optim.backbone_lr": 0.05},
    "frozen": {"visual.tune": "frozen", "visual.chunk_frames": 3},
}
SHORT = {"train.max_steps": 2}


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,  # positions are interpolated to the runs' frames of 32 px
        patch_size=16,
        attention_probs_dropout_prob=0.1,
    )
    ViTModel(config).save_pretrained(folder / "vit")
    timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=0), folder / "resnet"
    )
    base: dict[str, object] = {
        "visual.width": 64,
        "data.crop_size": 32,
        "train.epochs": 1,
        "eval.num_beams": 1,
    }
    base |= {"eval.every_epochs": 1, "visual.weights": folder / "vit"}
    given: dict[str, tuple[str, dict[str, object]]] = {
        name: ("visual", {**base, **more}) for name, more in VISUAL.items()
    }
    given["checkpointing"] = ("visual", {**base, **SHORT, "visual.checkpointing": True})
    given["timm"] = ("visual", {**base, **SHORT, "visual.weights": folder / "resnet"})
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    zero3 = {"visual.tune": "lora", "train.deepspeed": folder / "zero3.json"}
    given["joint_zero3"] = ("joint", {**base, **SHORT, **zero3})
    given["llm"] = ("llm", {**base, "visual_run": folder / "lora"})
    given["llm_chunks"] = ("llm", {**given["llm"][1], **SHORT, "visual.chunk_frames": 2})
    scenarios = [
        {"stage": stage, "options": tiny_options(tiny_corpus, stage, folder / name, **more)}
        for name, (stage, more) in given.items()
    ]
    run_scenarios(scenarios, folder / "runs.json", 2)
    return folder


def backbone_of(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "best" / "visual_encoder.safetensors")
    return {
        n.removeprefix("backbone.model."): t
        for n, t in state.items()
        if n.startswith("backbone.model.")
    }


def changed(runs: Path, name: str) -> set[str]:
    """The backbone's parameters that a run has changed; all are there under their own names."""
    before = build_backbone(str(runs / "vit"), crop_size=32).model.state_dict()
    after = backbone_of(runs / name)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", [*VISUAL, "timm", "joint_zero3", "llm"])
def test_it_trains(runs: Path, name: str) -> None:
    found = losses(runs / name)
    assert len(found) == (2 if name in ("timm", "joint_zero3") else 5)
    assert np.isfinite(found).all() and len(set(found)) == len(found)


def test_each_way_to_tune_changes_what_it_says(runs: Path) -> None:
    everything = changed(runs, "plain")
    assert len(everything) == len(backbone_of(runs / "plain"))
    assert not changed(runs, "frozen")
    merged = changed(runs, "lora")
    assert merged and all(n.endswith("weight") and "norm" not in n for n in merged)
    assert not any("embeddings" in n for n in merged)


def test_checkpointing_gives_the_same_losses(runs: Path) -> None:
    """With dropout: the second forward draws what the first drew."""
    np.testing.assert_allclose(
        losses(runs / "checkpointing"), losses(runs / "plain")[:2], atol=1e-5
    )


def test_chunks_of_frames_give_the_same_losses(runs: Path) -> None:
    np.testing.assert_allclose(
        losses(runs / "llm_chunks"), losses(runs / "llm")[:2], atol=1e-5
    )


def test_stage_llm_takes_the_backbone_of_stage_visual(runs: Path) -> None:
    """Although its own options say nothing of it; the folder that it came from is no
    longer needed."""
    before, after = backbone_of(runs / "lora"), backbone_of(runs / "llm")
    assert before.keys() == after.keys() and all(
        torch.equal(before[n], after[n]) for n in before
    )
    (runs / "vit").rename(runs / "vit_elsewhere")
    try:
        visual = export.read_visual(runs / "llm" / "best")
    finally:
        (runs / "vit_elsewhere").rename(runs / "vit")
    assert visual(torch.rand(3, 3, 32, 32), torch.tensor([2, 1])).shape == (3, 32)


def test_a_run_and_its_export_say_which_weights_they_began_with(runs):
    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    kinds = {"plain": ("visual.weights", "vit"), "timm": ("visual.weights", "resnet")}
    for name, (option, folder) in (kinds | {"llm": ("visual_run", "lora/best")}).items():
        entry = json.loads((runs / name / "weights.json").read_text())[option]
        weights = [file for file in entry["files"] if not file["file"].endswith(".json")]
        assert entry["path"] == str(runs / folder) and weights
        assert all(
            file["sha256"] == sha256(runs / folder / file["file"]) for file in weights
        )
        if name == "timm":  # it ends before its first export
            continue
        exported = json.loads((runs / name / "best" / "flallm.json").read_text())["weights"]
        assert exported[option]["files"] == entry["files"] and str(runs) not in json.dumps(
            exported
        )
