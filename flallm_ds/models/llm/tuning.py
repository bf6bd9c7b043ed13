"""Choose which weights of a model are trained: all, some by name, or LoRA adapters of peft.

The adapter layers are put into the model itself, without a wrapper: `q_proj.weight` becomes
`q_proj.base_layer.weight`, next to `q_proj.lora_A.default.weight`,
`q_proj.lora_B.default.weight` and, for DoRA, `q_proj.lora_magnitude_vector.default.weight`.
"""

import copy
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    TaskType,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from flallm_ds.command import nearest
from flallm_ds.errors import UserError
from flallm_ds.models.weights import Weights

ALL_LINEAR = "all-linear"
# (name, tensor), or None instead of the tensor on ranks that only take part in a gather.
NamedTensors = Iterable[tuple[str, torch.Tensor | None]]
# The name of an adapter layer, and the name of a tensor in it.
_OF_A_LAYER = re.compile(r"(.+)\.((?:base_layer|lora_\w+)\..+)")
# Names of the parameter classes of bitsandbytes, which need not be installed.
_QUANTIZED = ("Int8Params", "Params4bit")


@dataclass(frozen=True)
class Tuning:
    """The choice of the weights that are trained.

    layers and targets are regular expressions, which are searched in the names of
    parameters and of modules.
    """

    how: Literal["full", "lora", "dora", "frozen"] = "full"
    # with "full": train only the parameters that match; else train these as well
    layers: str = ""
    rank: int = 16
    # the output of an adapter is multiplied by alpha / rank
    alpha: float = 32.0
    dropout: float = 0.05
    # the linear layers that get an adapter; the output head never gets one
    targets: str = ALL_LINEAR
    # the section of the options, which error messages name
    section: Literal["llm", "visual"] = "llm"

    @property
    def low_rank(self) -> bool:
        """Return whether adapters are trained."""
        return self.how in ("lora", "dora")


def tune(llm: Any, tuning: Tuning, seed: int = 0) -> None:
    """Freeze weights and add adapters, in place. Call it before the engine is built.

    seed: of the random weights of adapters. For DoRA on parameters that ZeRO-3 has
    partitioned, the `HfDeepSpeedConfig` must still be alive, because the norms of the
    weights are computed here. Raises UserError for a pattern that matches nothing.
    """
    # Integers of bitsandbytes have no gradients and cannot be chosen.
    trainable = {n: p for n, p in llm.named_parameters() if p.requires_grad}
    chosen = _chosen(trainable, tuning)
    if tuning.how == "full" and not tuning.layers:
        return
    llm.requires_grad_(False)
    if tuning.low_rank:
        _add_low_rank(llm, tuning, seed)
    # After the adapters, because peft freezes all other parameters.
    for parameter in chosen:
        parameter.requires_grad_(True)


def _chosen(parameters: dict[str, nn.Parameter], tuning: Tuning) -> list[nn.Parameter]:
    """Return the parameters that `tuning.layers` matches, without quantised ones."""
    if not tuning.layers:
        return []
    whole = [n for n, p in parameters.items() if type(p).__name__ not in _QUANTIZED]
    found = _search(tuning.layers, whole, f"{tuning.section}.layers", "a parameter")
    return [parameters[name] for name in found]


def _add_low_rank(llm: Any, tuning: Tuning, seed: int) -> None:
    """Add adapters to the linear layers that `tuning.targets` matches, in place."""
    partitioned = any(hasattr(p, "ds_id") for p in llm.parameters())
    assert not (partitioned and tuning.how == "dora") or is_deepspeed_zero3_enabled(), (
        "DoRA reads the norms of the weights: keep HfDeepSpeedConfig alive, or peft reads "
        "empty weights"
    )
    targets = low_rank_targets(llm, tuning.targets, tuning.section)
    if tuning.section == "visual":
        task = TaskType.FEATURE_EXTRACTION
    elif llm.config.is_encoder_decoder:
        task = TaskType.SEQ_2_SEQ_LM
    else:
        task = TaskType.CAUSAL_LM
    config = LoraConfig(
        r=tuning.rank,
        # The type hint says int, but peft only divides alpha by r.
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]
        lora_dropout=tuning.dropout,
        use_dora=tuning.how == "dora",
        target_modules=targets,
        task_type=task,
    )
    # The generator of the caller must not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, llm)
    llm.train(llm.training)  # new layers are in train mode, with dropout
    assert _low_rank_layers(llm).keys() == set(targets), (
        "peft has adapted other layers than the targets"
    )


