"""Tests that the benchmarks of LLMs run at a tiny size; no speed is tested."""

from datetime import date

import pytest

from benchmarks import llm_gpu, llm_loss
from benchmarks.llm_gpu import Job, Measured
from benchmarks.measure import Target
from flallm_ds.errors import UserError
from tests.test_benchmarks import tables


def test_llm_loss_reports_each_way_at_each_width(tmp_path):
    page = llm_loss.run(
        tokens=40, vocabulary=1_000, widths=(8,), rounds=1, out=tmp_path, hardware="here"
    )
    assert (tmp_path / f"llm_loss_here_{date.today():%Y%m}.md").read_text(
        encoding="utf-8"
    ) == page
    costs, targets = tables(page)
    assert tuple(costs[0]) == llm_loss.COLUMNS and tuple(targets[0]) == Target.HEADER
    assert [row[:2] for row in costs[1:]] == [["8", way] for way in llm_loss.WAYS]
    assert all(float(cell) < 1e-5 for row in costs[1:] for cell in row[-2:])
    assert len(targets) == 3


def test_llm_gpu_reports_failed_and_successful_rows(tmp_path, monkeypatch):
    """At toy size, on a CPU where there is no GPU: LoRA with offload and checkpointing,
    as of the ladder."""
    works = Job(
        "toy Qwen3",
        "zero3_offload",
        "lora",
        loss="chunks",
        checkpointing=True,
        clips=2,
        steps=1,
        warm_up=1,
    )
    fails = Job("toy mBART", "no_such_json")
    monkeypatch.setattr(llm_gpu, "jobs_of_parts", lambda *_: {"step": [fails, works]})
    page = llm_gpu.run(small=True, parts=("step",), out=tmp_path, hardware="here")
    ((header, failed, worked),) = tables(page)
    assert tuple(header) == llm_gpu.COLUMNS
    assert failed[0] == "toy mBART" and failed[8] == (
        "UserError: train.deepspeed must be an existing JSON file, got "
        "ds_configs/no_such_json.json. Check the path."
    )
    assert worked[0] == "toy Qwen3" and all(
        float(worked[i].replace(",", "")) > 0 for i in (1, 2, 8, 9, 11)
    )
    assert float(worked[2]) < float(worked[1])


@pytest.mark.gpu
def test_llm_gpu_trains_an_mbart_at_toy_size_on_the_gpu():
    for job in (
        Job("toy mBART", loss="liger", clips=2, steps=2),
        Job("toy mBART", "zero3_offload", clips=2, steps=2),
    ):
        measured = llm_gpu.in_a_process(job, 600)
        assert isinstance(measured, Measured), measured
        assert measured.device_gb > 0


def test_llm_gpu_tries_every_size_of_the_ladder_in_both_tunings():
    whole = llm_gpu.jobs_of_parts(llm_gpu.LADDER, {"clips": 3, "steps": 4}, small=False)
    ladder = whole["largest"]
    assert [(job.tuning, job.model) for job in ladder] == [
        (tuning, name) for tuning in ("full", "lora") for name in llm_gpu.LADDER
    ]
    assert all(job.deepspeed == "zero3_offload" and job.clips == 3 for job in ladder)
    toys = llm_gpu.jobs_of_parts(llm_gpu.LADDER, {"clips": 3, "steps": 4}, small=True)
    assert {job.model for jobs in toys.values() for job in jobs} == {
        "toy mBART",
        "toy Qwen3",
    }
    with pytest.raises(UserError, match=r"--ladder must be names of .*, got 'Qwen9'"):
        llm_gpu.run(small=True, ladder=("Qwen9",))
    with pytest.raises(UserError, match=r"--parts must be names of step, .*, got 'steps'"):
        llm_gpu.run(small=True, parts=("steps",))
