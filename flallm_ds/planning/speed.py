"""Compute the time of a training step: arithmetic, network, host and disk.

Pt, Pf: trained and frozen parameters. N: ranks, M: hosts. All rates are assumptions that
the command line can change; a step never gets faster than its slowest part.
"""

from dataclasses import dataclass

from flallm_ds.planning.memory import CHECKPOINT_BYTES, Place, Zero
from flallm_ds.planning.sizes import ModelSize

# Operations of ResNet-18 for a frame of 224 x 224: 1.8 G multiply-adds.
ENCODER_FLOPS = 3.6e9
# Peak of dense bf16 in TFLOP/s and bandwidth between the GPUs of a host in GB/s, by GPU
# memory in GB: RTX 3090 on PCIe 4, A100 40 GB, L40S on PCIe 4, A100 80 GB, H200.
_GPUS = {24: (71.0, 20.0), 40: (312.0, 250.0), 48: (362.0, 20.0), 80: (312.0, 250.0)}
_LARGEST_GPU = (989.0, 400.0)


@dataclass(frozen=True)
class Rates:
    """Speeds of a cluster.

    flops: peak of a GPU, per second. efficiency: share of it that is reached. link: bytes
    per second between the GPUs of a host, network: between hosts, for each host. pcie:
    between a GPU and its host. dram: of a host. disk: to write checkpoints, for the
    cluster. nvme: of the local disk of a host.
    """

    flops: float
    efficiency: float
    link: float
    network: float
    pcie: float
    dram: float
    disk: float
    nvme: float


def default_rates(gpu_gb: float) -> tuple[float, float]:
    """Return (peak TFLOP/s, GB/s between GPUs) of a usual GPU with this memory."""
    for memory, rates in _GPUS.items():
        if gpu_gb <= memory:
            return rates
    return _LARGEST_GPU


@dataclass(frozen=True)
class Step:
    """The seconds of an optimizer step. other: CPU Adam, PCIe and NVMe."""

    compute: float
    network: float
    other: float
    overlap: bool

    @property
    def total(self) -> float:
        """Communication and arithmetic overlap if the JSON says so; the rest does not."""
        parts = (self.compute, self.network)
        return (max(parts) if self.overlap else sum(parts)) + self.other


def compute_s(
    size: ModelSize, num_tokens: float, num_frames: float, checkpointing: bool, rates: Rates
) -> float:
    """Return the seconds in which one GPU computes a micro-batch.

    num_tokens: that pass through the LLM. num_frames: that pass through the visual encoder.
    A multiply-add is 2 operations in the forward pass and 4 in the backward pass, 2 for
    frozen weights, which get no gradients; checkpointing repeats the forward pass.
    """
    per_token = 6.0 * size.trained + 4.0 * size.frozen
    if checkpointing:
        per_token += 2.0 * size.total
    operations = num_tokens * per_token + num_frames * ENCODER_FLOPS
    return operations / (rates.flops * rates.efficiency)


def network_bytes(size: ModelSize, zero: Zero, accumulation: int, num_ranks: int) -> float:
    """Return the bytes that each rank sends in a step of ring collectives.

    ZeRO-3 gathers all weights in the forward and in the backward pass of each micro-batch
    and reduces the gradients: accumulation * w (3 Pt + 2 Pf). ZeRO-2 reduces the gradients
    of each micro-batch and gathers the updated weights once; ZeRO-1 also reduces once, but
    as an all-reduce, which is twice the bytes.
    """
    trained, weight = size.trained, zero.weight
    if zero.stage == 3:
        volume = accumulation * weight * (3.0 * trained + 2.0 * size.frozen)
    elif zero.stage == 2:
        volume = accumulation * weight * trained + weight * trained
    else:
        volume = 2.0 * weight * trained + weight * trained
    return volume * (num_ranks - 1) / num_ranks


def bandwidth(num_nodes: int, num_gpus: int, rates: Rates) -> float:
    """Return the bytes per second of a ring: its slowest link.

    A ring enters each host once, so a rank can use the network of the host completely.
    """
    between_gpus = rates.link if num_gpus > 1 else float("inf")
    return min(between_gpus, rates.network) if num_nodes > 1 else between_gpus


def host_s(
    size: ModelSize,
    zero: Zero,
    accumulation: int,
    num_nodes: int,
    num_gpus: int,
    rates: Rates,
) -> float:
    """Return the seconds of a step for the optimizer on the host, PCIe and NVMe.

    CPU Adam reads and writes 28 bytes a trained parameter. Each rank copies its part of the
    weights to the GPU in both passes, and its gradients to the host and back.
    """
    ranks = num_nodes * num_gpus
    seconds = 0.0
    if zero.optimizer_at is not Place.DEVICE:
        seconds += 28.0 * size.trained / num_nodes / rates.dram
        copies = zero.gradient * (2 * accumulation - 1) + zero.weight
        seconds += copies * size.trained / ranks / rates.pcie
    if zero.weights_at is not Place.DEVICE:
        seconds += 2.0 * accumulation * zero.weight * size.total / ranks / rates.pcie
    if zero.optimizer_at is Place.NVME:
        moved = 2.0 * (zero.master + zero.moments) * size.trained
        seconds += moved / num_nodes / rates.nvme
    if zero.weights_at is Place.NVME:
        moved = 2.0 * accumulation * zero.weight * size.total + zero.weight * size.trained
        seconds += moved / num_nodes / rates.nvme
    return seconds


def checkpoint_bytes(size: ModelSize) -> float:
    """Return the size of a checkpoint; frozen weights are not in it."""
    return float(CHECKPOINT_BYTES * size.trained)


def write_s(size: ModelSize, rates: Rates) -> float:
    """Return the seconds in which all ranks write a checkpoint."""
    return checkpoint_bytes(size) / rates.disk
