"""Measure stage 2 on one GPU: mBART-large, attention, loss, and the largest LLM that fits.

python -m benchmarks.llm_gpu --out=benchmarks/results
python -m benchmarks.llm_gpu --small=true      (toy sizes, also on a CPU)
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# For the optimizer with offload.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.initialization import no_init_weights
from transformers.utils import is_flash_attn_2_available

from benchmarks.measure import ROOT, Report
from benchmarks.plan import memory_kb
from flallm_ds import command, process
from flallm_ds.errors import UserError
from flallm_ds.training.deepspeed_json import complete

MBART = {
    "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 16,
    "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "scale_embedding": True,
    "dropout": 0.3, "attention_dropout": 0.1,
}  # fmt: skip


def _qwen3(
    width: int,
    ffn: int,
    layers: int,
    heads: int,
    tied: bool,
    kv_heads: int = 8,
    head: int = 128,
) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "tie_word_embeddings": tied,
    }  # fmt: skip


# Sizes from the config.json files on the hub. The toy models are for tests of this script.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mBART-large, trimmed": ("mbart", 2_454, MBART),
    "mBART-large": ("mbart", 250_027, MBART),
    "Qwen3-0.6B": ("qwen3", 151_936, _qwen3(1024, 3072, 28, 16, True)),
    "Qwen3-1.7B": ("qwen3", 151_936, _qwen3(2048, 6144, 28, 16, True)),
    "Qwen3-4B": ("qwen3", 151_936, _qwen3(2560, 9728, 36, 32, True)),
    "Qwen3-8B": ("qwen3", 151_936, _qwen3(4096, 12288, 36, 32, False)),
    "Qwen3-14B": ("qwen3", 151_936, _qwen3(5120, 17408, 40, 40, False)),
    "Qwen3-32B": ("qwen3", 151_936, _qwen3(5120, 25600, 64, 64, False)),
    "toy mBART": (
        "mbart",
        300,
        MBART | {n: 2 for n in MBART if n.endswith(("layers", "heads"))}
        | {n: 32 for n in MBART if n.endswith(("d_model", "ffn_dim"))},
    ),
    "toy Qwen3": ("qwen3", 300, _qwen3(32, 48, 2, 4, False, kv_heads=2, head=8)),
}  # fmt: skip
LADDER = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
PARTS = {
    "step": "A step of mBART-large",
    "loss": "Attention and loss",
    "largest": "The largest LLM that trains",
}
ZEROS = ("zero3", "zero3_offload")
COLUMNS = (
    "LLM", "parameters, M", "trained, M", "DeepSpeed", "tuning", "attention", "loss", "checkpointing",
    "ms a step", "tokens/s", "device, GB", "host, GB",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Steps of stage 2 with random weights and random features, in a separate process."""

    model: str
    deepspeed: str = "zero3"
    tuning: str = "full"
    attention: str = "sdpa"
    loss: str = "auto"
    checkpointing: bool = False
    clips: int = 16
    frames: int = 29  # kept of a clip: visual tokens
    words: int = 30  # target tokens of a clip
    steps: int = 10
    warm_up: int = 3


