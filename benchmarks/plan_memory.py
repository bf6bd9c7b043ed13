"""Compare the host memory that `flallm plan` computes with that of real LLM trainings.

python -m benchmarks.plan_memory --out=benchmarks/results

Two gloo ranks on a CPU train three steps of each LLM through the engine of a run, under
ZeRO-3 with offload. The LLMs are made from configs, with random weights.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.measure import Report
from benchmarks.scale import rates_of
from flallm_ds import command
from flallm_ds.planning.compare import Comparison, plan_here
from flallm_ds.planning.measure import Measured
from flallm_ds.planning.memory import Place
from flallm_ds.planning.plan import Cluster, Corpus, Llm, Planner, shipped_files
from flallm_ds.recipes import resolve

# {label: (model type, settings, llm.tune)}
SHAPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mBART": (
        "mbart",
        {
            "vocab_size": 30_000,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
        },
        "full",
    ),
    "Qwen2": (
        "qwen2",
        {
            "vocab_size": 32_000,
            "hidden_size": 640,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        "lora",
    ),
    "mT5": (
        "mt5",
        {
            "vocab_size": 40_000,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 1024,
            "num_layers": 8,
            "num_heads": 6,
            "tie_word_embeddings": False,
        },
        "full",
    ),
    # Not one of the LLMs that the formula of the gathered weights was fitted to.
    "M2M-100": (
        "m2m_100",
        {
            "vocab_size": 64_000,
            "d_model": 640,
            "encoder_layers": 8,
            "decoder_layers": 8,
            "encoder_ffn_dim": 2560,
            "decoder_ffn_dim": 2560,
            "encoder_attention_heads": 10,
            "decoder_attention_heads": 10,
        },
        "full",
    ),
}
TARGET = 15.0  # percent
COLUMNS = (
    "LLM",
    "parameters, M",
    "trained, M",
    "plan, GB",
    "measured, GB",
    "deviation",
    "plan without processes, GB",
    "measured, GB",
    "deviation",
    "last step, s",
)


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    clips: int = 2,
    frames: int = 32,
    tokens: int = 16,
    keep: Path | None = None,
) -> str:
    """Run `flallm plan --measure` for each LLM and write a page.

    --out: folder for the page. --hardware: name of the machine in the file name. --clips: of
    a micro-batch. --frames, --tokens: of a clip. --keep: folder for the measurements; those
    that it has are not measured again, so that a changed formula needs no new ones.
    """
    report = Report(
        __file__, "Host memory of ZeRO-3 with offload on a CPU: plan and measurement"
    )
    report.text(_explanation(clips, frames, tokens))
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        for label, found in _comparisons(clips, frames, tokens, folder):
            rows.append(_row(label, found))
            named = found.need.named(Place.HOST)
            parts.append((label, *(f"{named.get(name, 0.0) / 1e9:.2f}" for name in PARTS)))
    report.table(COLUMNS, rows)
    report.text("## The plan of a rank, in GB")
    report.table(("LLM", *PARTS), parts)
    return report.finish(out, hardware)


PARTS = (
    "weights",
    "gradients",
    "gradients of the step",
    "master weights",
    "optimizer states",
    "gradient bucket",
    "new gradients",
    "gathered weights",
    "flat tensors of collectives",
    "activations",
    "loss",
    "process",
)


def _explanation(clips: int, frames: int, tokens: int) -> str:
    return (
        "Two ranks of `zero3_offload.json` in fp32, three steps of one micro-batch of "
        f"{clips} clips a rank with {frames} visual and {tokens} target tokens.\n\n"
        "Measured: the sum over the ranks of the highest resident memory (VmHWM), so that "
        "peaks of two ranks at different times add up. Pages of shared libraries count in "
        "each rank, in the plan as well. Plan: the formulas of "
        "`flallm_ds/planning/memory.py`. `without processes`: the resident memory of each "
        "rank after its imports is subtracted from the measurement, and the constant "
        f"`process` from the plan. The target is a deviation of at most {TARGET:g} %.\n\n"
        "The formula of the gathered weights on a CPU, three times their size, was fitted to "
        "the first three LLMs and to a Llama with 101 M parameters. The fourth LLM was not "
        "used for it."
    )


def _comparisons(
    clips: int, frames: int, tokens: int, keep: Path
) -> Iterator[tuple[str, Comparison]]:
    """Yield (label, comparison) of each LLM, measured in processes of its own."""
    for label, (kind, settings, tune) in SHAPES.items():
        folder, measured = keep / label, keep / f"{label}.json"
        AutoConfig.for_model(kind, **settings).save_pretrained(folder)
        options = {"data.batch_clips": f"{2 * clips}", "data.micro_batches": "2"}
        if not measured.exists():
            words = [f"--{name}={value}" for name, value in options.items()]
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "flallm_ds", "plan", "--measure", "--json"),
                    *(f"--llm={folder}", f"--tune={tune}", "--ranks=2"),
                    *(f"--longest={frames}", f"--tokens={tokens}", *words),
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            measured.write_text(done.stdout, encoding="utf-8")
        ranks = json.loads(measured.read_text(encoding="utf-8"))["ranks"]
        config = resolve("llm", "phoenix14t", {"llm.tune": tune, **options})
        planner = Planner(
            Llm(str(folder), config),
            Cluster(1, 2, 0.0, 0.0),
            Corpus(frames, frames, tokens, 1),
            rates_of(25.0),
            shipped_files(),
        )
        found = plan_here(planner, 2)
        yield label, replace(found, ranks=tuple(Measured(**rank) for rank in ranks))


def _row(label: str, found: Comparison) -> tuple[str, ...]:
    size = found.planner.llm.size
    row = [label, f"{size.total / 1e6:.1f}", f"{size.trained / 1e6:.1f}"]
    pairs = (
        (found.predicted, found.measured),
        (found.predicted_model, found.measured_model),
    )
    for plan, measured in pairs:
        deviation = 100 * (plan / measured - 1)
        row += [f"{plan / 1e9:.2f}", f"{measured / 1e9:.2f}", f"{deviation:+.1f} %"]
    return (*row, f"{found.step_s:.1f}")


if __name__ == "__main__":
    command.main(run)
