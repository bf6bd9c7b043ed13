"""The settings of a DeepSpeed JSON that are refused, or unsafe on this device."""

from pathlib import Path

from flallm_ds.errors import UserError
from flallm_ds.preflight.facts import Device
from flallm_ds.preflight.results import FAILURE, OK, WARNING, Result
from flallm_ds.training.build.engine import json_path
from flallm_ds.training.deepspeed_json import precision, unsafe, zero_stage
from flallm_ds.training.engine import read_deepspeed_config

CHECK = "DeepSpeed JSON"


def settings(name: str, device: Device) -> list[Result]:
    """Check a DeepSpeed JSON. name: a path, also of ds_configs/ outside a checkout."""
    path = json_path(Path(name))
    try:
        config = read_deepspeed_config(path)
    except UserError as error:
        return [Result(CHECK, FAILURE, str(error).rstrip("."))]
    results = []
    # The first GPUs that compute in bf16 are of compute capability 8.0.
    is_old = bool(device.capability) and float(device.capability) < 8
    if is_old and precision(config).endswith(("bf16", "bfloat16")):
        results.append(
            Result(
                CHECK,
                FAILURE,
                f"{path} sets {precision(config)}, which {device} cannot compute",
                "Use a JSON with fp16 or fp32.",
            )
        )
    for found, remedy in unsafe(config):
        results.append(Result(CHECK, WARNING, f"{path} {found}", remedy))
    text = f"{path}: {precision(config)}, ZeRO stage {zero_stage(config)}"
    return results or [Result(CHECK, OK, text)]
