"""The only file that imports DeepSpeed: initialisation, steps, checkpoints and gathers."""

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

if not torch.cuda.is_available():
    # Before the import: else DeepSpeed warns in every process that it had to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from flallm_ds.config import OptimConfig
from flallm_ds.dist import World, all_reduce_sum
from flallm_ds.errors import UserError
from flallm_ds.training.deepspeed_json import read_json, scales_loss, zero_stage
from flallm_ds.training.frozen import FROZEN, check_digest, frozen_digest, write_digest

STALE_S = 1800.0
MAX_SKIPPED = 100  # steps in a row; from the largest loss scale, 2**32, to 1 it takes 33
# among the modules that are busy with a parameter; DeepSpeed numbers its own from 0
HELD = -1

# What DeepSpeed's own checkpoint files hold besides tensors and plain containers.
CHECKPOINT_CLASSES = [
    ZeroStageEnum,
    fragment_address,
    loss_scaler.LossScaler,
    loss_scaler.DynamicLossScaler,
]


# --- the JSON


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises UserError for keys that DeepSpeed or this project refuses."""
    fields = DeepSpeedZeroConfig.model_fields
    aliases = [field.alias or name for name, field in fields.items()]
    return read_json(path, [*aliases, *fields])


def model_loading(config: dict[str, Any]) -> Any:
    """Make `from_pretrained` partition parameters as it reads them under ZeRO-3.

    It does so for as long as the returned object is alive.
    """
    return HfDeepSpeedConfig(config) if zero_stage(config) == 3 else None


# --- before the engine is made


def _optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    lr, decay = optim.lr, optim.weight_decay
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, weight_decay=decay)
    betas = (optim.betas[0], optim.betas[1])
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    offloaded = offload.get("device", "none") != "none"
    if offloaded and torch.cuda.is_available():
        offloading: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups,
            lr=lr,
            betas=betas,
            weight_decay=decay,
            adamw_mode=True,
            fp32_optimizer_states=not config.get("bf16", {}).get(
                "bf16_optimizer_states", False
            ),
        )
        return offloading
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay, fused=True)


def prepare() -> None:
    """Quieten DeepSpeed and, on a CPU, keep it from compiling its shared-memory collective.

    gloo's will do. Call before any other function here: the first that partitions a model
    decides.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A private name, which another version may lack.
    operators = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(operators, dict) and not torch.cuda.is_available():
        operators["deepspeed_shm_comm"] = False


