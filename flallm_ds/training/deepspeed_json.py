"""Read the DeepSpeed JSON, check its keys, and adapt it to the run and the machine."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from flallm_ds.command import nearest
from flallm_ds.errors import UserError

# Keys that are set by options of the run, and those options. A key in the JSON would set
# the same value a second time.
OWNED_BY_RUN = {
    "train_batch_size": "data.batch_clips",
    "train_micro_batch_size_per_gpu": "data.batch_clips and data.micro_batches",
    "gradient_accumulation_steps": "data.micro_batches",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.name",
    "scheduler": "optim.warmup",
    "steps_per_print": "train.log_every_s",
    "flops_profiler": "train.profile",
}
# Keys that only the JSON sets.
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
# Keys of zero_optimization that DeepSpeed accepts but that break a guarantee: the only
# value that is accepted, and what another value would do.
_REFUSED: dict[str, tuple[Any, str]] = {
    "zero_hpz_partition_size": (
        1,
        "after a resume, its second copy of the parameters would be out of date",
    ),
    "compute_grad_norm": (True, "gradients would be neither clipped nor checked"),
    "zenflow": (None, "it changes the number of gradient accumulation steps"),
    "zero_quantized_weights": (False, "it rounds the weights that are trained"),
    "zero_quantized_gradients": (False, "it rounds the gradients"),
    "zero_quantized_nontrainable_weights": (False, "it rounds the frozen weights"),
    # Older tutorials set these.
    "mics_shard_size": (-1, "DeepSpeed has removed MiCS"),
    "mics_hierarchical_params_gather": (False, "DeepSpeed has removed MiCS"),
}
_PRECISIONS = ("bf16", "fp16", "torch_autocast", "data_types")


def read_json(path: Path, zero_keys: Sequence[str] | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check its keys.

    zero_keys: the valid keys of `zero_optimization`; None: not checked, for callers that
    do not import DeepSpeed. Raises UserError if a key is unknown
    or set by an option of the run, or if a value has the wrong type.
    """
    if not path.is_file():
        raise UserError(
            f"train.deepspeed must be an existing JSON file, got {path}. Check the path."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read DeepSpeed JSON {path}: {error}. Correct its syntax."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must be a JSON object, got {type(config).__name__}.")

    # DeepSpeed ignores an unknown key at the top level without a message.
    _must_be_objects(config, ("zero_optimization", *_PRECISIONS), path)
    zero = config.get("zero_optimization", {})
    _must_be_objects(zero, ("offload_param", "offload_optimizer"), path)
    for name in config:
        if name in OWNED_BY_RUN:
            option = OWNED_BY_RUN[name].split()[0]
            got = json.dumps(config[name])
            raise UserError(
                f"{name} must not be set in {path}, got {got}. Set --{option} instead."
            )
        if name not in OWNED_BY_JSON:
            raise UserError(
                f"A key of {path} must be one that DeepSpeed reads, got {name!r}: "
                f"{nearest(name, OWNED_BY_JSON)}"
            )
    # Without this check, DeepSpeed makes the step.
    checks_overflow = config.get("bf16", {}).get("check_grad_overflow", True)
    if checks_overflow is not True:
        raise UserError(
            f"bf16.check_grad_overflow must be true in {path}, got "
            f"{json.dumps(checks_overflow)}: a step would use gradients that are not "
            "finite. Remove it."
        )
    for name, (allowed, reason) in _REFUSED.items():
        got = zero.get(name, allowed)
        if got != allowed:
            raise UserError(
                f"zero_optimization.{name} must be {json.dumps(allowed)} in {path}, got "
                f"{json.dumps(got)}: {reason}. Remove it."
            )
    if zero_keys is None:
        return dict(config)
    for name in zero:
        if name not in zero_keys:
            raise UserError(
                f"A key of {path} must be one that DeepSpeed reads, got "
                f"zero_optimization.{name}: {nearest(name, zero_keys)}"
            )
    return dict(config)


def _must_be_objects(config: dict[str, Any], names: Iterable[str], path: Path) -> None:
    """Raise UserError if one of these keys is set to something other than a JSON object."""
    for name in names:
        if not isinstance(config.get(name, {}), dict):
            got = json.dumps(config[name])
            raise UserError(f"{name} must be a JSON object in {path}, got {got}.")


