"""Fragments of parameters and optimizer state: what one rank owns under ZeRO, by name.

ZeRO stores the fp32 master weights and the optimizer state of many parameters in flat
tensors, of which each rank owns a part. A fragment is the part of one parameter that this
rank owns. Fragments are the content of a checkpoint, because their names and positions
do not depend on the number of ranks or on the ZeRO stage.

This module is the only one that knows the attributes of DeepSpeed's optimizers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flallm_ds.errors import UserError

MASTER = (
    "master"  # the kind of the weights; other kinds are named as in the optimizer state
)
BUFFER = "buffer"  # the kind of persistent buffers, which every rank has completely

# Counters of a DeepSpeed engine that do not depend on the number of ranks. `micro_steps`
# does: restored at another number of ranks, it would shift the end of the accumulation.
_COUNTERS = ("global_steps", "skipped_steps")


@dataclass(frozen=True)
class Key:
    """The name of a fragment: elements `begin` to `end` of a flattened parameter."""

    kind: str
    parameter: str
    begin: int
    end: int


@dataclass(frozen=True)
class Slice:
    """A fragment of a parameter within a flat tensor of the optimizer."""

    parameter: str
    begin: int  # in the flattened parameter
    at: int  # in the flat tensor
    length: int

    def key(self, kind: str) -> Key:
        return Key(kind, self.parameter, self.begin, self.begin + self.length)


# Copies the elements of a key into a tensor of that length, if they were saved.
Read = Callable[[Key, torch.Tensor], None]


class Partition(ABC):
    """The fragments of this rank: `slices[n]` are in the n-th flat tensor.

    base: the optimizer that steps the flat tensors.
    """

    def __init__(
        self, engine: Any, slices: list[list[Slice]], base: torch.optim.Optimizer
    ) -> None:
        self.engine, self.slices, self.base = engine, slices, base

    def tensors(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a flat tensor and its optimizer state of the same shape, by their kind."""
        kinds = {MASTER: flat}
        for name, value in self.base.state[flat].items():
            if torch.is_tensor(value) and value.shape == flat.shape:
                kinds[name] = value
        return kinds

    def numbers(self, flat: torch.Tensor) -> dict[str, float]:
        """Return the other values of the optimizer state of a flat tensor: step counts."""
        kinds = self.tensors(flat)
        numbers = {}
        for name, value in self.base.state[flat].items():
            if name not in kinds and value is not None:
                numbers[name] = float(value)
        return numbers

    @abstractmethod
    @contextmanager
    def opened(self, number: int, *, write: bool) -> Iterator[torch.Tensor]:
        """Give access to a flat tensor and its state. write: both may be changed."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the master weights into the parameters of the module, on all ranks."""


class _Zero3(Partition):
    """ZeRO-3: each rank owns an equal part of every parameter, also on NVMe."""

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        optimizer = engine.optimizer
        rank = torch.distributed.get_rank()
        slices: list[list[Slice]] = [[] for _ in optimizer.fp32_partitioned_groups_flat]
        for group in optimizer.fp16_groups:
            for parameter in group:
                position = optimizer.grad_position[optimizer.get_param_id(parameter)]
                number, at, size = position
                # The last ranks may own padding only.
                begin = rank * size
                length = max(0, min(size, parameter.ds_numel - begin))
                name = names[id(parameter)]
                slices[number].append(Slice(name, begin, at, length))
        super().__init__(engine, slices, optimizer.optimizer)

    @contextmanager
    def opened(self, number: int, *, write: bool) -> Iterator[torch.Tensor]:
        optimizer = self.engine.optimizer
        is_swapped = optimizer._swappable_optimizer_subgroup(number)
        if is_swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        flat: torch.Tensor = optimizer.fp32_partitioned_groups_flat[number]
        yield flat
        if write:
            # The low-precision partition, in memory or on NVMe.
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if is_swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)

    def refresh(self) -> None:
        # Small parameters are not partitioned between steps: gather them again.
        persistent = self.engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


class _Zero12(Partition):
    """ZeRO-1 and ZeRO-2: each rank owns an equal part of every parameter group."""

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        optimizer = engine.optimizer
        # The first name is of ZeRO-1 and 2, the second of ZeRO-1 with bf16.
        if hasattr(optimizer, "bit16_groups"):
            groups, self._flat = optimizer.bit16_groups, "single_partition_of_fp32_groups"
        else:
            groups, self._flat = optimizer.bf16_groups, "fp32_groups_flat_partition"
        slices = []
        for group in groups:
            of_group = []
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # another rank owns the parameter
                    continue
                in_flat, in_parameter = (
                    mapping.hp_fragment_address,
                    mapping.lp_fragment_address,
                )
                name = names[id(parameter)]
                of_group.append(
                    Slice(name, in_parameter.start, in_flat.start, in_flat.numel)
                )
            slices.append(of_group)
        super().__init__(engine, slices, optimizer.optimizer)

    @contextmanager
    def opened(self, number: int, *, write: bool) -> Iterator[torch.Tensor]:
        flat: torch.Tensor = getattr(self.engine.optimizer, self._flat)[number]
        yield flat

    def refresh(self) -> None:
        self.engine.optimizer.update_lp_params()


class _Unpartitioned(Partition):
    """Without ZeRO: every rank has all parameters; rank 0 owns them."""

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self._parameters: list[nn.Parameter] = []
        slices = []
        for group in engine.optimizer.param_groups:
            for parameter in group["params"]:
                self._parameters.append(parameter)
                name = names[id(parameter)]
                slices.append([Slice(name, 0, 0, parameter.numel())])
        super().__init__(engine, slices, engine.optimizer)

    @contextmanager
    def opened(self, number: int, *, write: bool) -> Iterator[torch.Tensor]:
        yield self._parameters[number]

    def refresh(self) -> None:
        pass


