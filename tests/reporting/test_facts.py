"""Test the tables of a report that say what was run, on what, and with which options."""

from pathlib import Path

import pytest

from flallm_ds.config import RunConfig
from flallm_ds.recipes import config_of
from flallm_ds.reporting.facts import Row, fact_rows, option_rows, shards_of
from flallm_ds.reporting.runs import Run, recipe_of


def run_of(
    config: RunConfig,
    *command: str,
    records: list[dict[str, object]] | None = None,
    more: dict[str, object] | None = None,
) -> Run:
    starts = [{"command": list(command), **(more or {})}] if command else []
    return Run(
        Path(config.run), Path(config.run).name, config, records or [], [], starts, {}
    )


def cells(rows: list[Row]) -> dict[str, list[str]]:
    return {row.title: list(row.cells) for row in rows}


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("launch/train.py --recipe phoenix14t_llm --optim.lr=1", "phoenix14t_llm"),
        (
            "launch/train.py --local_rank=1 --stage=both --recipe=phoenix14t",
            "phoenix14t_llm",
        ),
        ("/venv/bin/flallm train --stage=llm", "quickstart_llm"),
        ("/site-packages/flallm_ds/cli/train.py --stage=llm", "quickstart_llm"),
        ("launch/train.py --recipe=gone --stage=llm", None),
        ("scenarios.py --file=x", None),
        ("launch/train.py -x", None),
        ("", None),
    ],
)
def test_the_recipe_is_read_from_the_command(command: str, recipe: str | None) -> None:
    config = RunConfig("llm", run="runs/mine", visual_run="none")
    assert recipe_of(run_of(config, *command.split())) == recipe


def test_options_are_compared_with_the_recipe_and_between_runs() -> None:
    config = config_of("quickstart_llm").with_overrides({"optim.lr": "3e-3"})
    other = config.with_overrides({"run": "runs/other", "llm.tune": "lora"})
    command = ("launch/train.py", "--stage=llm")
    differing, rows = option_rows([run_of(config, *command), run_of(other, *command)])
    assert cells(differing) == {
        "optim.lr": ["0.003 (instead of 0.001)", "0.003 (instead of 0.001)"],
        "llm.tune": ["full", "lora (instead of full)"],
    } or list(cells(differing)) == ["llm.tune", "optim.lr"]
    assert len(rows) == len(config.options())
    assert all(row.note for row in rows if "." in row.title)


def test_without_a_recipe_options_are_compared_with_the_defaults() -> None:
    config = RunConfig("llm", run="runs/mine", visual_run="none")
    changed = config.with_overrides({"optim.lr": "0.5"})
    differing, _ = option_rows([run_of(changed)])
    assert cells(differing) == {"optim.lr": ["0.5 (instead of 0.001)"]}


def test_facts_say_what_was_run() -> None:
    config = RunConfig("visual", run="runs/mine").with_overrides({"train.epochs": "5"})
    records: list[dict[str, object]] = []
    for step in (1, 2):
        records.append({"kind": "train", "epoch": step, "loss": 1.0, "seconds": 45.0})
    for epoch, bleu4 in ((1, 3.5), (2, 3.0)):
        records.append({"kind": "dev", "epoch": epoch, "bleu4": bleu4, "chrf": 9.0})
    start = {"commit": "0123456789abcdef", "dirty": True, "devices": {"NVIDIA H100": 4},
             "torch": "2.11.0", "started": "2026-11-26"}  # fmt: skip
    run = run_of(config, "launch/train.py", "--stage=visual", records=records, more=start)
    found = cells(fact_rows([run, run_of(config)]))
    assert found["progress"] == ["2 steps in 1:30, epoch 3 of 5", "no step is finished"]
    assert found["best dev score"][0] == "BLEU-4 3.50 on dev after epoch 1"
    assert found["command"] == ["launch/train.py --stage=visual", "not recorded"]
    assert found["commit"] == ["0123456789ab with changes", "not recorded"]
    assert found["devices"] == ["4 x NVIDIA H100", "not recorded"]
    assert "torch 2.11.0" in found["versions"][0]


def test_shards_have_the_clips_of_each_split_or_a_problem(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    both = f"{tiny_corpus / 'shards'},{tmp_path / 'gone'}"
    config = RunConfig("visual", run="r").with_overrides({"data.shards": both})
    there, gone = shards_of(run_of(config))
    assert there.splits == {"train": 40, "dev": 9, "test": 9}
    assert there.corpus == "phoenix14t" and there.problem == ""
    assert "index.json" in gone.problem and gone.splits == {}
