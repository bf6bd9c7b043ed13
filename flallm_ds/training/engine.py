"""The wrapper around DeepSpeed: initialisation, steps, checkpoints, gathering of parameters.

No other module of the package imports DeepSpeed.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

if not torch.cuda.is_available():
    # Before the import, to avoid a warning of DeepSpeed in every process.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from flallm_ds.config import OptimConfig
from flallm_ds.dist import World, all_reduce_sum, set_timeouts
from flallm_ds.training.deepspeed_json import (
    operators,
    precision,
    read_json,
    scales_loss,
    zero_stage,
)
from flallm_ds.training.fragment_files import FragmentReader
from flallm_ds.training.fragments import (
    Key,
    fragments_of,
    is_finite,
    num_bytes_of,
    numbers_of,
    partition_of,
    restore,
)
from flallm_ds.training.frozen import check_digest, frozen_digest

MAX_SKIPPED = 100  # consecutive steps; the largest loss scale, 2**32, reaches 1 after 33
# Added to the active modules of a parameter, which DeepSpeed numbers from 0.
HELD = -1


# --- the JSON


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises UserError for keys that are unknown or reserved."""
    known = []
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        known += [field.alias or name, name]
    return read_json(path, known)


def model_loading(config: dict[str, Any]) -> Any:
    """Make `from_pretrained` partition parameters while it reads them, under ZeRO-3.

    The setting holds as long as the returned object is referenced.
    """
    return HfDeepSpeedConfig(config) if zero_stage(config) == 3 else None


# --- preparation


def _optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    lr, decay = optim.lr, optim.weight_decay
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, weight_decay=decay)
    betas = (optim.betas[0], optim.betas[1])
    if "cpu_adam" in operators(config, optim.name):
        bf16_states = config.get("bf16", {}).get("bf16_optimizer_states", False)
        offloading: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups,
            lr=lr,
            betas=betas,
            weight_decay=decay,
            adamw_mode=True,
            fp32_optimizer_states=not bf16_states,
        )
        return offloading
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay, fused=True)


