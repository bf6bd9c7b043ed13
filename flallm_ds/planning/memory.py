"""Compute the memory of a run in stage llm: bytes per GPU, per host and on NVMe.

The formulas follow what DeepSpeed 0.19.8 allocates; each names the place in its sources.
Pt, Pf: trained and frozen parameters. N: ranks. w: bytes of a weight in the forward pass.
The visual encoder is outside the engine and counted by `encoder_bytes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flallm_ds.planning.sizes import ModelSize
from flallm_ds.training.deepspeed_json import for_cpu, zero_stage

GB = 1e9
# A CUDA context, the libraries and the buffers of NCCL: 0.5 to 2 GB on current GPUs.
CONTEXT_BYTES = 1.5 * GB
# Share of a GPU that PyTorch's allocator can use, because of fragmentation.
USABLE = 0.92
# Resident memory of a rank before it loads a model, with all imports: measured 0.79 GB.
PROCESS_BYTES = 0.8 * GB
# What libraries add until the first step, such as lazy imports and threads: measured.
FIRST_STEP_BYTES = 0.1 * GB
# Copies of a gathered weight on a CPU, besides the weight: the flat tensor of the collective
# and gloo's own. glibc keeps freed blocks below 32 MB, so both count for all layers. This
# is within -2 and +7 % of the memory of five LLMs with 65 to 125 M parameters.
_GLOO_COPIES = 2
# A checkpoint stores the fp32 weight and both moments of Adam of a trained parameter.
CHECKPOINT_BYTES = 12
# Elements of a bucket of buffered_allreduce_fallback of engine.py; no JSON sets it.
_ALLREDUCE_BUCKET = 500_000_000
# Bytes of a stored weight under bitsandbytes, with the constants of its blocks (64 values
# of 4 bits share one fp32 constant).
_QUANTIZED = {8: 1.0, 4: 0.5 + 4 / 64}


class Place(Enum):
    """Where a tensor is stored."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed JSON says about memory; sizes of buckets are in elements.

    weight, master, moments, gradient: bytes per parameter of the weights in the forward
    pass, the master weights, both moments of Adam, and the accumulated gradients.
    """

    stage: int
    weight: int
    master: int
    moments: int
    gradient: int
    optimizer_at: Place
    weights_at: Place
    pinned: bool
    bucket: int
    overlap: bool
    live: int
    prefetch: int
    sub_group: int
    nvme_buffers: float = 0.0  # bytes of a rank's pinned buffers

    @classmethod
    def of(cls, config: Mapping[str, Any], device: str) -> "Zero":
        """Read a DeepSpeed JSON. device: cuda, or cpu: fp32 without pinned memory."""
        config = for_cpu(dict(config)) if device == "cpu" else config
        zero = config.get("zero_optimization", {})
        low = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        weight = 2 if low else 4
        bf16 = config.get("bf16", {})
        accumulation = config.get("data_types", {}).get("grad_accum_dtype", "")
        param, optimizer = (zero.get(f"offload_{x}", {}) for x in ("param", "optimizer"))
        return cls(
            stage=zero_stage(dict(config)),
            weight=weight,
            master=2 if bf16.get("bf16_master_weights_and_grads") else 4,
            moments=4 if bf16.get("bf16_optimizer_states") else 8,
            gradient=4 if accumulation == "fp32" else weight,
            optimizer_at=_place(optimizer),
            weights_at=_place(param),
            pinned=bool(optimizer.get("pin_memory", False)),
            # The defaults of DeepSpeed.
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            overlap=bool(zero.get("overlap_comm", False)),
            live=_live(zero),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            nvme_buffers=weight
            * param.get("buffer_count", 5)
            * param.get("buffer_size", 1e8)
            if _place(param) is Place.NVME
            else 0.0,
        )


def _place(offload: Mapping[str, Any]) -> Place:
    places = {"cpu": Place.HOST, "nvme": Place.NVME}
    return places.get(offload.get("device", "none"), Place.DEVICE)


def _live(zero: Mapping[str, Any]) -> int:
    """Return how many parameters ZeRO-3 keeps gathered, if the model has more.

    A layer is released in the forward pass if the backward pass needs it again only after
    max_reuse_distance parameters: the last half of that distance stays.
    """
    reuse = int(zero.get("stage3_max_reuse_distance", 1e9))
    most = int(zero.get("stage3_max_live_parameters", 1e9))
    return min(most, reuse // 2)


@dataclass(frozen=True)
class Work:
    """What a micro-batch needs on its device, in bytes.

    activations: saved for the backward pass. loss: logits and their gradients. encoder: the
    frozen visual encoder and its feature maps.
    """

    activations: float
    loss: float
    encoder: float = 0.0

    @property
    def total(self) -> float:
        return self.activations + self.loss + self.encoder


@dataclass(frozen=True)
class Part:
    """A kind of tensors of one rank. name: as the tables show it."""

    name: str
    place: Place
    bytes: float


def states(size: ModelSize, zero: Zero, num_ranks: int, bits: int = 16) -> list[Part]:
    """Return what a rank stores between steps. bits: of a frozen weight under LoRA."""
    trained, frozen = size.trained, size.frozen
    quantized = size.linear * (_QUANTIZED.get(bits, zero.weight) - zero.weight)
    frozen_bytes = zero.weight * frozen + quantized
    weights = zero.weight * trained + frozen_bytes
    own = trained / num_ranks  # trained parameters that this rank updates
    at = zero.optimizer_at
    on_device = at is Place.DEVICE
    # DeepSpeed accumulates gradients on the host also where the states are on NVMe.
    gradients_at = Place.DEVICE if on_device else Place.HOST
    parts = []
    if zero.stage == 3:
        parts.append(Part("weights", zero.weights_at, weights / num_ranks))
        # grad_partitions_flat_buffer of stage3.py
        parts.append(Part("gradients", gradients_at, zero.gradient * own))
        # fp32_partitioned_groups_flat[i].grad: all groups at once, or one at a time
        step = own if at is Place.HOST else min(own, zero.sub_group)
        parts.append(Part("gradients of the step", gradients_at, zero.master * step))
    else:
        parts.append(Part("weights", Place.DEVICE, weights))
        if zero.stage == 1 and zero.weight == 2 and on_device:
            # fp32_groups_gradients_flat of bf16_optimizer.py is not split.
            parts.append(Part("gradients", Place.DEVICE, zero.gradient * trained))
        else:
            # averaged_gradients of stage_1_and_2.py, and their flat copy in the step
            parts.append(Part("gradients", gradients_at, zero.gradient * own))
            parts.append(Part("gradients of the step", gradients_at, zero.master * own))
        if not on_device:
            # param_buffer_of_bit16_for_cpu_offload_groups
            parts.append(Part("updated weights", Place.HOST, zero.weight * own))
    # Without offload, fp32 weights are their own master weights under ZeRO-3.
    shared = zero.stage == 3 and on_device and zero.weight == zero.master
    parts.append(Part("master weights", at, 0.0 if shared else zero.master * own))
    parts.append(Part("optimizer states", at, zero.moments * own))
    if zero.nvme_buffers or at is Place.NVME:
        # Four tensors of a sub-group, twice, because reads and writes are pipelined.
        swapped = 8 * 4 * min(own, zero.sub_group) if at is Place.NVME else 0.0
        parts.append(Part("NVMe buffers", Place.HOST, zero.nvme_buffers + swapped))
    return parts


def buffers(size: ModelSize, zero: Zero, num_ranks: int, device: str) -> list[Part]:
    """Return what communication needs on the device of a rank, at most."""
    weight = zero.weight
    # The bucket is filled with gradients. On a CPU only used pages are resident.
    bucket = min(zero.bucket, size.trained) if device == "cpu" else zero.bucket
    doubled = 2 if zero.stage == 2 and zero.overlap else 1
    parts = [Part("gradient bucket", Place.DEVICE, float(weight * bucket * doubled))]
    # Gradients that are not in the bucket yet, or are too large for it.
    waiting = max(size.largest_trained, min(bucket, size.trained))
    parts.append(Part("new gradients", Place.DEVICE, float(weight * waiting)))
    if zero.stage == 1 and weight == 2:
        # allreduce_bucket of engine.py: the fp32 gradients of a bucket in one flat tensor,
        # and a copy in bf16.
        reduced = min(_ALLREDUCE_BUCKET, size.trained)
        flat = float((zero.gradient + weight) * reduced)
        parts.append(Part("flat tensors of collectives", Place.DEVICE, flat))
    if zero.stage != 3:
        return parts
    gathered = min(size.total, zero.live + size.largest)
    parts.append(Part("gathered weights", Place.DEVICE, float(weight * gathered)))
    if device == "cpu":
        flat = _GLOO_COPIES * weight * float(gathered)
    else:
        # A flat tensor for the layer that is gathered, and one for the prefetched layers
        # (_all_gather_dtype of partition_parameters.py); in the backward pass a flat tensor
        # of the gradients, and the part of this rank (reduce_scatter_coalesced).
        gathering = min(zero.prefetch, size.total) + size.largest
        flat = weight * max(float(gathering), (1 + 1 / num_ranks) * waiting)
    parts.append(Part("flat tensors of collectives", Place.DEVICE, flat))
    return parts


@dataclass(frozen=True)
class Need:
    """Bytes of one rank by kind: on its device, in host memory, on NVMe."""

    parts: tuple[Part, ...]

    def at(self, place: Place) -> float:
        return sum(part.bytes for part in self.parts if part.place is place)

    def named(self, place: Place) -> dict[str, float]:
        """Return the bytes of each kind at a place, without zeros."""
        found: dict[str, float] = {}
        for part in self.parts:
            if part.place is place and part.bytes:
                found[part.name] = found.get(part.name, 0.0) + part.bytes
        return found


def need_of(
    size: ModelSize, zero: Zero, num_ranks: int, work: Work, device: str, bits: int = 16
) -> Need:
    """Return the memory of a rank. On a CPU, everything is in host memory."""
    parts = states(size, zero, num_ranks, bits) + buffers(size, zero, num_ranks, device)
    parts.append(Part("activations", Place.DEVICE, work.activations))
    parts.append(Part("loss", Place.DEVICE, work.loss))
    parts.append(Part("visual encoder", Place.DEVICE, work.encoder))
    parts.append(Part("process", Place.HOST, PROCESS_BYTES + FIRST_STEP_BYTES))
    if device == "cuda":
        parts.append(Part("CUDA context", Place.DEVICE, CONTEXT_BYTES))
    pinned = []
    for part in parts:
        place, size_ = part.place, part.bytes
        if device == "cpu" and place is Place.DEVICE:
            place = Place.HOST
        if zero.pinned and device == "cuda" and place is Place.HOST:
            size_ = pinned_bytes(part.name, size_, zero)
        pinned.append(Part(part.name, place, size_))
    return Need(tuple(pinned))


def pinned_bytes(name: str, size: float, zero: Zero) -> float:
    """Return what PyTorch allocates for a pinned buffer: the next power of two.

    Flat buffers are one allocation, gradients of the step one for each sub-group.
    """
    if name in ("weights", "gradients", "updated weights"):
        return power_of_two(size)
    if name == "gradients of the step" and size:
        group = zero.master * zero.sub_group
        whole, rest = divmod(size, group)
        return whole * power_of_two(group) + power_of_two(rest)
    return size


def power_of_two(size: float) -> float:
    """Return the next power of two, 0 for 0."""
    return float(1 << max(0, int(-(-size // 1)) - 1).bit_length()) if size else 0.0


def loss_bytes(
    size: ModelSize, num_tokens: int, how: str, weight: int, chunk_bytes: int, small: int
) -> float:
    """Return what the loss needs at its highest: logits, their log-softmax and gradients.

    how: as llm.loss; auto takes chunks if the fp32 logits have more than `small` bytes.
    chunk_bytes: of the fp32 logits of a chunk. weight: w.
    """
    logits = 4.0 * num_tokens * size.vocab_size
    if how == "logits" or (how == "auto" and logits <= small):
        # In w bytes and in fp32; then the log-softmax and its gradient, all in fp32.
        return 3 * logits + (0 if weight == 4 else weight / 4 * logits)
    # The same for a chunk, and the gradients of all hidden states and of the head, whose
    # sum is fp32 and is cast at the end.
    hidden = weight * num_tokens * size.width
    return (
        3 * min(chunk_bytes, logits)
        + hidden
        + size.head * (4 + (weight if weight < 4 else 0))
    )


def encoder_bytes(num_frames: int, crop: int, width: int, weight: int) -> float:
    """Return the memory of a frozen ResNet-18 and its temporal module on a device.

    num_frames: encoded at a time. width: channels of the stem. weight: 2 under autocast.
    The stem's output, a quarter of the pixels by `width` channels, is the largest map; it
    exists three times: before and after BatchNorm, and after ReLU.
    """
    parameters = 4 * (11.2e6 * (width / 64) ** 2 + 3 * 512**2)
    pixels = 3 * crop**2 * (4 + weight)
    maps = 3 * weight * width * (crop / 2) ** 2
    return parameters + num_frames * (pixels + maps)


# --- DeepSpeed's own estimators


def deepspeed_estimate(
    size: ModelSize, zero: Zero, gpus_per_node: int, num_nodes: int
) -> tuple[float, float]:
    """Return (bytes per GPU, bytes per host) of DeepSpeed's own estimators.

    The formulas of estimate_zero2_ and estimate_zero3_model_states_mem_needs of DeepSpeed
    0.19.8, with their factor of 1.5 for buffers. They count all parameters as trained, and
    neither buckets nor activations. They are copied, because importing DeepSpeed takes ten
    seconds; a test compares them.
    """
    total, ranks = size.total, gpus_per_node * num_nodes
    offloads = zero.optimizer_at is not Place.DEVICE
    if zero.stage < 3:
        if offloads:
            return 2.0 * total, total * max(4 * ranks, 16) * 1.5
        return 2.0 * total + 18 * total / ranks, total * 4 * gpus_per_node * 1.5
    largest = 4.0 * size.largest
    if not offloads:
        return largest + 18 * total / ranks, size.largest * 4 * gpus_per_node * 1.5
    if zero.weights_at is Place.DEVICE:
        return largest + 2 * total / ranks, total * 16 / num_nodes * 1.5
    return largest, total * 18 / num_nodes * 1.5