@dataclass(frozen=True)
class Measured:
    """Results of a job. host_gb: maximum memory of the process, with pinned memory."""

    parameters: int
    trained: int
    step_s: float
    tokens_per_s: float
    device_gb: float
    host_gb: float


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    parts: tuple[str, ...] = tuple(PARTS),
    ladder: tuple[str, ...] = LADDER,
    clips: int = 16,
    steps: int = 10,
    limit_s: float = 1800.0,
    small: bool = False,
) -> str:
    """Run each row in a separate process, which may run out of memory or time.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --parts: step, loss, largest; separated by commas. --ladder: names of LLM sizes, separated by
    commas. --clips: clips of a step. --steps: measured steps. --limit_s: maximum seconds of a row.
    --small: toy sizes.
    """
    if not (small or torch.cuda.is_available()):
        raise UserError(
            "Cannot run benchmarks.llm_gpu: PyTorch finds no CUDA device. Run it on a machine "
            "with a GPU, or with --small=true."
        )
    for name in parts:
        if name not in PARTS:
            raise UserError(f"--parts must be names of {', '.join(PARTS)}, got {name!r}.")
    for name in ladder:
        if name not in MODELS:
            raise UserError(f"--ladder must be names of {', '.join(MODELS)}, got {name!r}.")
    shape = {"clips": clips, "steps": steps}
    versions = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    report = Report(
        __file__, "Stage 2 on one GPU" if versions else "Stage 2 at toy size", versions
    )
    example = Job("")
    report.text(
        f"Random weights, synthetic features of a frozen encoder: {clips} clips a step in "
        f"one micro-batch, {example.frames} visual and {example.words} target tokens each; "
        f"tokens/s counts both. Wall-clock time of {steps} steps after {example.warm_up} "
        "warm-up steps. Device memory is the maximum that PyTorch allocated in these steps; "
        "host memory is the maximum of the process."
    )
    jobs = jobs_of_parts(tuple(ladder), shape, small)
    for part in parts:
        report.text(f"## {PARTS[part]}")
        report.table(COLUMNS, [row(job, in_a_process(job, limit_s)) for job in jobs[part]])
    return report.finish(out, hardware)


def jobs_of_parts(
    ladder: tuple[str, ...], shape: dict[str, int], small: bool
) -> dict[str, list[Job]]:
    """Return {part: jobs}."""
    mbart, trimmed, qwen = "mBART-large", "mBART-large, trimmed", "Qwen3-0.6B"
    if small:
        mbart, trimmed, qwen, ladder = "toy mBART", "toy mBART", "toy Qwen3", ("toy Qwen3",)
    flash = ["flash_attention_2"] if is_flash_attn_2_available() else []
    liger = ["liger"] if torch.cuda.is_available() else []
    plain = [Job(name, loss="logits", **shape) for name in (mbart, qwen)]
    large = Job("", "zero3_offload", checkpointing=True, **shape)
    return {
        "step": [Job(n, z, **shape) for n in (trimmed, mbart) for z in ZEROS],
        "loss": [
            *plain,
            *(replace(job, loss=loss) for job in plain for loss in ("chunks", *liger)),
            *(replace(job, attention=attention) for job in plain for attention in ("eager", *flash)),
            *(replace(job, checkpointing=True) for job in plain),
        ],
        "largest": [
            replace(large, model=name, tuning=tuning) for tuning in ("full", "lora") for name in ladder
        ],
    }  # fmt: skip


def row(job: Job, found: Measured | str) -> tuple[str, ...]:
    how = (
        job.deepspeed,
        job.tuning,
        job.attention,
        job.loss,
        "yes" if job.checkpointing else "no",
    )
    if isinstance(found, str):
        return (job.model, "", "", *how, found, "", "", "")
    return (
        job.model,
        f"{found.parameters / 1e6:,.2f}",
        f"{found.trained / 1e6:,.2f}",
        *how,
        f"{1000 * found.step_s:,.1f}",
        f"{found.tokens_per_s:,.0f}",
        f"{found.device_gb:.2f}",
        f"{found.host_gb:.2f}",
    )


