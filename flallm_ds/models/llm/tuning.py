"""What of the LLM is trained: all, some of it by name, or LoRA adapters by peft.

Low-rank layers stand in the LLM itself, without a wrapper: `q_proj.weight` becomes
`q_proj.base_layer.weight` beside `q_proj.lora_A.default.weight`,
`q_proj.lora_B.default.weight` and, for DoRA,
`q_proj.lora_magnitude_vector.default.weight`.
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
NamedTensors = Iterable[tuple[str, torch.Tensor | None]]
_OF_A_LAYER = re.compile(r"(.+)\.((?:base_layer|lora_\w+)\..+)")
# bitsandbytes' classes, which need not be installed
_QUANTIZED = ("Int8Params", "Params4bit")


@dataclass(frozen=True)
class Tuning:
    """What is trained.

    layers and targets are regular expressions, searched for in the names of parameters
    and of modules.
    """

    how: Literal["full", "lora", "dora", "frozen"] = "full"
    # with full, train only the parameters that it matches; else train those, too
    layers: str = ""
    rank: int = 16
    alpha: float = 32.0  # what lora adds is scaled by alpha / rank
    dropout: float = 0.05
    # The linear layers that get LoRA adapters; the output head never does.
    targets: str = ALL_LINEAR
    # Of the options: what the model is, and what errors name.
    section: Literal["llm", "visual"] = "llm"

    @property
    def low_rank(self) -> bool:
        return self.how in ("lora", "dora")


def tune(llm: Any, tuning: Tuning, seed: int = 0) -> None:
    """Freeze and extend a loaded model in place, before the engine is made.

    The same seed gives the same draws. For DoRA on parameters that ZeRO-3 has
    partitioned, the `HfDeepSpeedConfig` must still be alive: the norms of the weights are
    taken here. Raises UserError for a pattern that matches nothing.
    """
    trainable = {n: p for n, p in llm.named_parameters() if p.requires_grad}
    chosen = _chosen(trainable, tuning)
    if tuning.how == "full" and not tuning.layers:
        return
    llm.requires_grad_(False)
    if tuning.low_rank:
        _add_low_rank(llm, tuning, seed)
    for parameter in chosen:
        parameter.requires_grad_(True)


def _chosen(parameters: dict[str, nn.Parameter], tuning: Tuning) -> list[nn.Parameter]:
    if not tuning.layers:
        return []
    whole = [n for n, p in parameters.items() if type(p).__name__ not in _QUANTIZED]
    found = _search(tuning.layers, whole, f"{tuning.section}.layers", "a parameter")
    return [parameters[name] for name in found]


def _add_low_rank(llm: Any, tuning: Tuning, seed: int) -> None:
    partitioned = any(hasattr(p, "ds_id") for p in llm.parameters())
    assert not (partitioned and tuning.how == "dora") or is_deepspeed_zero3_enabled(), (
        "DoRA reads the weights' norms: keep HfDeepSpeedConfig alive, or peft sees empty "
        "weights"
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
        # peft divides it by r; it need not be whole.
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]
        lora_dropout=tuning.dropout,
        use_dora=tuning.how == "dora",
        target_modules=targets,
        task_type=task,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, llm)
    llm.train(llm.training)  # new layers come in train mode, with dropout
    assert _low_rank_layers(llm).keys() == set(targets), (
        "peft took other layers than those named"
    )


def low_rank_targets(llm: Any, pattern: str, section: str = "llm") -> list[str]:
    """Names of the linear layers, without the output head, that `pattern` is found in.

    ALL_LINEAR: all of them.
    """
    head = llm.get_output_embeddings() if hasattr(llm, "get_output_embeddings") else None
    names = []
    for name, module in llm.named_modules():
        # PyTorch's own attention never calls its output layer: an addition would have no
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
    """The names that a pattern is found in. Raises UserError where it is in none, or no
    pattern."""
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(
            f"{option} must be a regular expression, but is {pattern!r} ({error})."
        ) from None
    if not found:
        parts = set(".".join(names).split("."))
        words = sorted(part for part in parts if not part.isdigit())
        asked = max(re.findall(r"[A-Za-z]\w*", pattern), key=len, default=pattern)
        raise UserError(
            f"{option} must match the name of {what}, such as {names[-1]}, but {pattern!r} "
            f"matches none: {nearest(asked, words)}"
        )
    return found


def check_bits(bits: int, how: str, zero_stage: int, device: torch.device) -> None:
    """Raise UserError where weights of so many bits cannot be loaded, or not be trained as asked.

    transformers builds quantized weights outside zero.Init, and zero.Init does not take
    them (bitsandbytes issue 1249): under ZeRO-3 every rank would hold all of them.
    """
    if bits > 8:
        return
    option = f"llm.bits={bits}"
    if how == "full":
        raise UserError(
            f"{option} must go with frozen weights, because integers have no gradient, but "
            "llm.tune is full. Give --llm.tune=lora, or --llm.bits=16."
        )
    if device.type != "cuda":
        advice = "Give --llm.bits=16 or use a GPU."
        raise UserError(
            f"{option} needs a CUDA device, but this machine has none. {advice}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{option} needs the package bitsandbytes, which is not installed. Install "
            "flallm_ds[gpu], or give --llm.bits=16."
        )
    if zero_stage == 3:
        raise UserError(
            f"{option} must go with ZeRO-2 or less, because quantized weights cannot be "
            "partitioned, but the DeepSpeed JSON is of stage 3. Give "
            "--train.deepspeed=ds_configs/zero2.json, or --llm.bits=16."
        )


def merged(tensors: NamedTensors, llm: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The LLM's tensors under their names from before `tune`, LoRA adapters merged.

    tensors: whole ones by their names in `llm`, or None (on ranks that only take part in
    the gathering). They are taken as they come and no more than one layer is held. llm:
    as `tune` left it, for scales and layouts; its own, possibly partitioned, values are
    not read. An LLM without additions passes unchanged. Raises UserError for quantized
    weights.
    """
    layers = _low_rank_layers(llm)
    waiting: dict[str, dict[str, torch.Tensor | None]] = {}
    for name, tensor in tensors:
        match = _OF_A_LAYER.fullmatch(name)
        if match is None or match[1] not in layers:
            yield name, tensor
        elif match[2] == "base_layer.weight" or match[2].startswith("lora_"):
            prefix, part = match[1], match[2]
            parts = waiting.setdefault(prefix, {})
            parts[part] = tensor
            # All parts of a layer are there: its weight can be computed.
            if parts.keys() == _parts(layers[prefix]):
                weight = _merge(layers[prefix], waiting.pop(prefix), prefix)
                yield f"{prefix}.weight", weight
        else:  # a bias
            yield f"{match[1]}.{match[2].removeprefix('base_layer.')}", tensor
    assert not waiting, f"parts of {sorted(waiting)} are missing"


