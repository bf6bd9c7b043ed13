"""The only place that knows DeepSpeed: its configuration, initialisation, steps, checkpoints and gathers."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # else DeepSpeed warns in every process that it had to guess

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from flallm_ds.command import nearest
from flallm_ds.config import OptimConfig
from flallm_ds.dist import World, all_reduce_sum, gather_objects
from flallm_ds.errors import UserError

# Numbers that RunConfig owns: a second value in the JSON would be a second truth.
OWNED_BY_RUN = {
    "train_batch_size": "data.batch_clips",
    "train_micro_batch_size_per_gpu": "data.batch_clips and data.micro_batches",
    "gradient_accumulation_steps": "data.micro_batches",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.name",
    "scheduler": "optim.warmup",
    "steps_per_print": "train.log_every_s",
}
OWNED_BY_JSON = (
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "activation_checkpointing",
    "aio",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "checkpoint",
    "wall_clock_breakdown",
    "comms_logger",
)


STALE_S = 1800.0


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON whose every key is known and none is RunConfig's.

    DeepSpeed accepts an unknown top-level key in silence, so the check is ours. Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"train.deepspeed must be a DeepSpeed JSON, but there is no file {path}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} must be JSON, but {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, but does not.")
    _must_be_objects(config, ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types"), path)
    _must_be_objects(config.get("zero_optimization", {}), ("offload_param", "offload_optimizer"), path)
    for name in config:
        if name in OWNED_BY_RUN:
            raise UserError(f"{name} must not be in {path}: set --{OWNED_BY_RUN[name].split()[0]} instead.")
        if name not in OWNED_BY_JSON:
            raise UserError(f"{path} has an unknown key {name!r}: {nearest(name, OWNED_BY_JSON)}")
    if config.get("bf16", {}).get("check_grad_overflow", True) is not True:
        raise UserError(
            f"bf16.check_grad_overflow must be true in {path}, got "
            f"{json.dumps(config['bf16']['check_grad_overflow'])}: a gradient that is not finite would enter "
            "the weights. Remove it."
        )
    zero_fields = [f.alias or n for n, f in DeepSpeedZeroConfig.model_fields.items()]
    zero_fields += list(DeepSpeedZeroConfig.model_fields)
    for name in config.get("zero_optimization", {}):
        if name not in zero_fields:
            raise UserError(
                f"{path} has an unknown key zero_optimization.{name}: {nearest(name, zero_fields)}"
            )
    return dict(config)


def _must_be_objects(config: dict[str, Any], names: Iterable[str], path: Path) -> None:
    for name in names:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{name} must be a JSON object in {path}, but is {json.dumps(config[name])}.")


def for_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """The same ZeRO on a machine without a GPU: fp32, no pinned memory, tiny models really partitioned."""
    twin = {k: v for k, v in config.items() if k not in ("bf16", "fp16", "torch_autocast", "data_types")}
    zero = dict(twin.get("zero_optimization", {}))
    zero["overlap_comm"] = False
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            device = "none" if zero[part].get("device", "none") == "none" else "cpu"
            zero[part] = {**zero[part], "pin_memory": False, "device": device}
    zero.pop("zero_hpz_partition_size", None)  # of a node's GPUs
    if zero.get("stage") == 3:
        zero["stage3_param_persistence_threshold"] = 0
    twin["zero_optimization"] = zero
    # A CPU op is compiled at first use, for minutes, with a lock that outlives a killed build.
    twin["zero_force_ds_cpu_optimizer"] = False
    return twin


def complete(config: dict[str, Any], device: torch.device, accumulation: int, clip: float) -> dict[str, Any]:
    """The JSON with what RunConfig owns filled in, for this device."""
    config = config if device.type == "cuda" else for_cpu(config)
    return {
        "zero_force_ds_cpu_optimizer": False,  # it would refuse SGD; of AdamW we take its own (`_optimizer`)
        **config,
        "train_micro_batch_size_per_gpu": 1,  # a micro-batch is one packed batch, whatever its clips
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


# Lowest learning rate for master weights of 8 and of 11 significant bits, by the flag that asks for them.
# Adam moves a weight by about the learning rate, and a bf16 weight of 0.05 does not move by less than 1.2e-4:
# at 1e-5, 85 % of an LLM's weights never move.
_LOWEST_RATES = {"bf16_master_weights_and_grads": 1e-4, "fp16_master_weights_and_grads": 1e-4 / 8}


def lowest_rate(config: dict[str, Any]) -> tuple[str, float] | None:
    """(flag, learning rate below which the JSON loses most updates); None where master weights are fp32."""
    for flag, rate in _LOWEST_RATES.items():
        precision = flag[:4]
        if config.get(precision, {}).get(flag):
            return f"{precision}.{flag}", rate
    return None


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def model_loading(config: dict[str, Any]) -> Any:
    """Keep the returned object alive while `from_pretrained` runs: under ZeRO-3 it partitions as it reads."""
    if zero_stage(config) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def _optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, config: dict[str, Any]
) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    betas = (optim.betas[0], optim.betas[1])
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    offloaded = offload.get("device", "none") != "none"
    if offloaded and torch.cuda.is_available():
        offloading: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups,
            lr=optim.lr,
            betas=betas,
            weight_decay=optim.weight_decay,
            adamw_mode=True,
            fp32_optimizer_states=not config.get("bf16", {}).get("bf16_optimizer_states", False),
        )
        return offloading
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=True)


def prepare() -> None:
    """Quieten DeepSpeed and, on a CPU, keep it from compiling its shared-memory collective (gloo will do).

    Call before any other function here: the first one that partitions a model decides.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    operators = getattr(deepspeed.ops, "__compatible_ops__", None)  # a private name, so only if it is there
    if isinstance(operators, dict) and not torch.cuda.is_available():
        operators["deepspeed_shm_comm"] = False


