"""Activation checkpointing: compute activations again in the backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from flallm_ds.errors import UserError


def checkpoint_llm(llm: Any) -> None:
    """Keep only the input of each layer. Raises UserError if that is not possible."""
    if not llm.supports_gradient_checkpointing:
        raise UserError(
            f"llm.checkpointing must be false for a {llm.config.model_type} model, which "
            "transformers cannot checkpoint, got true."
        )
    # transformers 6 renames the method; up to 5.22 only the old name exists.
    enable = getattr(llm, "activation_checkpointing_enable", None)
    enable = enable or llm.gradient_checkpointing_enable
    # The reentrant variant needs an input that requires gradients.
    enable({"use_reentrant": False})


def checkpoint_stages(backbone: nn.Module) -> None:
    """Keep only the input of each stage of an image encoder.

    Raises ValueError for an encoder without stages.
    """
    for stage in stages_of(backbone):
        _checkpoint_forward(stage)


def stages_of(backbone: nn.Module) -> list[nn.Module]:
    """Return the stages of an image encoder in order, without the stem and the pooling.

    Candidates are the outermost lists and sequences of several modules, and modules next to
    each other with numbered names (layer1 ... layer4). The candidate with the most
    parameters is returned. Raises ValueError for an encoder without candidates.
    """
    groups = list(_outermost_lists(backbone))
    # Modules with numbered names, by the name without the number.
    numbered: dict[str, list[nn.Module]] = {}
    for name, module in backbone.named_children():
        if name[-1:].isdigit():
            numbered.setdefault(name.rstrip("0123456789"), []).append(module)
    groups += numbered.values()
    # The stages hold nearly all weights of an encoder.
    several = (group for group in groups if len(group) > 1)
    stages = max(several, key=_size, default=[])
    if _size(stages) == 0:
        raise ValueError(f"{type(backbone).__name__} must have a list of stages, got none.")
    return stages


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the lists and sequences of several modules that are not part of another one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            yield list(child)
        else:
            yield from _outermost_lists(child)


def _size(modules: Iterable[nn.Module]) -> int:
    """Return the number of parameters."""
    total = 0
    for module in modules:
        total += sum(p.numel() for p in module.parameters())
    return total


def _checkpoint_forward(module: nn.Module) -> None:
    """Replace `module.forward` by one that keeps only its inputs in training."""
    forward = module.forward
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The contexts of the first and of the second forward pass.
        return nullcontext(), _keep_statistics(norms)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        # Without a backward pass there is nothing to save.
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # No early stop: hooks that ZeRO-3 has set behind the last modules must run.
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=contexts,
            early_stop=False,
            **kwargs,
        )

    module.forward = checkpointed


@contextmanager
def _keep_statistics(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Within the context, BatchNorm normalises by the batch but updates no statistics.

    The first forward pass has updated them; the second one must not do it again.
    """
    before: list[tuple[_BatchNorm, float | None, torch.Tensor | None]] = []
    for norm in norms:
        before.append((norm, norm.momentum, norm.num_batches_tracked))
        # A momentum of 0 leaves the statistics bit-identical. Without the counter nothing
        # is counted.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, counter in before:
            norm.momentum, norm.num_batches_tracked = momentum, counter