def _low_rank_layers(llm: Any) -> dict[str, Any]:
    layers = {}
    for name, module in llm.named_modules():
        if isinstance(module, LoraLayer):
            layers[name] = module
    return layers


def _parts(layer: Any) -> set[str]:
    """Names of what a low-rank layer's weight is merged of."""
    parts = set()
    for name, _ in layer.named_parameters():
        if name == "base_layer.weight" or name.startswith("lora_"):
            parts.add(name)
    return parts


def _merge(
    layer: Any, parts: dict[str, torch.Tensor | None], name: str
) -> torch.Tensor | None:
    """W + scale B A; for DoRA (arXiv 2402.09353) with each output's row at its learnt
    magnitude."""
    if type(layer.base_layer.weight).__name__ in _QUANTIZED:
        raise UserError(
            f"weights must not be quantized to be merged, but {name} is of 8 or 4 bits. "
            "Export the additions apart."
        )
    weight = parts.pop("base_layer.weight")
    if weight is None:
        return None
    short = {}
    for part, tensor in parts.items():
        if tensor is not None:
            short[part.split(".")[0]] = tensor.float()

    # O outputs, I inputs of the layer.
    turned = layer.fan_in_fan_out  # Conv1D holds (inputs, outputs)
    weight_OI = weight.float().T if turned else weight.float()
    (scale,) = layer.scaling.values()
    merged_OI = weight_OI + (short["lora_B"] @ short["lora_A"]) * scale
    if "lora_magnitude_vector" in short:
        norm_O = torch.linalg.norm(merged_OI, dim=1)
        merged_OI = (short["lora_magnitude_vector"] / norm_O)[:, None] * merged_OI
    whole: torch.Tensor = merged_OI.T if turned else merged_OI
    return whole.to(weight.dtype).contiguous()


def write_additions(folder: Path, tensors: NamedTensors, llm: Any, base: str) -> None:
    """Fill an empty folder that `peft.PeftModel.from_pretrained(base model, folder)` reads.

    adapter_config.json and adapter_model.safetensors hold the additions, and the other
    parameters that were trained, if any. tensors: as for `merged`, of trained parameters
    at least. base: the name or folder of the LLM that they belong to, written into the
    config.
    """
    trained = {name for name, p in llm.named_parameters() if p.requires_grad}
    state = {}
    for name, tensor in tensors:
        if tensor is not None and name in trained:
            state[name] = tensor.detach().cpu()

    # peft picks the low-rank tensors; the other trained parameters are written next to them.
    written = dict(
        get_peft_model_state_dict(llm, state_dict=state, save_embedding_layers=False)
    )
    for name, tensor in state.items():
        if ".lora_" not in name:
            written[name] = tensor

    # PeftModel finds the LLM below these two attributes.
    named = {f"base_model.model.{n}": t.contiguous() for n, t in written.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(llm.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)


def read_additions(folder: Path, llm: Any) -> None:
    """Put into a loaded LLM, in place, what `write_additions` wrote of it.

    Raises UserError where the folder is not whole or is of another LLM.
    """
    weights = Weights(folder, "adapter_model.safetensors")
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), llm)
        result: Any = set_peft_model_state_dict(llm, dict(weights))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the low-rank additions in {folder} must fit their LLM, but do not: {reason}"
        ) from error
    missing = [name for name in result.missing_keys if ".lora_" in name]
    wrong = [*missing, *result.unexpected_keys]
    if wrong:
        raise UserError(
            f"the low-rank additions in {folder} must fit their LLM, but {wrong[0]} does "
            "not."
        )