def low_rank_targets(llm: Any, pattern: str, section: str = "llm") -> list[str]:
    """Return the names of the linear layers that `pattern` matches, except the head.

    ALL_LINEAR matches all of them. Raises UserError if the pattern matches none.
    """
    # A backbone has no output head.
    head = llm.get_output_embeddings() if hasattr(llm, "get_output_embeddings") else None
    names = []
    for name, module in llm.named_modules():
        # PyTorch's own attention never calls its output layer, so an adapter would have no
        # effect.
        is_unused = isinstance(module, NonDynamicallyQuantizableLinear)
        is_linear = isinstance(module, nn.Linear | Conv1D)
        if is_linear and not is_unused and module is not head:
            names.append(name)
    if pattern == ALL_LINEAR:
        return names
    what = "a linear layer of the " + {"llm": "LLM", "visual": "backbone"}[section]
    return _search(pattern, names, f"{section}.lora_targets", what)


def _search(pattern: str, names: Sequence[str], option: str, what: str) -> list[str]:
    """Return the names that a pattern matches.

    Raises UserError if there are none, or if the pattern is not a regular expression.
    """
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(
            f"{option} must be a regular expression, got {pattern!r} ({error}). Check it."
        ) from None
    if not found:
        # Suggest parts of the names that are similar to the longest word of the pattern.
        parts = set(".".join(names).split("."))
        words = sorted(part for part in parts if not part.isdigit())
        asked = max(re.findall(r"[A-Za-z]\w*", pattern), key=len, default=pattern)
        raise UserError(
            f"{option} must match the name of {what}, such as {names[-1]}, got {pattern!r}, "
            f"which matches none: {nearest(asked, words)}"
        )
    return found


def check_bits(bits: int, how: str, zero_stage: int, device: torch.device) -> None:
    """Raise UserError if weights of 8 or 4 bits cannot be loaded or trained in this way.

    transformers builds quantised weights outside zero.Init, which cannot partition them
    (bitsandbytes issue 1249), so under ZeRO-3 every rank would hold all of them.
    """
    if bits > 8:
        return
    option = f"llm.bits={bits}"
    if how == "full":
        raise UserError(
            f"llm.tune must be lora, dora or frozen with {option}, because integers have no "
            "gradient, got full. Give --llm.tune=lora, or --llm.bits=16."
        )
    if device.type != "cuda":
        raise UserError(
            f"llm.bits must be 16 without a CUDA device, got {bits}. Give "
            "--llm.bits=16, or use a GPU."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"llm.bits must be 16 without the package bitsandbytes, got {bits}. "
            "Install flallm_ds[gpu], or give --llm.bits=16."
        )
    if zero_stage == 3:
        raise UserError(
            f"The ZeRO stage must be at most 2 with {option}, because quantised weights "
            "cannot be partitioned, got 3 in the DeepSpeed JSON. Give "
            "--train.deepspeed=ds_configs/zero2.json, or --llm.bits=16."
        )


