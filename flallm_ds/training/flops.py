"""Estimate the FLOPs of a training step and the peak FLOPS of a GPU, for the MFU.

MFU (model FLOPs utilisation) = FLOPs of a step / (seconds * peak FLOPS of all devices).
The FLOPs of a step are an estimate:

- Language model and adapter: per parameter and token that passes it, 6 FLOPs if the
  parameter is trained (2 forward, 4 backward), 4 if it is frozen (the gradient passes
  through it), and 2 more with activation checkpointing. Visual tokens pass the adapter;
  visual tokens and target tokens pass a decoder-only LLM. Of an encoder-decoder, visual
  tokens pass the encoder, and target tokens the decoder. Target tokens pass the head.
- Visual encoder: its forward FLOPs per frame, measured once, times 3 if a part of it is
  trained, times 4 with activation checkpointing, times 1 if it is frozen.

Left out: attention scores, prompts, padding, the optimizer. Source of 6 FLOPs per
parameter and token: Kaplan et al. (arXiv 2001.08361), section 2.1.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flallm_ds.data.index import FeatureIndex
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.training.task import Task

# Peak FLOPS in bf16 with dense matrices, from the data sheets of NVIDIA. V100: in fp16.
# The first pattern that is found in the name of a device counts.
PEAK_FLOPS = (
    (r"\bB200\b", 2250e12),
    (r"\b(H100|H200) NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(H100|H200|GH200)\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bV100-PCIE\b", 112e12),
    (r"\bV100\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX A6000$", 154.8e12),
    # The end of the name, because "Laptop GPU" and "D" are slower.
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
)
# Attributes of the config of a mixture of experts, of which a token passes only some.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NUM_MEASURED = 8  # frames


@dataclass(frozen=True)
class StepFlops:
    """The FLOPs of a step, by the number of frames and of target tokens."""

    per_frame: float
    per_target: float

    def of(self, frames: float, targets: float) -> float:
        return self.per_frame * frames + self.per_target * targets


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOPS of a device; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """Return the peak FLOPS of a GPU by the name that its driver reports."""
    for pattern, flops in PEAK_FLOPS:
        if re.search(pattern, name):
            return flops
    return None


def step_flops(task: Task) -> StepFlops | None:
    """Return the FLOPs of a step; None for a mixture of experts.

    Every rank must call this, because ZeRO-3 gathers the weights of the visual encoder.
    """
    config, module = task.config, task.engine.module
    llm = module.language_model
    if any(getattr(llm.config, name, None) for name in _EXPERTS):
        return None
    visual = 0.0
    # Cached features were encoded before.
    if not isinstance(task.train.index, FeatureIndex):
        factor = 1
        if any(p.requires_grad for p in task.extractor.parameters()):
            factor = 4 if config.visual.checkpointing else 3
        visual = factor * frame_flops(task.extractor, config.data.crop_size)
    # Light-T is never checkpointed.
    again = config.llm.checkpointing and config.stage != "visual"
    language = language_flops(llm, again)
    adapter = token_flops(module.adapter.parameters(), again=False)
    return StepFlops(visual + adapter + language.per_frame, language.per_target)


@torch.no_grad()
def frame_flops(extractor: FeatureExtractor, crop_size: int) -> float:
    """Measure the FLOPs of a forward pass per frame."""
    device = next(extractor.parameters()).device
    pixels_NCHW = torch.zeros(NUM_MEASURED, 3, crop_size, crop_size, device=device)
    was_training = extractor.training
    # Else BatchNorm would change its statistics.
    extractor.eval()
    with FlopCounterMode(display=False) as counter:
        extractor(pixels_NCHW, torch.tensor([NUM_MEASURED]))
    extractor.train(was_training)
    return float(counter.get_total_flops()) / NUM_MEASURED


def language_flops(llm: Any, again: bool) -> StepFlops:
    """Return the FLOPs of a language model.

    again: whether forward passes are repeated (activation checkpointing).
    """
    words = llm.get_input_embeddings().weight
    output = llm.get_output_embeddings()
    head = [] if output is None else list(output.parameters())
    # Looking up a word costs no FLOPs; tied weights count as the head.
    left_out = {id(words), *map(id, head)}
    of_encoder = set()
    if llm.config.is_encoder_decoder:
        of_encoder = set(map(id, llm.get_encoder().parameters())) - left_out
    encoder, others = [], []
    for parameter in llm.parameters():
        if id(parameter) in of_encoder:
            encoder.append(parameter)
        elif id(parameter) not in left_out:
            others.append(parameter)
    per_other = token_flops(others, again)
    per_frame = token_flops(encoder, again) if of_encoder else per_other
    # The loss recomputes no head.
    return StepFlops(per_frame, per_other + token_flops(head, again=False))


def token_flops(parameters: Iterable[Any], again: bool) -> float:
    """Return the FLOPs of a training step per token that passes these parameters."""
    flops = 0.0
    for parameter in parameters:
        per_weight = (6 if parameter.requires_grad else 4) + (2 if again else 0)
        flops += per_weight * num_weights(parameter)
    return flops


def num_weights(parameter: Any) -> int:
    """Return the size of a parameter that may be partitioned by ZeRO-3 or in 4 bits."""
    # A partitioned parameter is empty here; one in 4 bits has two weights in a byte.
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
