"""Started under a launcher by test_llm_loading.py: LLMs loaded in parts and whole; one
JSON a rank."""

import ctypes
import gc
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import deepspeed
import torch

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.models.llm.load import LlmOptions, load_llm
from flallm_ds.training import engine as ds
from flallm_ds.training.deepspeed_json import complete

ds.prepare()
ZERO3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


def load(folder: Path, precision: dict[str, Any], options: LlmOptions) -> Any:
    partitioning = ds.model_loading(
        {**complete(ZERO3, torch.device("cpu"), 1, 1.0), **precision}
    )  # held until the model is loaded
    llm = load_llm(str(folder), options)
    del partitioning
    return llm


def state_of(llm: Any) -> dict[str, str]:
    """A digest of each parameter and buffer."""
    found = {}
    for name, parameter in llm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = digest(parameter)
    return found | {name: digest(buffer) for name, buffer in llm.named_buffers()}


def digest(tensor: torch.Tensor) -> str:
    return (
        f"{tensor.dtype} "
        + hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()
    )


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS:"))


def highest_mb(folder: Path, precision: dict[str, Any], options: LlmOptions) -> float:
    """How much more memory is resident at most while an LLM is loaded."""
    gc.collect()
    # memory that is free already would not be seen to grow
    ctypes.CDLL(None).malloc_trim(0)
    before, samples, done = resident_mb(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(resident_mb())

    watcher = threading.Thread(target=sample)
    watcher.start()
    llm = load(folder, precision, options)
    samples.append(resident_mb())
    done.set()
    watcher.join()
    del llm
    return max(samples) - before


def run(*, folder: Path, local_rank: int = 0) -> None:
    """--folder: holds a folder with LLMs, `llms`, and a larger one, `large`."""
    world = dist.start()
    report: dict[str, Any] = {}
    for path in sorted((folder / "llms").iterdir()):
        partitioned = load(path, {}, LlmOptions())
        whole = load_llm(str(path))
        report[path.name] = {
            "numel": max(p.numel() for p in partitioned.parameters()),
            "equal": state_of(partitioned) == state_of(whole),
            "generation": partitioned.generation_config.to_dict()
            == whole.generation_config.to_dict(),
            "config": partitioned.config.to_dict() == whole.config.to_dict(),
        }
    torch.manual_seed(1)
    drawn = load(path, {}, LlmOptions(pretrained=False))
    report["drawn"] = state_of(drawn)
    report["next_draw"] = torch.rand(3).tolist()
    bf16 = ({"bf16": {"enabled": True}}, LlmOptions(bits=16))
    report["bf16"] = sorted(
        {str(p.ds_tensor.dtype) for p in load(path, *bf16).parameters()}
    )
    report["highest_mb"] = {
        "fp32": highest_mb(folder / "large", {}, LlmOptions()),
        "bf16": highest_mb(folder / "large", *bf16),
    }
    (folder / f"rank{world.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(run)
