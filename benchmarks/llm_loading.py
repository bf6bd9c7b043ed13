"""Measure memory per rank while an LLM is loaded: by us, by transformers, without ZeRO.

python -m benchmarks.llm_loading --out=benchmarks/results
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from benchmarks.measure import ROOT, Report, Target
from flallm_ds import command
from flallm_ds.dist import free_port
from flallm_ds.models.weights import write_weights
from flallm_ds.training.deepspeed_json import complete

WAYS = {
    "whole": "a full copy (no ZeRO)",
    "transformers": "ZeRO-3, `from_pretrained` alone",
    "ours": "ZeRO-3, `load_llm`",
}
COLUMNS = (
    "way",
    "rank",
    "after imports, MB",
    "highest, MB",
    "anonymous, MB",
    "files, MB",
    "left at the end, MB",
    "highest / highest of a full copy",
    "highest / what a full copy leaves, both without imports",
)
SAMPLE_S = 0.005
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


@dataclass(frozen=True)
class Memory:
    """Memory of one rank in MB. before: after imports. highest: maximum by the kernel."""

    before: float
    highest: float
    anonymous: float
    files: float
    after: float


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    width: int = 2048,
    layers: int = 16,
    vocabulary: int = 32_000,
    shard_mb: int = 500,
    ranks: int = 2,
    way: str = "",
    folder: Path | None = None,
) -> str:
    """Save an LLM with random bf16 weights, load it in fp32 each way, report peak memory.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --width, --layers, --vocabulary: of a Llama; the defaults give a billion parameters.
    --shard-mb: size of one file. --ranks: number of ranks on the CPU of this machine.
    --way, --folder: for one rank; this command sets them itself.
    """
    if way:
        return rank_of(way, folder or Path())
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary)
        num_parameters, num_files = write_llm(model, config, shard_mb)
        config.update(TINY)
        write_llm(model / "tiny", config, shard_mb)
        found = {way: measure(way, model, 1 if way == "whole" else ranks) for way in WAYS}
    whole = found["whole"][0]
    report = Report(
        __file__,
        f"Memory to load an LLM of {num_parameters / 1e9:.2f} billion parameters on "
        f"{ranks} CPU ranks",
        {
            name: metadata.version(name)
            for name in ("transformers", "deepspeed", "safetensors")
        },
    )
    report.text(
        f"A Llama of {layers} layers, {width} wide, {vocabulary:,} tokens, random weights; "
        f"in bf16 on disk in {num_files} safetensors files, in fp32 once loaded: "
        f"{4 * num_parameters / 1e6:,.0f} MB whole. ZeRO stage 3 with CPU offload "
        "(`ds_configs/zero3_offload.json`). Resident memory of each rank (VmHWM, RssAnon, "
        "RssFile), which counts pages of mapped files. What imports take is measured after "
        "a tiny LLM was loaded the same way. A full copy was measured on one rank: on "
        "more, each would hold as much."
    )
    report.table(
        COLUMNS, [_row(way, n, m, whole) for way in WAYS for n, m in enumerate(found[way])]
    )
    of_highest, of_left = zip(*(_shares(m, whole) for m in found["ours"]), strict=True)
    report.targets(
        [
            Target(
                "fullest rank's highest / a full copy's highest",
                0.65,
                [max(of_highest)],
                at_least=False,
            ),
            Target(
                "the same / what it leaves, without imports",
                0.65,
                [max(of_left)],
                at_least=False,
            ),
        ]
    )
    return report.finish(out, hardware)


def _shares(memory: Memory, whole: Memory) -> tuple[float, float]:
    """Return peak memory relative to a full copy: to its peak, and to its final memory."""
    return memory.highest / whole.highest, (memory.highest - memory.before) / (
        whole.after - whole.before
    )


def _row(way: str, rank: int, memory: Memory, whole: Memory) -> tuple[str, ...]:
    figures = (memory.before, memory.highest, memory.anonymous, memory.files, memory.after)
    shares = (f"{share:.2f}" for share in _shares(memory, whole))
    return (WAYS[way], str(rank), *(f"{f:,.0f}" for f in figures), *shares)


def write_llm(folder: Path, config: Any, shard_mb: int) -> tuple[int, int]:
    """Save a model tensor by tensor to save memory. Return numbers of parameters, files."""
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    weights = (
        (name, torch.randn(meta.shape, generator=generator, dtype=torch.bfloat16) * 0.02)
        for name, meta in skeleton.named_parameters()
    )
    write_weights(folder, weights, file_bytes=shard_mb * 10**6)
    skeleton.config.save_pretrained(folder)
    skeleton.generation_config.save_pretrained(folder)
    num_parameters = sum(meta.numel() for meta in skeleton.parameters())
    return num_parameters, len(list(folder.glob("*.safetensors")))


def measure(way: str, model: Path, ranks: int) -> list[Memory]:
    """Load the LLM with one process per rank. Return the memory of each rank."""
    print(f"{way} ...", file=sys.stderr, flush=True)
    port = str(free_port())
    children = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.llm_loading",
                    f"--way={way}",
                    f"--folder={model}",
                ],
                cwd=ROOT,
                env={**os.environ, **place, **address},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    pages = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"a rank of {way} failed")
    return [Memory(**json.loads(page.splitlines()[-1])) for page in pages]


def rank_of(way: str, model: Path) -> str:
    """Load the LLM in this process and print the memory."""
    import deepspeed

    from flallm_ds.models.llm.load import load_llm
    from flallm_ds.training import engine

    logging.disable_progress_bar()
    engine.prepare()
    device = torch.device("cpu")
    config = complete(
        engine.read_deepspeed_config(ROOT / "ds_configs" / "zero3_offload.json"),
        device,
        1,
        1.0,
    )
    deepspeed.init_distributed("gloo")
    partitioning = None if way == "whole" else engine.model_loading(config)
    loading: dict[str, Callable[[Path], Any]] = {
        "whole": lambda folder: touched(load_llm(str(folder))),
        "transformers": lambda folder: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ),
        "ours": lambda folder: load_llm(str(folder)),
    }
    loading[way](model / "tiny")
    memory = watched(lambda: loading[way](model))
    del partitioning
    page = json.dumps(asdict(memory))
    print(page, flush=True)
    torch.distributed.barrier()
    return page


def touched(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data.mul_(1)  # the kernel allocates a page when it is written
    return model


def watched(load: Callable[[], Any]) -> Memory:
    """Measure the memory of this process while `load` runs.

    The maxima of anonymous and file pages come from samples.
    """
    Path("/proc/self/clear_refs").write_text("5")  # reset the maximum of the kernel
    before = status()
    highest = dict(before)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            for name, value in status().items():
                highest[name] = max(highest[name], value)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    kept = load()
    time.sleep(2 * SAMPLE_S)
    done.set()
    watcher.join()
    after = status()
    del kept
    return Memory(
        before["VmRSS"],
        after["VmHWM"],
        highest["RssAnon"],
        highest["RssFile"],
        after["VmRSS"],
    )


def status() -> dict[str, float]:
    """Read memory from /proc/self/status, in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")
    return {
        line[0][:-1]: int(line[1]) * 1024 / 1e6
        for line in lines
        if line and line[0] in wanted
    }


if __name__ == "__main__":
    command.main(run)
