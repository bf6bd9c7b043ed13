"""Measure the loss over a large vocabulary: all logits, chunks, chunks with checkpointing.

python -m benchmarks.llm_loss --out=benchmarks/results
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Report, Target, cpu_seconds, ratios, spread
from benchmarks.plan import memory_kb
from flallm_ds import command
from flallm_ds.models import loss
from flallm_ds.models.loss import Head, token_loss

SMOOTHING = 0.2
COLUMNS = (
    "E",
    "way",
    "peak memory, MB",
    "CPU seconds",
    "loss differs by",
    "gradients differ by",
)


@dataclass(frozen=True)
class Job:
    """Loss of N tokens of width E over V vocabulary entries, with gradients."""

    tokens: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class Cost:
    """Costs of one pass. peak_mb: increase of memory, including gradients."""

    peak_mb: float
    cpu_s: float
    loss: float
    # Norms of the gradients of the output embedding and the hidden states.
    gradients: tuple[float, float]


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    tokens: int = 2_000,
    vocabulary: int = 250_000,
    widths: tuple[int, ...] = (256, 512, 1024),
    rounds: int = 3,
) -> str:
    """Run forward and backward passes of the loss, each in a process with one thread.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --tokens: tokens of the batch. --vocabulary, --widths: vocabulary size and hidden sizes.
    """
    rows, memory, time = [], [], []
    for width in widths:
        job = Job(tokens, width, vocabulary)
        costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
        for number in range(rounds):
            print(f"E={width}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for way in WAYS:
                costs[way].append(in_a_process(way, job))
        rows += [row(width, way, costs[way], costs["logits"]) for way in WAYS]
        megabytes = {way: [c.peak_mb for c in costs[way]] for way in WAYS}
        seconds = {way: [c.cpu_s for c in costs[way]] for way in WAYS}
        memory.append((width, ratios(megabytes["logits"], megabytes["chunks"])))
        time.append((width, ratios(seconds["chunks"], seconds["logits"])))
    report = Report(__file__, f"The loss over {vocabulary:,} vocabulary entries")
    weights = ", ".join(f"{w * vocabulary * 4 / 1e6:,.0f} MB at E = {w}" for w in widths)
    report.text(
        f"{tokens:,} tokens, label smoothing {SMOOTHING}, forward and backward pass of "
        f"the loss alone in fp32; all logits take {tokens * vocabulary * 4 / 1e6:,.0f} "
        "MB. Peak memory is the increase of resident memory over weight and hidden states. It "
        f"includes the gradient of the weight: {weights}. CPU time is of one thread. The "
        f"median of {rounds} rounds, each in a separate process, with the lowest and the "
        "highest.",
        "`logits` and `chunks` are values of `--llm.loss`. `checkpoint` uses the same chunks, "
        "but torch.utils.checkpoint recomputes each in the backward pass.",
    )
    report.table(COLUMNS, rows)
    report.text("## Targets")
    report.targets(
        [
            *(
                Target(f"memory, logits / chunks, E = {w}", 2.0, values)
                for w, values in memory
            ),
            *(
                Target(f"CPU time, chunks / logits, E = {w}", 1.1, values, at_least=False)
                for w, values in time
            ),
        ]
    )
    return report.finish(out, hardware)


def row(width: int, way: str, costs: list[Cost], plain: list[Cost]) -> tuple[str, ...]:
    differences = [abs(c.loss / p.loss - 1) for c, p in zip(costs, plain, strict=True)]
    gradients = [
        abs(a / b - 1)
        for c, p in zip(costs, plain, strict=True)
        for a, b in zip(c.gradients, p.gradients, strict=True)
    ]
    return (
        str(width),
        way,
        spread([c.peak_mb for c in costs]),
        spread([c.cpu_s for c in costs], 2),
        f"{max(differences):.1e}",
        f"{max(gradients):.1e}",
    )


def in_a_process(way: str, job: Job) -> Cost:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cost, way, job).result()


def cost(way: str, job: Job) -> Cost:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embedding = nn.Linear(job.width, job.vocabulary, bias=False)
    config = SimpleNamespace(model_type="qwen3")
    head = Head(SimpleNamespace(config=config, get_output_embeddings=lambda: embedding))
    hidden_NE = torch.randn(job.tokens, job.width, requires_grad=True)
    targets_N = torch.randint(job.vocabulary, (job.tokens,))
    # Warm-up: libraries are loaded and kernels selected.
    F.cross_entropy(embedding(hidden_NE[:2]), targets_N[:2]).backward()
    embedding.weight.grad = hidden_NE.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # reset the maximum of the kernel
    before_kb, before_s = memory_kb("VmRSS"), cpu_seconds()
    summed = WAYS[way](head, hidden_NE, targets_N)
    (summed / job.tokens).backward()
    spent_s, peak_kb = cpu_seconds() - before_s, memory_kb("VmHWM") - before_kb
    assert embedding.weight.grad is not None and hidden_NE.grad is not None
    norms = embedding.weight.grad.norm().item(), hidden_NE.grad.norm().item()
    return Cost(peak_kb * 1024 / 1e6, spent_s, summed.item(), norms)


Way = Callable[[Head, torch.Tensor, torch.Tensor], torch.Tensor]


def _checkpointed(
    head: Head, hidden_NE: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    def part_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_loss(head, hidden, targets, SMOOTHING, "logits")

    length = max(1, loss.CHUNK_BYTES // (4 * head.vocab_size))
    parts = zip(hidden_NE.split(length), targets_N.split(length), strict=True)
    return torch.stack(
        [checkpoint(part_loss, h, t, use_reentrant=False) for h, t in parts]
    ).sum()


WAYS: dict[str, Way] = {
    "logits": lambda head, hidden, targets: token_loss(
        head, hidden, targets, SMOOTHING, "logits"
    ),
    "chunks": lambda head, hidden, targets: token_loss(
        head, hidden, targets, SMOOTHING, "chunks"
    ),
    "checkpoint": _checkpointed,
}


if __name__ == "__main__":
    command.main(run)