def check_compilation_locks() -> None:
    """Raise UserError for a lock left by a killed build, on which the next build would wait for ever.

    A lock younger than STALE_S may be of a build that is under way in another run.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    stale = [lock for lock in locks if time.time() - lock.stat().st_mtime > STALE_S]
    if stale:
        raise UserError(
            "no killed build of a DeepSpeed operator may have left its lock, but there is an old one: "
            f"{stale[0]}. Delete that file: the run would wait on it for ever."
        )


FROZEN = "engine/frozen.json"  # of a checkpoint
MAX_SKIPPED = 100  # steps in a row; from the largest loss scale, 2**32, to 1 it takes 33
HELD = -1  # among the modules that are busy with a parameter; DeepSpeed numbers its own from 0


class Engine:
    """A module under DeepSpeed.

    groups: one dict a parameter group with "params" and "lr". config: what `complete` returned.
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
            # One gather a layer instead of one a weight matrix: a third of the step on two CPU ranks.
            layers = getattr(module.language_model, "_no_split_modules", None)
            names = sorted({type(m).__name__ for m in module.modules()} & set(layers or ()))
            if names:
                deepspeed.utils.set_z3_leaf_modules(module, names)
            _one_precision(module)
        self.world, self.config = world, config
        self._holds_all = False
        self._digest: str | None = None  # of the frozen parameters, once it is known
        self._own_norm = float("nan")
        self._skipped_in_a_row = 0
        autocast = config.get("torch_autocast", {})
        self._scales_loss = config.get("fp16", {}).get("enabled", False) or (
            autocast.get("enabled", False) and "float16" in str(autocast.get("dtype", "bfloat16")).split(".")
        )
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
        """Add this micro-batch's gradients; DeepSpeed averages over ranks, so scale by the world size."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def micro_step_done(self, rates: Sequence[float]) -> None:
        """Close a micro-batch; at the last one of a step the optimizer moves at these rates, one a group.

        With a gradient that is not finite it does not move, and `is_stuck` may say so.
        """
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"], group["weight_decay"] = rate, self.weight_decay  # a universal load confuses groups
        is_step = self._engine.is_gradient_accumulation_boundary()
        if is_step and not hasattr(self._optimizer, "overflow"):
            self._own_norm = _norm(self.module.parameters())  # without ZeRO nothing checks it
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
            is_known = self._engine.get_global_grad_norm() is not None  # else the JSON turned it off
            is_bad = is_known and not math.isfinite(self.grad_norm())
            is_skipped = is_bad or self.skipped_steps > before
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            return self._own_norm
        return float(norm) if norm >= 0 else float("nan")  # DeepSpeed has -1 for what is not finite

    @property
    def is_stuck(self) -> bool:
        """Whether gradients that are not finite keep the optimizer from stepping; the same on each rank.

        A scaled loss may overflow until its scale has come down; without a scale a single step counts.
        """
        return self._skipped_in_a_row >= (MAX_SKIPPED if self._scales_loss else 1)

    def is_finite(self) -> bool:
        """Whether what a checkpoint holds is finite on this rank: weights, buffers, the optimizer's state."""
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        tensors = [getattr(p, "ds_tensor", p) for p in trained]
        tensors += self.module.buffers()
        for parameter, state in optimizer.state.items():
            tensors += [parameter, *(value for value in state.values() if torch.is_tensor(value))]
        return all(map(_is_finite, tensors))

    def grad_norms(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, float]:
        """Norm of the step's gradient over each group of parameters, before clipping; frozen ones count as 0.

        Every rank must call it with the same groups, after the last backward of a step and before that
        micro-batch's `micro_step_done`. Gradients are gathered one parameter at a time.
        """
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        norms = {}
        for name, parameters in groups.items():
            gradients = (deepspeed.utils.safe_get_full_grad(p) for p in parameters if p.requires_grad)
            squares = (g.double().square().sum().item() for g in gradients if g is not None)
            norms[name] = math.sqrt(sum(squares)) / scale
        return norms

    def close(self) -> None:
        """Let go of the memory, which DeepSpeed's hooks would keep for as long as the process lives."""
        self._engine.destroy()

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    def save(self, folder: Path) -> None:
        """Every rank writes its shards into `folder`; nothing is committed (see training/checkpoint.py).

        Frozen parameters are left out, a digest of them is put in: a run loads them from where it had them.
        """
        digest = self._frozen_digest()
        try:
            self._engine.save_checkpoint(
                str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=bool(digest)
            )
        except (OSError, RuntimeError):
            if self.world.size > 1:
                torch.distributed.barrier()  # its last one, in which the other ranks would wait for ever
            raise
        if digest and self.world.is_main:
            (folder / FROZEN).write_text(json.dumps({"sha256": digest}) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Restore parameters, optimizer and counters that `save` wrote, unpickling nothing but plain data.

        Raises UserError where the parameters that are frozen now are others than in the run that saved.
        """
        complete = not (folder / FROZEN).is_file()
        if not complete:
            self._check_frozen(folder)
        before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks torch.load for full unpickling
        try:
            with torch.serialization.safe_globals(_checkpoint_classes()):
                path, _ = self._engine.load_checkpoint(str(folder), tag="engine", load_module_strict=complete)
        finally:
            if before is None:
                del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
            else:
                os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
        if path is None:
            raise UserError(f"the checkpoint must hold DeepSpeed's files, but does not: {folder}.")

    def _check_frozen(self, folder: Path) -> None:
        saved = json.loads((folder / FROZEN).read_text(encoding="utf-8"))["sha256"]
        if self._frozen_digest() != saved:
            raise UserError(
                f"the frozen parameters must be those with which {folder} was saved, but are others. Give "
                "the LLM, the visual encoder and the DeepSpeed JSON of then, or start another run."
            )

    def _frozen_digest(self) -> str:
        """sha256 over names, shapes and values of the frozen parameters; empty where none is frozen.

        It does not depend on the number of ranks, each of which reads a part; every rank must call it.
        """
        if self._digest is None:
            own: dict[str, str] = {}
            frozen = [(n, p) for n, p in self.module.named_parameters() if not p.requires_grad]
            for number, (name, parameter) in enumerate(frozen):
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.partitions_parameters):
                    if number % self.world.size == self.world.rank:
                        own[name] = _sha256(parameter)
            of_all = sorted(item for part in gather_objects(own, self.world) for item in part.items())
            self._digest = hashlib.sha256(json.dumps(of_all).encode()).hexdigest() if of_all else ""
        return self._digest

    def state(self, trained_of: str | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, tensor on the host) of each parameter and persistent buffer, in the engine's precision.

        trained_of: a module of which only the parameters that are trained come.
        Every rank must drive it to its end, since each parameter is gathered by all; one is held at a time.
        Tensors come on rank 0, None on the others; tied parameters come once.
        """
        left_out = f"{trained_of}." if trained_of else None
        for name, parameter in self.module.named_parameters():
            if left_out and name.startswith(left_out) and not parameter.requires_grad:
                continue
            tensor = None
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.partitions_parameters):
                if self.world.is_main:
                    tensor = parameter.detach().cpu().clone()
            yield name, tensor
        persistent = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in persistent and not (left_out and name.startswith(left_out)):
                yield name, buffer.detach().cpu().clone() if self.world.is_main else None

    @contextmanager
    def gathered(self, how: Literal["auto", "never"]) -> Iterator[None]:
        """Within it every rank holds all parameters: a search does not gather them again for every token.

        how: "auto", where they take at most half of the memory that is free on every rank.
        """
        parameters = [p for p in self.module.parameters() if hasattr(p, "ds_id")]
        if not parameters or how == "never" or not self._fit(parameters):
            yield
            return
        with ExitStack() as stack:
            for parameter in parameters:
                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
                # As if a module were always busy with it, else the first one that is done would let it go.
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
        """Whether every rank must make as many forwards as the others while sentences are searched for."""
        return self.partitions_parameters and self.world.size > 1 and not self._holds_all

    def _fit(self, parameters: Sequence[Any]) -> bool:
        size = sum(p.ds_numel * p.element_size() for p in parameters)
        accelerator = deepspeed.accelerator.get_accelerator()
        sharers = self.world.local_size if self.world.device.type == "cpu" else 1
        too_large = size > accelerator.available_memory() / sharers / 2
        return all_reduce_sum([too_large], self.world)[0] == 0


def _one_precision(module: nn.Module) -> None:
    """Give what was made after zero.Init (adapters, low-rank layers) the precision of what was made under it.

    DeepSpeed casts no parameter of a model that is partitioned already, and fails on mixed ones.
    """
    partitioned = {p.dtype for p in module.parameters() if hasattr(p, "ds_id") and p.is_floating_point()}
    if len(partitioned) != 1:
        return
    (precision,) = partitioned
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
            parameter.data = parameter.data.to(precision)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Norm of all gradients together; not finite where one is not."""
    norms = [torch.linalg.vector_norm(p.grad.double()) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    ends = torch.aminmax(tensor.detach())  # needs no copy of the tensor; NaN comes through
    return math.isfinite(ends.min) and math.isfinite(ends.max)


def _sha256(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {hashlib.sha256(values.data).hexdigest()}"


def _checkpoint_classes() -> list[Any]:
    """What DeepSpeed's own checkpoint files hold besides tensors and plain containers."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, fragment_address, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler]