def in_a_process(job: Job, limit_s: float) -> Measured | str:
    """Run a job in a process. Return its results, or the reason of its failure."""
    print(job, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.llm_gpu", "child", json.dumps(asdict(job))]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    if ended.returncode == 0:
        return Measured(**json.loads(ended.stdout.splitlines()[-1]))
    print(ended.stderr[-3000:], file=sys.stderr, flush=True)
    # The kernel sends signal 9 if the memory of the host is full.
    if ended.returncode < 0:
        return f"ended by signal {-ended.returncode}"
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    if any("OutOfMemoryError" in line for line in lines):
        return "out of device memory"
    last = re.sub(r"^\[rank\d+\]: ([\w.]+\.)?", "", lines[-1]).replace(f"{ROOT}/", "")
    return last[:120].replace("|", "/")


# --- the process of one row


def child(job: Job) -> Measured:
    from flallm_ds import dist
    from flallm_ds.config import OptimConfig
    from flallm_ds.training import engine as ds

    world = dist.start()
    ds.prepare()
    path = ROOT / "ds_configs" / f"{job.deepspeed}.json"
    config = complete(ds.read_deepspeed_config(path), world.device, 1, 1.0)
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    model = translator(job, dtype)
    parameters = list(model.parameters())
    counts = (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
    # This shards one parameter after the other.
    ds.deepspeed.zero.Init(module=model, config_dict_or_path=config)
    new = {id(p) for p in model.adapter.parameters()}
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"name": "adapter", "lr": 1e-3, "params": [p for p in trained if id(p) in new]},
        {"name": "llm", "lr": 1e-5, "params": [p for p in trained if id(p) not in new]},
    ]
    engine = ds.Engine(model, groups, OptimConfig(), config, world)
    step_s, device_gb = steps_of(job, engine, world.device)
    dist.stop()
    tokens = job.clips * (job.frames + job.words)
    return Measured(
        *counts, step_s, tokens / step_s, device_gb, memory_kb("VmHWM") * 1024 / 1e9
    )


def translator(job: Job, dtype: torch.dtype) -> Any:
    """Return a SignTranslator with random weights for the engine."""
    from flallm_ds.models.adapters import Adapter
    from flallm_ds.models.checkpointing import checkpoint_llm
    from flallm_ds.models.llm.load import embedding_scale, llm_width
    from flallm_ds.models.llm.tuning import Tuning, tune
    from flallm_ds.models.sign_translator import SignTranslator

    family, vocabulary, sizes = MODELS[job.model]
    config = AutoConfig.for_model(family, vocab_size=vocabulary, pad_token_id=1, **sizes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with no_init_weights():  # drawing billions of numbers takes longer than the steps
        llm = auto.from_config(config, dtype=dtype, attn_implementation=job.attention)
    fill(llm)
    tune(llm, Tuning(job.tuning))  # type: ignore[arg-type]
    if job.checkpointing:
        checkpoint_llm(llm)
    codec: Any = SimpleNamespace(pad_id=1, eos_id=2)
    adapter = Adapter(512, llm_width(llm), embedding_scale(llm))
    return SignTranslator(None, adapter, llm, codec, job.loss).to(dtype)  # type: ignore[arg-type]


def fill(llm: Any) -> None:
    """Fill weights with repetitions of a million random numbers, and norms with ones."""
    torch.manual_seed(0)
    numbers = 0.02 * torch.randn(2**20)
    for parameter in llm.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1)
            continue
        for part in flat.split(len(numbers)):
            part.copy_(numbers[: len(part)])


def steps_of(job: Job, engine: Any, device: torch.device) -> tuple[float, float]:
    """Train and return (seconds per step, maximum GB of device memory)."""
    from flallm_ds.data.text.prompt import Wording

    family, vocabulary, _ = MODELS[job.model]
    # As many tokens as "Translate this German Sign Language video into German:" for Qwen3.
    wording = (
        Wording(start=(5,))
        if family == "mbart"
        else Wording(before=(3,) * 12, after=(4,) * 6)
    )
    features_ND = torch.randn(job.clips * job.frames, 512, device=device)
    num_frames_B = torch.full((job.clips,), job.frames)
    targets_BL = torch.randint(3, vocabulary, (job.clips, job.words), device=device)
    engine.module.train()
    for step in range(job.warm_up + job.steps):
        if step == job.warm_up:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
        loss = engine(features_ND, num_frames_B, [wording] * job.clips, targets_BL, 0.2)
        engine.backward(loss / targets_BL.numel())
        engine.micro_step_done([1e-3, 1e-5])
    synchronize(device)
    step_s = (time.perf_counter() - begin) / job.steps
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {loss.item()}")
    return step_s, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(asdict(child(Job(**json.loads(sys.argv[2]))))), flush=True)
        process.end_process(0)
    else:
        command.main(run)