def for_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON for a machine without a GPU: the same ZeRO stage in fp32.

    Memory is not pinned, and parameters of any size are partitioned.
    """
    # Copy, because the caller keeps the JSON.
    on_cpu = dict(config)
    for key in _PRECISIONS:
        on_cpu.pop(key, None)
    zero = dict(on_cpu.get("zero_optimization", {}))
    zero["overlap_comm"] = False
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            # Offload to NVMe becomes offload to memory.
            device = "none" if zero[part].get("device", "none") == "none" else "cpu"
            zero[part] = {**zero[part], "pin_memory": False, "device": device}
    # ZeRO-3 does not partition parameters below the threshold; all those of a tiny model
    # are below the default.
    if zero.get("stage") == 3:
        zero["stage3_param_persistence_threshold"] = 0
    on_cpu["zero_optimization"] = zero
    # DeepSpeed compiles CPU Adam at its first use. That takes minutes, and a build that is
    # killed leaves a lock.
    on_cpu["zero_force_ds_cpu_optimizer"] = False
    return on_cpu


def scales_loss(config: dict[str, Any]) -> bool:
    """Return whether the JSON sets fp16, which needs a loss scale: small gradients would
    become 0."""
    if config.get("fp16", {}).get("enabled", False):
        return True
    autocast = config.get("torch_autocast", {})
    dtype = str(autocast.get("dtype", "bfloat16"))
    # The name may have a prefix: torch.float16.
    return autocast.get("enabled", False) and "float16" in dtype.split(".")


def precision(config: dict[str, Any]) -> str:
    """Return the number format of the forward pass, in one word or two."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled", False):
            return name
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled", False):
        return f"autocast {str(autocast.get('dtype', 'bfloat16')).removeprefix('torch.')}"
    return "fp32"


# Lowest learning rate for master weights of 8 and of 11 significant bits, by the flag that
# sets them. Adam changes a weight by about the learning rate, but a bf16 weight of 0.05
# changes by at least 1.2e-4: at 1e-5, 85 % of the weights of an LLM never change.
_LOWEST_LRS = {
    "bf16_master_weights_and_grads": 1e-4,
    "fp16_master_weights_and_grads": 1e-4 / 8,
}


def complete(
    config: dict[str, Any],
    device: torch.device,
    accumulation: int,
    clip: float,
) -> dict[str, Any]:
    """Return the JSON for DeepSpeed: adapted to the device, with the values of the run.

    accumulation: number of micro-batches per step of a rank. clip: maximum gradient norm.
    """
    if device.type != "cuda":
        config = for_cpu(config)
    return {
        # True would refuse SGD with offload. For AdamW the engine uses DeepSpeed's own.
        "zero_force_ds_cpu_optimizer": False,
        **config,
        # A micro-batch is one packed batch with any number of clips.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        # The trainer prints the progress.
        "steps_per_print": 10**9,
    }


def unsafe(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return settings that DeepSpeed accepts but few users want, each with its remedy."""
    found = []
    zero = config.get("zero_optimization", {})
    devices = set()
    for part in ("offload_optimizer", "offload_param"):
        devices.add(zero.get(part, {}).get("device", "none"))
    if "nvme" in devices and zero.get("sub_group_size", 10**9) > 10**8:
        found.append(
            (
                "has a sub_group_size above 100000000, with which offload to NVMe pins up "
                "to 16 GB of host memory on each rank",
                'Set "sub_group_size": 100000000.',
            )
        )
    if config.get("communication_data_type") == "fp16":
        found.append(
            (
                "sums gradients in fp16, where the sum over many ranks overflows",
                "Remove communication_data_type.",
            )
        )
    if config.get("wall_clock_breakdown"):
        found.append(
            (
                "sets wall_clock_breakdown, which waits for the GPU several times in a step",
                "Remove it, except to measure.",
            )
        )
    return found


def operators(config: dict[str, Any], optimizer: str) -> list[str]:
    """Return the operators of DeepSpeed that a run uses and that must be compiled.

    optimizer: `optim.name` of the run. On a CPU there are none.
    """
    if not torch.cuda.is_available():
        return []
    zero = config.get("zero_optimization", {})
    of_optimizer = zero.get("offload_optimizer", {}).get("device", "none")
    of_parameters = zero.get("offload_param", {}).get("device", "none")
    found = []
    if of_optimizer != "none" and optimizer != "sgd":
        found.append("cpu_adam")
    if "nvme" in (of_optimizer, of_parameters):
        found.append("async_io")
    return found


def with_flops_profiler(
    config: dict[str, Any], num_steps: int, file: Path
) -> dict[str, Any]:
    """Return the JSON with DeepSpeed's FLOPs profiler on, for the step after `num_steps`.

    file: the report that it writes.
    """
    profiler = {"enabled": True, "profile_step": num_steps, "output_file": str(file)}
    return {**config, "flops_profiler": profiler}


def lowest_lr(config: dict[str, Any]) -> tuple[str, float] | None:
    """Return the flag for low-precision master weights, and their lowest learning rate.

    A lower rate would lose most updates to rounding. None if master weights are fp32.
    """
    for flag, rate in _LOWEST_LRS.items():
        precision = flag[:4]
        if config.get(precision, {}).get(flag):
            return f"{precision}.{flag}", rate
    return None


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of the JSON, 0 if it does not use ZeRO."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
