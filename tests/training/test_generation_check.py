"""Before the first step every LLM generates once, so that none fails at the first
scoring, after hours."""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flallm_ds import command, dist
from flallm_ds.cli.train import train
from flallm_ds.recipes import resolve
from flallm_ds.training.build import build_task
from flallm_ds.training.run_folder import run_folder
from flallm_ds.training.stages import run_stage
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.task import Task
from tests.helpers.launching import flags, tiny_options
from tests.helpers.llms import make_llm_with_own_code

METHODS = {
    "ValueError: only token ids": """
    def prepare_inputs_for_generation(self, ids, inputs_embeds=None, attention_mask=None, **more):
        if inputs_embeds is not None:
            raise ValueError("only token ids")
        return super().prepare_inputs_for_generation(ids, attention_mask=attention_mask, **more)
""",
    "AttributeError: 'OwnForCausalLM' object has no attribute 'missing'": """
    def generate(self, *arguments, **more):
        return self.missing
""",
    "KeyError: 'cache'": """
    def forward(self, *arguments, past_key_values=None, **more):
        if past_key_values is not None and past_key_values.get_seq_length():
            raise KeyError("cache")
        return super().forward(*arguments, past_key_values=past_key_values, **more)
""",
}
DRAWS = """
    def forward(self, *arguments, **more):
        torch.rand(1)
        return super().forward(*arguments, **more)
"""


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies an LLM's code before it runs it; Python remembers the copy."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


@pytest.fixture
def make_llm(tiny_corpus: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Write an LLM with its own methods."""
    texts = (tiny_corpus / "text.txt").read_text(encoding="utf-8").splitlines()
    return lambda methods: make_llm_with_own_code(tmp_path / "llm", texts, methods)


def options_of(corpus: Path, stage: str, run: Path, llm: Path) -> dict[str, str]:
    more = {"llm.name": llm, "llm.hub_code": True, "train.epochs": 1, "train.max_steps": 1}
    return tiny_options(corpus, stage, run, **more) | (
        {} if stage == "joint" else {"visual_run": "none"}
    )


@pytest.mark.parametrize("stage", ["llm", "joint"])
@pytest.mark.parametrize("reason", METHODS)
def test_an_llm_that_cannot_generate_is_refused_before_the_first_step(
    tiny_corpus: Path,
    tmp_path: Path,
    make_llm: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: str,
    stage: str,
) -> None:
    options = options_of(tiny_corpus, stage, tmp_path / "run", make_llm(METHODS[reason]))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(stage, options)])
    monkeypatch.setattr("flallm_ds.command.end_process", sys.exit)
    with pytest.raises(SystemExit) as ended:
        command.main(train)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        "error: Cannot generate from embeddings with the LLM "
        f"{tmp_path / 'llm'} (a OwnForCausalLM): {reason} Use another --llm.name."
    ]
    assert not (tmp_path / "run").exists()


def state_of(task: Task) -> dict[str, object]:
    modules = {"engine": task.engine.module, "frozen": task.extractor}
    named = {
        f"{part}.{n}": m
        for part, module in modules.items()
        for n, m in module.named_modules()
    }
    return {
        "modes": {name: module.training for name, module in named.items()},
        "buffers": {
            f"{name}.{n}": buffer.clone()
            for name, m in named.items()
            for n, buffer in m.named_buffers()
        },
        "random": torch.get_rng_state(),
        "config": copy.deepcopy(
            task.engine.module.language_model.generation_config.to_dict()
        ),
    }


@pytest.mark.parametrize("stage", ["llm", "joint"])
def test_trying_it_changes_nothing(
    tiny_corpus: Path, tmp_path: Path, make_llm: Callable[[str], Path], stage: str
) -> None:
    """Neither random numbers (this LLM draws one a token), nor BatchNorm's statistics,
    nor modes."""
    config = resolve(
        stage, None, options_of(tiny_corpus, stage, tmp_path / "run", make_llm(DRAWS))
    )
    with dist.session() as world, run_folder(config, world) as folder:
        task = build_task(config, folder, world)
        before = state_of(task)
        task.check_generation()
        after = state_of(task)
        task.engine.close()
    assert any(name.endswith("running_mean") for name in before["buffers"])
    assert any(before["modes"].values())
    for name in ("modes", "config"):
        assert before[name] == after[name]
    assert torch.equal(before["random"], after["random"])
    for name, buffer in before["buffers"].items():
        assert torch.equal(buffer, after["buffers"][name]), name


@pytest.mark.parametrize("stage", ["llm", "joint"])
def test_a_resumed_run_tries_it_as_well(
    tiny_corpus: Path, tmp_path: Path, make_llm: Callable[[str], Path], stage: str
) -> None:
    """And its losses are those of a run without a break."""
    options = options_of(tiny_corpus, stage, tmp_path / "run", make_llm(DRAWS))
    whole = options | {"run": str(tmp_path / "whole"), "train.max_steps": "2"}
    steps = [options, options | {"train.max_steps": "2"}, whole]
    with dist.session() as world:
        for given in steps:
            run_stage(resolve(stage, None, given), world, StopRequest())
    found = [
        [json.loads(line)["loss"] for line in lines if '"kind": "train"' in line]
        for lines in (
            (tmp_path / run / "metrics.jsonl").read_text().splitlines()
            for run in ("run", "whole")
        )
    ]
    assert found[0] == found[1] and len(found[0]) == 2