def merged(tensors: NamedTensors, llm: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the tensors under the names they had before `tune`, with adapters merged.

    tensors: gathered tensors by their names in `llm`, or None on ranks that only take part
    in a gather. They may be in any order; one layer at a time is held in memory. llm: as
    `tune` left it, for scales and layouts; its values, which may be partitioned, are not
    read. The tensors of an LLM without adapters are yielded unchanged. Raises UserError for
    quantised weights.
    """
    layers = _low_rank_layers(llm)
    waiting: dict[str, dict[str, torch.Tensor | None]] = {}
    for name, tensor in tensors:
        match = _OF_A_LAYER.fullmatch(name)
        if match is None or match[1] not in layers:
            yield name, tensor
        # Wait until the layer is complete; the parts may arrive in any order.
        elif match[2] == "base_layer.weight" or match[2].startswith("lora_"):
            prefix, part = match[1], match[2]
            parts = waiting.setdefault(prefix, {})
            parts[part] = tensor
            # Merge a layer as soon as all its parts have arrived.
            if parts.keys() == _parts(layers[prefix]):
                weight = _merge(layers[prefix], waiting.pop(prefix), prefix)
                yield f"{prefix}.weight", weight
        else:  # a bias
            yield f"{match[1]}.{match[2].removeprefix('base_layer.')}", tensor
    assert not waiting, f"parts of {sorted(waiting)} are missing"


def _low_rank_layers(llm: Any) -> dict[str, Any]:
    """Return the adapter layers by name."""
    layers = {}
    for name, module in llm.named_modules():
        if isinstance(module, LoraLayer):
            layers[name] = module
    return layers


def _parts(layer: Any) -> set[str]:
    """Return the names of the tensors that the weight of an adapter layer is merged
    from."""
    parts = set()
    for name, _ in layer.named_parameters():
        if name == "base_layer.weight" or name.startswith("lora_"):
            parts.add(name)
    return parts


def _merge(
    layer: Any, parts: dict[str, torch.Tensor | None], name: str
) -> torch.Tensor | None:
    """Return W + scale B A; DoRA (arXiv 2402.09353) scales each row to its magnitude.

    parts: the tensors of the layer by their names in it. name: of the layer, for the error.
    Returns None if the tensors are None. Raises UserError for quantised weights.
    """
    if type(layer.base_layer.weight).__name__ in _QUANTIZED:
        raise UserError(
            f"Cannot merge an adapter into {name}: its weight has 8 or 4 bits. Export with "
            "--lora=apart."
        )
    weight = parts.pop("base_layer.weight")
    if weight is None:
        return None
    # The first word of a name is enough: lora_A, lora_B, lora_magnitude_vector.
    short = {}
    for part, tensor in parts.items():
        if tensor is not None:
            short[part.split(".")[0]] = tensor.float()

    # O outputs, I inputs of the layer.
    # Conv1D stores (I, O), nn.Linear (O, I).
    turned = layer.fan_in_fan_out
    weight_OI = weight.float().T if turned else weight.float()
    (scale,) = layer.scaling.values()
    # In fp32, because bf16 would round small updates away.
    merged_OI = weight_OI + (short["lora_B"] @ short["lora_A"]) * scale
    if "lora_magnitude_vector" in short:
        norm_O = torch.linalg.norm(merged_OI, dim=1)
        merged_OI = (short["lora_magnitude_vector"] / norm_O)[:, None] * merged_OI
    whole: torch.Tensor = merged_OI.T if turned else merged_OI
    return whole.to(weight.dtype).contiguous()


def write_lora(folder: Path, tensors: NamedTensors, llm: Any, base: str) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(base model, folder)` reads.

    adapter_config.json and adapter_model.safetensors hold the adapter, and other parameters
    that were trained, if any. folder: an existing, empty one. tensors: as for `merged`;
    those of trained parameters are needed. base: the name or folder of the base model,
    which is written into the config.
    """
    trained = {name for name, p in llm.named_parameters() if p.requires_grad}
    state = {}
    for name, tensor in tensors:
        if tensor is not None and name in trained:
            state[name] = tensor.detach().cpu()

    # peft selects the tensors of the adapter. The other trained parameters are added.
    written = dict(
        get_peft_model_state_dict(llm, state_dict=state, save_embedding_layers=False)
    )
    for name, tensor in state.items():
        if ".lora_" not in name:
            written[name] = tensor

    # PeftModel expects this prefix.
    named = {f"base_model.model.{n}": t.contiguous() for n, t in written.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # A copy, because the LLM may be trained on.
    config = copy.copy(llm.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)


def read_lora(folder: Path, llm: Any) -> None:
    """Load an adapter that `write_lora` wrote into its LLM, in place.

    Raises UserError if the folder is incomplete or of another LLM.
    """
    weights = Weights(folder, "adapter_model.safetensors")
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), llm)
        result: Any = set_peft_model_state_dict(llm, dict(weights))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Cannot load the adapter in {folder}: {reason.rstrip('.')}. Export it again."
        ) from error
    # The frozen weights of the LLM are not in the file.
    missing = [name for name in result.missing_keys if ".lora_" in name]
    wrong = [*missing, *result.unexpected_keys]
    if wrong:
        raise UserError(
            f"The adapter in {folder} was trained with another LLM ({wrong[0]} does not fit). "
            "Use the LLM that adapter_config.json names."
        )
