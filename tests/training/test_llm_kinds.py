"""Runs that begin with quantised weights, or with a text model within a multimodal one,
and their exports."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flallm_ds import dist
from flallm_ds.models.llm.load import load_llm
from flallm_ds.recipes import resolve
from flallm_ds.training.stages import run_stage
from flallm_ds.training.stop import StopRequest
from tests.helpers.launching import losses, tiny_options
from tests.helpers.llms import make_tiny_llm
from tests.models.llm.test_multimodal import make as make_multimodal
from tests.models.llm.test_quantized import fp8, mxfp4

KINDS: dict[str, Callable[[Path, Path], object]] = {
    "fp8": lambda llama, folder: fp8(llama, folder, (16, 16)),
    "mxfp4": mxfp4,
    "mistral3": lambda llama, folder: make_multimodal("mistral3", llama, folder),
}


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_exports_an_ordinary_llm(
    tiny_corpus: Path, tmp_path: Path, kind: str, trim: bool
) -> None:
    texts = (tiny_corpus / "text.txt").read_text(encoding="utf-8").splitlines()
    KINDS[kind](make_tiny_llm("llama3", tmp_path / "llama", texts), tmp_path / "llm")
    more = {
        "llm.name": tmp_path / "llm", "llm.trim_vocabulary": trim, "visual_run": "none", "train.epochs": 1,
        "eval.every_epochs": 1, "llm.dropout": 0.0,
    }  # fmt: skip
    options = tiny_options(tiny_corpus, "llm", tmp_path / "run", **more)
    with dist.session() as world:
        assert run_stage(resolve("llm", None, options), world, StopRequest())
    assert all(0 < loss < 20 for loss in losses(tmp_path / "run"))
    exported = tmp_path / "run" / "best" / "language_model"
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and "vision_config" not in config
    rows = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))[
        "vocab_size"
    ]
    assert (
        load_llm(str(exported)).get_input_embeddings().num_embeddings == rows
    ) is not trim
