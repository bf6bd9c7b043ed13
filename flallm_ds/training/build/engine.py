"""Build what the engine needs: its DeepSpeed configuration and its parameter groups."""

from pathlib import Path
from typing import Any

import torch

from flallm_ds.config import OptimConfig, RunConfig
from flallm_ds.dist import World
from flallm_ds.errors import require
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.training import engine as ds
from flallm_ds.training.deepspeed_json import complete, lowest_rate, zero_stage

# also in an installed wheel
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    """Read the DeepSpeed JSON of a run and add what the options of the run decide.

    Raises UserError where JSON and options do not fit each other.
    """
    path = deepspeed_json(config)
    json_config = ds.read_deepspeed_config(path)
    check_precision(config, json_config, path)
    check_rates(config, json_config, path)
    accumulation = config.data.micro_batches // world.size
    ds_config = complete(json_config, world.device, accumulation, config.optim.clip)
    # Under ZeRO-3 each forward pass is collective, so all ranks must make as many.
    is_partitioned = config.trains_visual and zero_stage(ds_config) == 3
    require(
        not (is_partitioned and config.visual.chunk_frames),
        "visual.chunk_frames must be 0 where ZeRO-3 partitions the visual encoder, "
        "because ranks with fewer chunks would leave the others waiting, but is "
        f"{config.visual.chunk_frames}.",
    )
    return ds_config


def deepspeed_json(config: RunConfig) -> Path:
    """Choose the DeepSpeed JSON of a run: what train.deepspeed names, otherwise that of
    the stage.

    Outside a checkout, ds_configs/NAME.json is found in the installed package.
    """
    if not config.train.deepspeed:
        name = "zero2.json" if config.trains_visual else "zero3_offload.json"
        return DS_CONFIGS / name
    path = Path(config.train.deepspeed)
    packaged = DS_CONFIGS / path.name
    if path.parent == Path("ds_configs") and not path.exists() and packaged.is_file():
        return packaged
    return path


def check_precision(config: RunConfig, json_config: dict[str, Any], path: Path) -> None:
    """Raise UserError for BatchNorm in an engine that casts parameters but not statistics."""
    if not config.trains_visual:
        return
    for precision in ("bf16", "fp16"):
        require(
            not json_config.get(precision, {}).get("enabled"),
            "train.deepspeed must compute by torch_autocast where the visual encoder is "
            f"trained, because BatchNorm's statistics stay fp32, but {path} enables "
            f"{precision}. Take ds_configs/zero2.json or leave --visual.frozen=all.",
        )


def check_rates(config: RunConfig, json_config: dict[str, Any], path: Path) -> None:
    """Raise UserError for a learning rate whose updates low-precision master weights
    round away."""
    lowest = lowest_rate(json_config)
    if lowest is None:
        return
    flag, least = lowest
    # The learning rates of the parameters that this run trains.
    optim, llm = config.optim, config.llm
    rates = {"lr": optim.lr}
    if config.trains_visual:
        rates["backbone_lr"] = _backbone_rate(optim)
    if config.stage != "visual" and (llm.tune != "frozen" or llm.layers):
        rates["llm_lr"] = optim.llm_lr
    for name, rate in rates.items():
        require(
            rate >= least or rate == 0,
            f"optim.{name} must be at least {least:g} where {path} sets {flag}, because "
            f"smaller updates of most weights are rounded away, got {rate:g}. Set "
            f"--optim.{name}={least:g} or a JSON with fp32 master weights, such as "
            "ds_configs/zero3_offload.json.",
        )


def parameter_groups(model: SignTranslator, config: RunConfig) -> list[dict[str, Any]]:
    """Group the trained parameters by base learning rate: the backbone, the LLM, and the rest."""
    optim = config.optim
    backbone: list[torch.nn.Parameter] = []
    language: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # `visual` is the feature extractor, `visual.visual` its visual encoder.
        if name.startswith("visual.visual.backbone."):
            backbone.append(parameter)
        elif name.startswith("language_model."):
            language.append(parameter)
        else:
            others.append(parameter)

    # Light-T is trained from scratch, as fast as the encoder.
    language_rate = optim.lr if config.stage == "visual" else optim.llm_lr
    groups = [
        {"params": backbone, "lr": _backbone_rate(optim)},
        {"params": language, "lr": language_rate},
        {"params": others, "lr": optim.lr},
    ]
    return [group for group in groups if group["params"]]


def _backbone_rate(optim: OptimConfig) -> float:
    return optim.lr if optim.backbone_lr is None else optim.backbone_lr