def prepare() -> None:
    """Reduce the log output of DeepSpeed; on a CPU, disable its shared-memory collective.

    DeepSpeed would compile that collective; gloo's is fast enough. Call this before all
    other functions of this module: DeepSpeed decides when it first partitions a model.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A private attribute; it may be missing in other versions.
    operators = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(operators, dict) and not torch.cuda.is_available():
        operators["deepspeed_shm_comm"] = False


def load_operator(name: str) -> None:
    """Load a compiled operator of DeepSpeed, which builds it at its first use.

    name: as `deepspeed_json.operators` returns it.
    """
    builders = deepspeed.ops.op_builder
    builder = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}[name]
    getattr(builders, builder)().load(verbose=False)


class Engine:
    """A module that DeepSpeed trains.

    groups: one dict per parameter group, with "params" and "lr". config: a complete
    DeepSpeed config, as `build.engine.deepspeed_config` returns it.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        config: dict[str, Any],
        world: World,
    ) -> None:
        if zero_stage(config) == 3:
            # Gather the weights of a layer at once, not each matrix: this saves a third of
            # a step on two CPU ranks.
            layers = getattr(module.language_model, "_no_split_modules", None)
            kinds = {type(m).__name__ for m in module.modules()}
            names = sorted(kinds & set(layers or ()))
            if names:
                deepspeed.utils.set_z3_leaf_modules(module, names)
            _one_precision(module)
            # DeepSpeed moves parameters to the device, but no buffers.
            for buffer in module.buffers():
                buffer.data = buffer.data.to(world.device)
        self.world, self.config = world, config
        self._holds_all = False
        self._own_norm = float("nan")
        self._skipped_in_a_row = 0
        self._scales_loss = scales_loss(config)
        self.weight_decay = optim.weight_decay
        # The optimizer is ours, because the JSON cannot set learning rates per group.
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(groups, optim, config),
            config=config,
            dist_init_required=False,
        )
        set_timeouts()
        partition_of(self._engine)  # raises now if no checkpoint could be saved

    @property
    def module(self) -> Any:
        return self._engine.module

    @property
    def partitions_parameters(self) -> bool:
        return zero_stage(self.config) == 3

    def __call__(self, *inputs: Any) -> torch.Tensor:
        loss: torch.Tensor = self._engine(*inputs)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch.

        DeepSpeed averages over ranks: for a sum, multiply the loss by the world size.
        """
        self._engine.backward(loss, scale_wrt_gas=False)

    def micro_step_done(self, lrs: Sequence[float]) -> None:
        """End a micro-batch; the last micro-batch of a step makes the optimizer step.

        lrs: the learning rate of each parameter group. If a gradient is not finite, the
        step is skipped; see `is_stuck`.
        """
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            # Also the weight decay: a universal checkpoint mixes up the groups.
            group["lr"], group["weight_decay"] = lr, self.weight_decay
        is_step = self._engine.is_gradient_accumulation_boundary()
        if is_step and not hasattr(self._optimizer, "overflow"):
            # Without ZeRO, DeepSpeed does not check the gradient.
            self._own_norm = _norm(self.module.parameters())
            if not math.isfinite(self._own_norm) and not self._scales_loss:
                self._skipped_in_a_row += 1
                return
        # DeepSpeed raises when the loss scale cannot get any lower; treat that as stuck.
        before = self.skipped_steps
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            self._skipped_in_a_row = MAX_SKIPPED
            return
        if is_step:
            # The norm is unknown if the JSON disables it.
            is_known = self._engine.get_global_grad_norm() is not None
            is_bad = is_known and not math.isfinite(self.grad_norm())
            is_skipped = is_bad or self.skipped_steps > before
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0

    def grad_norm(self) -> float:
        """Return the gradient norm of the last step over all parameters, before clipping."""
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            return self._own_norm
        # DeepSpeed returns -1 if the norm is not finite.
        return float(norm) if norm >= 0 else float("nan")

    @property
    def is_stuck(self) -> bool:
        """Whether the optimizer makes no more steps because gradients are not finite.

        The value is the same on each rank. With loss scaling, some steps may overflow
        until the scale is low enough; without, a single step is enough.
        """
        return self._skipped_in_a_row >= (MAX_SKIPPED if self._scales_loss else 1)

    def is_finite(self) -> bool:
        """Whether the tensors of a checkpoint are finite on this rank."""
        return is_finite(self._engine)

    def grad_norms(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, float]:
        """Return the gradient norm of each group of parameters, before clipping.

        Frozen parameters count as 0. Every rank must call this with the same groups,
        after the last backward of a step and before `micro_step_done`. Gradients are
        gathered one parameter at a time.
        """
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        norms = {}
        for name, parameters in groups.items():
            square = 0.0
            for parameter in parameters:
                if not parameter.requires_grad:
                    continue
                gradient = deepspeed.utils.safe_get_full_grad(parameter)
                if gradient is not None:
                    square += gradient.double().square().sum().item()
            norms[name] = math.sqrt(square) / scale
        return norms

    def log_collectives(self, on: bool) -> dict[str, Any]:
        """Measure the collectives of DeepSpeed from now on, or end that and return them.

        Returns {kind: {bytes: count, latencies and bandwidths}}; empty at the begin. While
        it is on, each collective waits for the device.
        """
        deepspeed.comm.configure(enabled=on, prof_all=on)
        logger = deepspeed.comm.comm.comms_logger
        found = logger.log_all(print_log=False, return_dict=True) if not on else None
        logger.reset_data()
        return dict(found["summary"]) if found else {}

    def close(self) -> None:
        """Free the memory; the hooks of DeepSpeed would keep it until the process ends."""
        self._engine.destroy()

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    # --- checkpoints

    def fragments(self) -> Iterator[tuple[Key, torch.Tensor]]:
        """Yield what this rank owns of the trained parameters and the optimizer state.

        Each tensor is a copy on the host.
        """
        return fragments_of(self._engine)

    @property
    def num_fragment_bytes(self) -> int:
        return num_bytes_of(self._engine)

    def checkpoint_state(self) -> dict[str, Any]:
        """Return the plain values that belong to the fragments. Every rank must call this.

        Instead of frozen parameters, a digest of them is stored: a run loads them again
        from their source.
        """
        return {
            "numbers": numbers_of(self._engine),
            "frozen": self._frozen_digest,
            "precision": precision(self.config),
        }

    def load(self, reader: FragmentReader, state: dict[str, Any]) -> None:
        """Restore parameters, buffers, optimizer state and counters of a checkpoint.

        state: as `checkpoint_state` returned it. Any number of ranks may have written the
        fragments. Raises UserError if the frozen parameters differ from those of the run
        that wrote the checkpoint.
        """
        check_digest(reader.folder, state["frozen"], self._frozen_digest)
        restore(self._engine, reader.kinds, state["numbers"], reader.read)
        reader.close()

    @cached_property
    def _frozen_digest(self) -> str:
        """The digest of the frozen parameters; every rank must read this property."""
        return frozen_digest(self.module, self._gathered, self.world)

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Gather these parameters on every rank in a `with` block that all ranks enter."""
        enabled = self.partitions_parameters
        return deepspeed.zero.GatheredParameters(parameters, enabled=enabled)

    def state(
        self, trained_of: str | None = None
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield (name, tensor on the host) of each parameter and persistent buffer.

        Rank 0 gets the tensors, in the precision of the engine; the other ranks get None.
        Tied parameters are yielded once. trained_of: the name of a submodule from which
        only trained parameters are yielded. Every rank must exhaust the iterator, because
        all ranks gather each parameter; one is in memory at a time.
        """
        left_out = f"{trained_of}." if trained_of else None
        # One parameter at a time: under ZeRO-3 no rank has memory for the whole model.
        for name, parameter in self.module.named_parameters():
            if left_out and name.startswith(left_out) and not parameter.requires_grad:
                continue
            tensor = None
            with self._gathered([parameter]):
                if self.world.is_main:
                    tensor = parameter.detach().cpu().clone()
            yield name, tensor
        # Buffers are not partitioned; those outside the state dict are derived values.
        persistent = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in persistent and not (left_out and name.startswith(left_out)):
                yield name, buffer.detach().cpu().clone() if self.world.is_main else None

    @contextmanager
    def gathered(self, how: Literal["auto", "never"]) -> Iterator[None]:
        """Gather all parameters on every rank, so that a search need not do so per token.

        how: "auto" gathers if the parameters take at most half of the free memory of every
        rank.
        """
        parameters = [p for p in self.module.parameters() if hasattr(p, "ds_id")]
        if not parameters or how == "never" or not self._fit(parameters):
            yield
            return
        with ExitStack() as stack:
            for parameter in parameters:
                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
                # Mark the parameter as in use by a module; else the first module that has
                # used it would release it.
                parameter.ds_active_sub_modules.add(HELD)
            self._holds_all = True
            try:
                yield
            finally:
                self._holds_all = False
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(HELD)

    @property
    def searches_in_step(self) -> bool:
        """Whether all ranks must make the same number of forward passes in a search."""
        return self.partitions_parameters and self.world.size > 1 and not self._holds_all

    def _fit(self, parameters: Sequence[Any]) -> bool:
        # All ranks must decide alike: gathering is a collective operation.
        size = sum(p.ds_numel * p.element_size() for p in parameters)
        accelerator = deepspeed.accelerator.get_accelerator()
        sharers = self.world.local_size if self.world.device.type == "cpu" else 1
        too_large = size > accelerator.available_memory() / sharers / 2
        return all_reduce_sum([too_large], self.world)[0] == 0


def _one_precision(module: nn.Module) -> None:
    """Cast all parameters to the precision of those that were made under zero.Init.

    Adapters and LoRA layers are made outside zero.Init. DeepSpeed does not cast the
    parameters of a model that is already partitioned, and fails on mixed precisions.
    """
    precisions = set()
    others = []
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            continue
        if hasattr(parameter, "ds_id"):
            precisions.add(parameter.dtype)
        else:
            others.append(parameter)
    if len(precisions) != 1:
        return
    (precision,) = precisions
    for parameter in others:
        parameter.data = parameter.data.to(precision)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the norm over all gradients; not finite if any gradient is not finite."""
    norms = []
    for parameter in parameters:
        if parameter.grad is not None:
            norms.append(torch.linalg.vector_norm(parameter.grad.double()))
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
