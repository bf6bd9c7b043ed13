"""A run prints five lines before its first step, and nothing else."""

from pathlib import Path

import pytest

from flallm_ds.dist import World
from flallm_ds.training.deepspeed_json import precision
from flallm_ds.training.opening import _devices, idle_share
from tests.helpers.launching import flags, launch, tiny_options
from tests.helpers.paths import ROOT


def test_a_run_opens_with_five_lines(tiny_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "visual"
    options = tiny_options(tiny_corpus, "visual", run, **{"train.max_steps": 1})
    done = launch(ROOT / "launch" / "train.py", *flags("visual", options), ranks=1)
    assert done.returncode == 0, done.stdout
    opening = [
        "train   stage visual of recipe quickstart: backbone none, Light-T tiny",
        "on      1 rank on CPU, fp32, ZeRO stage 2",
        "amount  40 clips, 2 epochs of 5 steps, at most 1 steps in all, 2.7 M of 2.7 M "
        "parameters trained",
        f"run     {run}",
        f"follow  {run}/metrics.jsonl, or tensorboard --logdir={run}/tensorboard",
    ]
    *lines, last = done.stdout.splitlines()
    assert lines == opening and last.startswith("stopped after step 1")
    logged = (run / "log.txt").read_text(encoding="utf-8")
    assert all(line in logged for line in opening)


def test_ranks_of_several_machines_are_counted_on_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _devices(World(0, 8, 0, 4)) == "8 ranks (4 on this machine) on CPU"


def test_idle_ranks_are_reported_with_the_numbers_that_waste_nothing() -> None:
    assert idle_share(4, 2) == ""
    assert idle_share(4, 3) == ", 33 % of the work is idle (none with 1, 2, 4 ranks)"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}},
            "autocast float16",
        ),
    ],
)
def test_the_precision_is_that_of_the_json(config: dict[str, object], name: str) -> None:
    assert precision(config) == name