def check_compilation_locks() -> None:
    """Raise UserError for the lock of a killed build, on which the next build would wait
    for ever.

    A lock younger than STALE_S may be of a build that is under way in another run.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    stale = [lock for lock in locks if time.time() - lock.stat().st_mtime > STALE_S]
    if stale:
        raise UserError(
            "no killed build of a DeepSpeed operator may have left its lock, but there is "
            f"an old one: {stale[0]}. Delete that file: the run would wait on it for ever."
        )


class Engine:
    """A module under DeepSpeed.

    groups: one dict a parameter group with "params" and "lr". config: what `complete`
    returned.
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
            # One gather a layer, not one a weight matrix: a third of the step on two CPU
            # ranks.
            layers = getattr(module.language_model, "_no_split_modules", None)
            kinds = {type(m).__name__ for m in module.modules()}
            names = sorted(kinds & set(layers or ()))
            if names:
                deepspeed.utils.set_z3_leaf_modules(module, names)
            _one_precision(module)
        self.world, self.config = world, config
        self._holds_all = False
        self._own_norm = float("nan")
        self._skipped_in_a_row = 0
        self._scales_loss = scales_loss(config)
        self.weight_decay = optim.weight_decay
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(groups, optim, config),
            config=config,
            dist_init_required=False,
        )

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
        """Add this micro-batch's gradients.

        DeepSpeed averages over ranks, so the loss must be multiplied by the world size.
        """
        self._engine.backward(loss, scale_wrt_gas=False)

    def micro_step_done(self, rates: Sequence[float]) -> None:
        """Close a micro-batch; at the last one of a step the optimizer moves.

        rates: the learning rate of each group. With a gradient that is not finite the
        optimizer does not move, and `is_stuck` may say so.
        """
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            # The weight decay, too: a universal checkpoint confuses the groups.
            group["lr"], group["weight_decay"] = rate, self.weight_decay
        is_step = self._engine.is_gradient_accumulation_boundary()
        if is_step and not hasattr(self._optimizer, "overflow"):
            # Without ZeRO nothing checks the gradient.
            self._own_norm = _norm(self.module.parameters())
            if not math.isfinite(self._own_norm) and not self._scales_loss:
                self._skipped_in_a_row += 1
                return
        before = self.skipped_steps
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            self._skipped_in_a_row = MAX_SKIPPED
            return
        if is_step:
            # The norm is unknown where the JSON turned it off.
            is_known = self._engine.get_global_grad_norm() is not None
            is_bad = is_known and not math.isfinite(self.grad_norm())
            is_skipped = is_bad or self.skipped_steps > before
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            return self._own_norm
        # -1 stands for what is not finite
        return float(norm) if norm >= 0 else float("nan")

    @property
    def is_stuck(self) -> bool:
        """Whether gradients that are not finite keep the optimizer from stepping.

        The same on each rank. A scaled loss may overflow until its scale has come down;
        without a scale a single step counts.
        """
        return self._skipped_in_a_row >= (MAX_SKIPPED if self._scales_loss else 1)

    def is_finite(self) -> bool:
        """Whether what a checkpoint holds is finite on this rank.

        That is weights, buffers and the optimizer's state.
        """
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        tensors = [getattr(p, "ds_tensor", p) for p in trained]
        tensors += self.module.buffers()
        for parameter, state in optimizer.state.items():
            tensors.append(parameter)
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        return all(map(_is_finite, tensors))

    def grad_norms(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, float]:
        """Norm of the step's gradient over each group of parameters, before clipping.

        Frozen parameters count as 0. Every rank must call it with the same groups, after
        the last backward of a step and before that micro-batch's `micro_step_done`.
        Gradients are gathered one parameter at a time.
        """
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        norms = {}
        for name, parameters in groups.items():
            trained = (p for p in parameters if p.requires_grad)
            gradients = map(deepspeed.utils.safe_get_full_grad, trained)
            squares = (g.double().square().sum().item() for g in gradients if g is not None)
            norms[name] = math.sqrt(sum(squares)) / scale
        return norms

    def close(self) -> None:
        """Free the memory, which DeepSpeed's hooks would keep for as long as the process
        lives."""
        self._engine.destroy()

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    def save(self, folder: Path) -> None:
        """Write every rank's shards into `folder`; training/checkpoint.py commits them.

        Frozen parameters are left out, a digest of them is put in: a run loads them from
        where it had them.
        """
        digest = self._frozen_digest
        try:
            self._engine.save_checkpoint(
                str(folder),
                tag="engine",
                save_latest=False,
                exclude_frozen_parameters=bool(digest),
            )
        except (OSError, RuntimeError):
            if self.world.size > 1:
                # DeepSpeed's last one, in which the other ranks would wait for ever.
                torch.distributed.barrier()
            raise
        if digest and self.world.is_main:
            write_digest(folder, digest)

    def load(self, folder: Path) -> None:
        """Restore parameters, optimizer and counters that `save` wrote.

        Nothing but plain data is unpickled. Raises UserError where the parameters that
        are frozen now are others than in the run that saved.
        """
        complete = not (folder / FROZEN).is_file()
        if not complete:
            check_digest(folder, self._frozen_digest)
        before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        # DeepSpeed asks torch.load for full unpickling.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        try:
            with torch.serialization.safe_globals(CHECKPOINT_CLASSES):
                path, _ = self._engine.load_checkpoint(
                    str(folder),
                    tag="engine",
                    load_module_strict=complete,
                )
        finally:
            if before is None:
                del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
            else:
                os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
        if path is None:
            raise UserError(
                f"the checkpoint must hold DeepSpeed's files, but does not: {folder}."
            )

    @cached_property
    def _frozen_digest(self) -> str:
        """Every rank must ask for it; see training/frozen.py."""
        return frozen_digest(self.module, self._gathered, self.world)

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Within it every rank holds these parameters whole; every rank must enter it."""
        enabled = self.partitions_parameters
        return deepspeed.zero.GatheredParameters(parameters, enabled=enabled)

    def state(
        self, trained_of: str | None = None
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, tensor on the host) of each parameter and persistent buffer.

        Tensors have the engine's precision; they come on rank 0, None on the others; tied
        parameters come once. trained_of: a module of which only the parameters that are
        trained come. Every rank must drive it to its end, since each parameter is
        gathered by all; one is held at a time.
        """
        left_out = f"{trained_of}." if trained_of else None
        for name, parameter in self.module.named_parameters():
            if left_out and name.startswith(left_out) and not parameter.requires_grad:
                continue
            tensor = None
            with self._gathered([parameter]):
                if self.world.is_main:
                    tensor = parameter.detach().cpu().clone()
            yield name, tensor
        persistent = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in persistent and not (left_out and name.startswith(left_out)):
                yield name, buffer.detach().cpu().clone() if self.world.is_main else None

    @contextmanager
    def gathered(self, how: Literal["auto", "never"]) -> Iterator[None]:
        """Within it every rank holds all parameters.

        So a search does not gather them again for every token. how: "auto", where they
        take at most half of the memory that is free on every rank.
        """
        parameters = [p for p in self.module.parameters() if hasattr(p, "ds_id")]
        if not parameters or how == "never" or not self._fit(parameters):
            yield
            return
        with ExitStack() as stack:
            for parameter in parameters:
                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
                # As if a module were always busy with it: else the first that is done
                # would let it go.
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
        """Whether ranks must make equally many forwards while sentences are searched for."""
        return self.partitions_parameters and self.world.size > 1 and not self._holds_all

    def _fit(self, parameters: Sequence[Any]) -> bool:
        size = sum(p.ds_numel * p.element_size() for p in parameters)
        accelerator = deepspeed.accelerator.get_accelerator()
        sharers = self.world.local_size if self.world.device.type == "cpu" else 1
        too_large = size > accelerator.available_memory() / sharers / 2
        return all_reduce_sum([too_large], self.world)[0] == 0


def _one_precision(module: nn.Module) -> None:
    """Give all parameters the precision of those that were made under zero.Init.

    Others, as of adapters and low-rank layers, were made after it. DeepSpeed casts no
    parameter of a model that is partitioned already, and fails on mixed ones.
    """
    numbers = [p for p in module.parameters() if p.is_floating_point()]
    precisions = {p.dtype for p in numbers if hasattr(p, "ds_id")}
    if len(precisions) != 1:
        return
    (precision,) = precisions
    for parameter in numbers:
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(precision)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Norm of all gradients together; not finite where one is not."""
    norms = [
        torch.linalg.vector_norm(p.grad.double()) for p in parameters if p.grad is not None
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # needs no copy of the tensor; NaN comes through
    ends = torch.aminmax(tensor.detach())
    return math.isfinite(ends.min) and math.isfinite(ends.max)
