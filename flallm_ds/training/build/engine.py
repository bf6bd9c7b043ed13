"""Build the DeepSpeed configuration and the parameter groups of the engine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flallm_ds.config import OptimConfig, RunConfig, steps_of
from flallm_ds.data.plan import micro_batches_per_rank
from flallm_ds.dist import World, rank_environment
from flallm_ds.errors import require
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.training import engine as ds
from flallm_ds.training import extensions
from flallm_ds.training.deepspeed_json import (
    complete,
    lowest_lr,
    operators,
    with_flops_profiler,
    zero_stage,
)

# A link in the package, so that an installed wheel contains the JSONs, too.
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

FLOPS = Path("profile") / "flops.txt"  # in the run folder


def deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    """Read the DeepSpeed JSON of a run and add the values that options of the run set.

    Raises UserError if JSON and options do not fit each other.
    """
    path = deepspeed_json(config)
    json_config = ds.read_deepspeed_config(path)
    check_precision(config, json_config, path)
    check_learning_rates(config, json_config, path)
    accumulation = micro_batches_per_rank(config.data.micro_batches, world.size)
    ds_config = complete(json_config, world.device, accumulation, config.optim.clip)
    steps = steps_of(config.train.profile)
    if steps:
        ds_config = with_flops_profiler(ds_config, steps[-1], Path(config.run) / FLOPS)
    # ZeRO-3 gathers parameters in each forward pass, so all ranks must run equally many.
    is_partitioned = config.trains_visual and zero_stage(ds_config) == 3
    require(
        not (is_partitioned and config.visual.chunk_frames),
        "visual.chunk_frames must be 0 where ZeRO-3 partitions the visual encoder, got "
        f"{config.visual.chunk_frames}: ranks would wait for others with fewer chunks. Set "
        "--visual.chunk_frames=0.",
    )
    return ds_config


def deepspeed_json(config: RunConfig) -> Path:
    """Return the path of the DeepSpeed JSON: train.deepspeed, or the default of the stage."""
    if not config.train.deepspeed:
        name = "zero2.json" if config.trains_visual else "zero3_offload.json"
        return DS_CONFIGS / name
    return json_path(Path(config.train.deepspeed))


def json_path(path: Path) -> Path:
    """Return where a DeepSpeed JSON is.

    Outside a checkout, ds_configs/NAME.json is that of the installed package.
    """
    packaged = DS_CONFIGS / path.name
    if path.parent == Path("ds_configs") and not path.exists() and packaged.is_file():
        return packaged
    return path


def build_operators(configs: Sequence[RunConfig]) -> None:
    """Build the operators of DeepSpeed that runs use, once per machine.

    Call it before the process group exists: the other ranks of the machine then wait for
    it at their meeting, without a time limit of collectives. Raises UserError for a wrong
    DeepSpeed JSON, RankError if an operator cannot be built on this machine.
    """
    names: dict[str, None] = {}  # a set would change the order
    for config in configs:
        json_config = ds.read_deepspeed_config(deepspeed_json(config))
        names |= dict.fromkeys(operators(json_config, config.optim.name))
    if not names:
        return
    if rank_environment(os.environ)["LOCAL_RANK"] != "0":
        extensions.set_folder()  # from which this rank loads the operators later
        return
    ds.prepare()
    extensions.build(names, ds.load_operator)


def check_precision(config: RunConfig, json_config: dict[str, Any], path: Path) -> None:
    """Raise UserError if the engine casts the parameters of BatchNorm but not its
    statistics."""
    # A frozen encoder is not part of the engine.
    if not config.trains_visual:
        return
    for precision in ("bf16", "fp16"):
        require(
            not json_config.get(precision, {}).get("enabled"),
            "train.deepspeed must use torch_autocast where the visual encoder is trained, "
            f"got {precision} in {path}: the statistics of BatchNorm stay fp32. Use "
            "ds_configs/zero2.json, or --visual.frozen=all.",
        )


def check_learning_rates(
    config: RunConfig, json_config: dict[str, Any], path: Path
) -> None:
    """Raise UserError if a learning rate is so low that its updates of low-precision master
    weights are rounded away."""
    lowest = lowest_lr(json_config)
    if lowest is None:
        return
    flag, least = lowest
    # Collect the learning rates of the parameters that this run trains.
    optim, llm = config.optim, config.llm
    rates = {"lr": optim.lr}
    if config.trains_visual:
        rates["backbone_lr"] = _backbone_lr(optim)
    if config.stage != "visual" and (llm.tune != "frozen" or llm.layers):
        rates["llm_lr"] = optim.llm_lr
    for name, rate in rates.items():
        require(
            rate >= least or rate == 0,  # 0 keeps parameters unchanged
            f"optim.{name} must be at least {least:g} where {path} sets {flag}, got "
            f"{rate:g}: most updates would be rounded away. Set --optim.{name}={least:g}, "
            "or use a JSON with fp32 master weights, such as ds_configs/zero3_offload.json.",
        )


def parameter_groups(model: SignTranslator, config: RunConfig) -> list[dict[str, Any]]:
    """Return the trained parameters in groups for the optimizer, each with its learning
    rate: the backbone, the language model, and the rest."""
    optim = config.optim
    backbone: list[torch.nn.Parameter] = []
    language: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("visual.encoder.backbone."):
            backbone.append(parameter)
        elif name.startswith("language_model."):
            language.append(parameter)
        else:
            others.append(parameter)

    # Light-T is trained from scratch, with the learning rate of the encoder.
    language_lr = optim.lr if config.stage == "visual" else optim.llm_lr
    groups = [
        {"params": backbone, "lr": _backbone_lr(optim)},
        {"params": language, "lr": language_lr},
        {"params": others, "lr": optim.lr},
    ]
    return [group for group in groups if group["params"]]


def _backbone_lr(optim: OptimConfig) -> float:
    """Return the learning rate of the backbone: optim.lr if there is no own one."""
    return optim.lr if optim.backbone_lr is None else optim.backbone_lr