def partition_of(engine: Any) -> Partition:
    """Return the fragments that this rank owns of what a DeepSpeed engine trains.

    Raises UserError for fp16 without ZeRO.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _Zero3(engine, names)
    if hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "bf16_groups"):
        return _Zero12(engine, names)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _Unpartitioned(engine, names)
    raise UserError(
        "zero_optimization.stage must be 1, 2 or 3 with fp16, got 0: no checkpoint could "
        "be saved. Use a file of ds_configs/."
    )


@torch.no_grad()
def fragments_of(engine: Any) -> Iterator[tuple[Key, torch.Tensor]]:
    """Yield the fragments of this rank, each copied to the host; rank 0 also the buffers."""
    partition = partition_of(engine)
    is_main = torch.distributed.get_rank() == 0
    for number, slices in enumerate(partition.slices):
        if isinstance(partition, _Unpartitioned) and not is_main:
            break
        with partition.opened(number, write=False) as flat:
            kinds = partition.tensors(flat)
            for part in slices:
                for kind, values in kinds.items():
                    if part.length:
                        yield part.key(kind), _copy(values, part)
    if is_main:
        for name, buffer in _persistent_buffers(engine.module):
            key = Key(BUFFER, name, 0, buffer.numel())
            yield key, buffer.detach().to("cpu", copy=True).reshape(-1)


@torch.no_grad()
def numbers_of(engine: Any) -> dict[str, float]:
    """Return the values that all ranks share: counters, the loss scale, and numbers of the
    optimizer state, such as the step of Adam."""
    numbers = {name: float(getattr(engine, name)) for name in _COUNTERS}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
        value = getattr(scaler, name, None)
        if value is not None:
            numbers[f"scaler.{name}"] = float(value)
    partition = partition_of(engine)
    for number in range(len(partition.slices)):
        with partition.opened(number, write=False) as flat:
            for name, value in partition.numbers(flat).items():
                numbers[f"state.{name}"] = value
    return numbers


@torch.no_grad()
def is_finite(engine: Any) -> bool:
    """Whether the fragments of this rank and all buffers are finite.

    The flat tensors are not checked completely: DeepSpeed does not initialise the padding
    at their end.
    """
    partition = partition_of(engine)
    for number, slices in enumerate(partition.slices):
        with partition.opened(number, write=False) as flat:
            tensors = partition.tensors(flat)
            for part in slices:
                for tensor in tensors.values():
                    own = tensor.detach().reshape(-1).narrow(0, part.at, part.length)
                    if not _is_finite(own):
                        return False
    return all(map(_is_finite, engine.module.buffers()))


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # aminmax makes no copy of the tensor, and returns NaN if there is one.
    ends = torch.aminmax(tensor.detach())
    return math.isfinite(ends.min) and math.isfinite(ends.max)


def num_bytes_of(engine: Any) -> int:
    """Return the size of the fragments of this rank, in bytes."""
    total = 0
    partition = partition_of(engine)
    for number in range(len(partition.slices)):
        with partition.opened(number, write=False) as flat:
            total += sum(tensor.nbytes for tensor in partition.tensors(flat).values())
    return total


def _copy(values: torch.Tensor, part: Slice) -> torch.Tensor:
    own = values.detach().reshape(-1).narrow(0, part.at, part.length)
    return own.to("cpu", copy=True)


@torch.no_grad()
def restore(engine: Any, kinds: list[str], numbers: dict[str, float], read: Read) -> None:
    """Load the fragments of this rank, from any number of ranks that wrote them.

    kinds: those of the checkpoint. numbers: as `numbers_of` returned them. Every rank must
    call this.
    """
    partition = partition_of(engine)
    base = partition.base
    for number, slices in enumerate(partition.slices):
        with partition.opened(number, write=True) as flat:
            state = base.state[flat]
            for kind in kinds:
                if kind == BUFFER:
                    continue
                if kind != MASTER and kind not in state:
                    state[kind] = torch.zeros_like(flat)
                values = (flat if kind == MASTER else state[kind]).data.view(-1)
                for part in slices:
                    if part.length:
                        read(part.key(kind), values.narrow(0, part.at, part.length))
            _restore_numbers(base, flat, state, numbers)
    partition.refresh()
    for name, buffer in _persistent_buffers(engine.module):
        read(Key(BUFFER, name, 0, buffer.numel()), buffer.view(-1))
    _restore_counters(engine, numbers)


def _restore_numbers(
    base: torch.optim.Optimizer,
    flat: torch.Tensor,
    state: dict[str, Any],
    numbers: dict[str, float],
) -> None:
    """Set the numbers of the optimizer state of one flat tensor, such as `step`."""
    for name, value in numbers.items():
        kind, _, key = name.partition(".")
        if kind != "state":
            continue
        old = state.get(key)
        if torch.is_tensor(old):
            old.fill_(value)
        elif isinstance(base, torch.optim.AdamW):  # before its first step
            state[key] = torch.tensor(value, dtype=torch.float32, device=flat.device)
        else:
            state[key] = int(value)  # of DeepSpeedCPUAdam


def _restore_counters(engine: Any, numbers: dict[str, float]) -> None:
    for name in _COUNTERS:
        setattr(engine, name, int(numbers[name]))
    accumulation = engine.gradient_accumulation_steps()
    engine.micro_steps = engine.global_steps * accumulation
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in numbers.items():
        kind, _, key = name.partition(".")
        if kind == "scaler" and hasattr(scaler, key):
            setattr(scaler, key, type(getattr(scaler, key))(value))


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    names = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in names:
            yield name, buffer
