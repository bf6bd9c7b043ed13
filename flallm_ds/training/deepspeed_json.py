"""The DeepSpeed JSON: which keys it may have, and what becomes of it on a machine without
a GPU."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from flallm_ds.command import nearest
from flallm_ds.errors import UserError

# Numbers that RunConfig owns, and the options that set them: nobody could say which of
# two counts.
OWNED_BY_RUN = {
    "train_batch_size": "data.batch_clips",
    "train_micro_batch_size_per_gpu": "data.batch_clips and data.micro_batches",
    "gradient_accumulation_steps": "data.micro_batches",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.name",
    "scheduler": "optim.warmup",
    "steps_per_print": "train.log_every_s",
}
OWNED_BY_JSON = (
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "activation_checkpointing",
    "aio",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "checkpoint",
    "wall_clock_breakdown",
    "comms_logger",
)
_PRECISIONS = ("bf16", "fp16", "torch_autocast", "data_types")


def read_json(path: Path, zero_keys: Sequence[str]) -> dict[str, Any]:
    """Read a DeepSpeed JSON whose every key is known and none is RunConfig's.

    DeepSpeed accepts an unknown top-level key in silence, so the check is ours.
    zero_keys: those that DeepSpeed knows in `zero_optimization`. Raises UserError.
    """
    if not path.is_file():
        raise UserError(
            f"train.deepspeed must be a DeepSpeed JSON, but there is no file {path}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} must be JSON, but {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, but does not.")
    _must_be_objects(config, ("zero_optimization", *_PRECISIONS), path)
    zero = config.get("zero_optimization", {})
    _must_be_objects(zero, ("offload_param", "offload_optimizer"), path)
    for name in config:
        if name in OWNED_BY_RUN:
            option = OWNED_BY_RUN[name].split()[0]
            raise UserError(f"{name} must not be in {path}: set --{option} instead.")
        if name not in OWNED_BY_JSON:
            raise UserError(
                f"{path} has an unknown key {name!r}: {nearest(name, OWNED_BY_JSON)}"
            )
    checks_overflow = config.get("bf16", {}).get("check_grad_overflow", True)
    if checks_overflow is not True:
        raise UserError(
            f"bf16.check_grad_overflow must be true in {path}, got "
            f"{json.dumps(checks_overflow)}: a gradient that is not finite would enter the "
            "weights. Remove it."
        )
    for name in zero:
        if name not in zero_keys:
            hint = nearest(name, zero_keys)
            raise UserError(f"{path} has an unknown key zero_optimization.{name}: {hint}")
    return dict(config)


def _must_be_objects(config: dict[str, Any], names: Iterable[str], path: Path) -> None:
    for name in names:
        if not isinstance(config.get(name, {}), dict):
            got = json.dumps(config[name])
            raise UserError(f"{name} must be a JSON object in {path}, but is {got}.")


def for_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """The same ZeRO without a GPU: fp32, no pinned memory, tiny models really partitioned."""
    # Copies, because the caller keeps the JSON. A machine without a GPU computes in fp32.
    on_cpu = dict(config)
    for key in _PRECISIONS:
        on_cpu.pop(key, None)
    zero = dict(on_cpu.get("zero_optimization", {}))
    zero["overlap_comm"] = False
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            # Offload to NVMe becomes offload to memory: tests need no fast disk.
            device = "none" if zero[part].get("device", "none") == "none" else "cpu"
            zero[part] = {**zero[part], "pin_memory": False, "device": device}
    zero.pop("zero_hpz_partition_size", None)  # of a node's GPUs
    # Parameters below the threshold are not partitioned: tiny models would have no others.
    if zero.get("stage") == 3:
        zero["stage3_param_persistence_threshold"] = 0
    on_cpu["zero_optimization"] = zero
    # A CPU op is compiled at first use, for minutes, with a lock that outlives a killed
    # build.
    on_cpu["zero_force_ds_cpu_optimizer"] = False
    return on_cpu


def scales_loss(config: dict[str, Any]) -> bool:
    """Whether the JSON asks for fp16, whose gradients vanish without a scale."""
    if config.get("fp16", {}).get("enabled", False):
        return True
    autocast = config.get("torch_autocast", {})
    dtype = str(autocast.get("dtype", "bfloat16"))  # also with a prefix: torch.float16
    return autocast.get("enabled", False) and "float16" in dtype.split(".")


# Lowest learning rate for master weights of 8 and of 11 significant bits, by the flag
# that asks for them. Adam moves a weight by about the learning rate, and a bf16 weight of
# 0.05 does not move by less than 1.2e-4: at 1e-5, 85 % of an LLM's weights never move.
_LOWEST_RATES = {
    "bf16_master_weights_and_grads": 1e-4,
    "fp16_master_weights_and_grads": 1e-4 / 8,
}


def complete(
    config: dict[str, Any],
    device: torch.device,
    accumulation: int,
    clip: float,
) -> dict[str, Any]:
    """The JSON with what RunConfig owns filled in, for this device."""
    if device.type != "cuda":
        config = for_cpu(config)
    return {
        # It would refuse SGD; of AdamW `_optimizer` takes DeepSpeed's own.
        "zero_force_ds_cpu_optimizer": False,
        **config,
        # A micro-batch is one packed batch, however many clips it has.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def lowest_rate(config: dict[str, Any]) -> tuple[str, float] | None:
    """(flag, learning rate below which the JSON loses most updates).

    None where master weights are fp32.
    """
    for flag, rate in _LOWEST_RATES.items():
        precision = flag[:4]
        if config.get(precision, {}).get(flag):
            return f"{precision}.{flag}", rate
    return None


def zero_stage(config: dict[str, Any]) -> int:
    """0 where the JSON has no ZeRO."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
