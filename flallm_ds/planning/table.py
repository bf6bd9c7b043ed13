"""Show a plan as a table, with its assumptions and a recommendation, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flallm_ds.planning.memory import CONTEXT_BYTES, GB, PROCESS_BYTES, USABLE, Place
from flallm_ds.planning.plan import PROMPT_TOKENS, Planner, Row
from flallm_ds.planning.speed import checkpoint_bytes, write_s

_HEADER = (
    "file",
    "GPU",
    "host",
    "NVMe",
    "DeepSpeed",
    "clips",
    "accum",
    "s/step",
    "clips/s",
    "h",
    "",
)
NONE = "-"


def text_of(planner: Planner) -> str:
    """Return the plan for a terminal: at most 120 columns."""
    rows = list(planner.rows())
    best = planner.best()
    parts = [_title(planner), _table(planner, rows, best), _legend(planner)]
    parts.append(_recommendation(planner, best))
    return "\n\n".join(parts)


def _title(planner: Planner) -> str:
    size, cluster, config = planner.llm.size, planner.cluster, planner.config
    kind = "decoder-only" if size.decoder_only else "encoder-decoder"
    written = write_s(size, planner.rates)
    return (
        f"{planner.llm.name}\n"  # may be a long path
        f"{_count(size.total)} parameters, {_count(size.trained)} trained "
        f"(llm.tune={config.llm.tune}), {kind}, vocabulary {size.vocab_size:,}\n"
        f"{cluster}; {planner.batch_clips} clips a step, {config.train.epochs} epochs of "
        f"{planner.corpus.clips:,} clips\n"
        f"checkpoint: {checkpoint_bytes(size) / GB:.1f} GB, {written:.0f} s to write at "
        f"{planner.rates.disk / GB:g} GB/s"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _table(planner: Planner, rows: Sequence[Row], best: Row | None) -> str:
    cells: list[tuple[str, ...]] = [_HEADER]
    for row in rows:
        cells.append(_cells(planner, row, best))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first = f"{line[0]:{widths[0]}}"
        numbers = [f"{c:>{w}}" for c, w in zip(line[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([first, *numbers, line[-1]]).rstrip())
    return "\n".join(lines)


def _cells(planner: Planner, row: Row, best: Row | None) -> tuple[str, ...]:
    estimate = "/".join(f"{part / GB:.0f}" for part in row.deepspeed)
    gpu = _gb(row.gpu) if planner.cluster.device == "cuda" else NONE
    start = (row.file, gpu, _gb(row.host), _gb(row.nvme), estimate)
    if row.why:
        return (*start, NONE, NONE, NONE, NONE, NONE, row.why)
    mark = "<- recommended" if best is not None and row.file == best.file else ""
    return (
        *start,
        f"{row.clips}",
        f"{row.accumulation}",
        f"{row.step.total:.2f}",
        f"{row.clips_per_s:.1f}",
        f"{row.hours:.1f}",
        mark,
    )


def _gb(size: float) -> str:
    return f"{size / GB:.1f}" if size else NONE


def _legend(planner: Planner) -> str:
    corpus, rates, config = planner.corpus, planner.rates, planner.config
    prompt = f", {PROMPT_TOKENS} prompt tokens" if planner.llm.size.decoder_only else ""
    trimmed = ""
    if planner.llm.vocab_size is None and config.llm.trim_vocabulary:
        trimmed = " The vocabulary is counted before it is trimmed (--vocab_size=N)."
    return (
        "GPU: GB a GPU. host, NVMe: GB a node. DeepSpeed: its own estimate, GB a GPU / "
        "GB a host.\n"
        "clips: largest micro-batch that fits. accum: micro-batches a step. h: hours.\n"
        f"assumed: clips of {corpus.frames} kept frames on average and {corpus.longest} "
        f"for the memory, {corpus.tokens} target tokens{prompt};\n"
        f"  {rates.flops / 1e12:g} TFLOP/s a GPU at {rates.efficiency:.0%}, "
        f"{rates.link / GB:g} GB/s between GPUs, {rates.network / GB:g} GB/s between "
        f"nodes, {rates.pcie / GB:g} GB/s PCIe,\n"
        f"  {rates.dram / GB:g} GB/s host memory; {CONTEXT_BYTES / GB:g} GB of CUDA a GPU, "
        f"{PROCESS_BYTES / GB:g} GB a process, {1 - USABLE:.0%} of all memory left free.\n"
        f"Computed, not measured.{trimmed}"
    )


def _recommendation(planner: Planner, best: Row | None) -> str:
    if best is None:
        remedies = planner.remedies()
        if not remedies:
            return "Nothing fits, with none of LoRA, 4 bits, more nodes, more host memory."
        return "Nothing fits. What would fit:\n  " + "\n  ".join(remedies)
    # No micro-batch may be empty.
    micro_batches = min(planner.cluster.ranks * best.accumulation, planner.batch_clips)
    return (
        f"recommended: --train.deepspeed=ds_configs/{best.file}\n"
        f"  --data.batch_clips={planner.batch_clips} --data.micro_batches={micro_batches}"
    )


def json_of(planner: Planner) -> str:
    """Return the plan as JSON: bytes and seconds, with the parts of each sum."""
    best = planner.best()
    rows = []
    for row in planner.rows():
        rows.append(_row_json(row))
    found = {
        "llm": planner.llm.name,
        "size": asdict(planner.llm.size),
        "cluster": asdict(planner.cluster),
        "corpus": asdict(planner.corpus),
        "rates": asdict(planner.rates),
        "batch_clips": planner.batch_clips,
        "checkpoint_bytes": checkpoint_bytes(planner.llm.size),
        "checkpoint_s": write_s(planner.llm.size, planner.rates),
        "files": rows,
        "recommended": None if best is None else best.file,
        "remedies": planner.remedies() if best is None else [],
    }
    return json.dumps(found, indent=2)


def _row_json(row: Row) -> dict[str, Any]:
    places = {place.value: row.need.named(place) for place in Place}
    return {
        "file": row.file,
        "fits": not row.why,
        "why": row.why,
        "gpu_bytes": row.gpu,
        "host_bytes": row.host,
        "nvme_bytes": row.nvme,
        "parts_of_a_rank": places,
        "deepspeed_estimate": {
            "gpu_bytes": row.deepspeed[0],
            "host_bytes": row.deepspeed[1],
        },
        "largest_micro_batch": row.clips,
        "micro_batch": row.batch,
        "accumulation": row.accumulation,
        "step_s": asdict(row.step) | {"total": row.step.total},
        "clips_per_s": row.clips_per_s,
        "hours": row.hours,
    }
