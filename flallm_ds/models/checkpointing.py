"""Activation checkpointing: what a layer computes is dropped, and computed again for
gradients."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from flallm_ds.errors import UserError


def checkpoint_llm(llm: Any) -> None:
    """Keep only each layer's input. Raises UserError where transformers cannot do so."""
    if not llm.supports_gradient_checkpointing:
        raise UserError(
            f"llm.checkpointing must be false for a {llm.config.model_type} model, which "
            "cannot do it, but is true."
        )
    # The name changes with transformers 6; until 5.22 there is only the old one.
    enable = getattr(llm, "activation_checkpointing_enable", None)
    enable = enable or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def checkpoint_stages(backbone: nn.Module) -> None:
    """Keep only the input of each stage of a network for images.

    Raises ValueError where it has no stages.
    """
    for stage in stages_of(backbone):
        _checkpoint_forward(stage)


def stages_of(backbone: nn.Module) -> list[nn.Module]:
    """What a network for images applies one after another, the stem and the pooling apart.

    Of its lists and sequences of several modules that are in no other, and of modules
    beside one another that are numbered (layer1 ... layer4), those with the most
    parameters.
    """
    groups = list(_outermost_lists(backbone))
    # Modules that are numbered, such as layer1 ... layer4, by their common name.
    numbered: dict[str, list[nn.Module]] = {}
    for name, module in backbone.named_children():
        if name[-1:].isdigit():
            numbered.setdefault(name.rstrip("0123456789"), []).append(module)
    groups += numbered.values()
    several = (group for group in groups if len(group) > 1)
    stages = max(several, key=_size, default=[])
    if _size(stages) == 0:
        raise ValueError(
            f"{type(backbone).__name__} must have a list of stages, but has none"
        )
    return stages


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the lists and sequences of several modules that are in no other."""
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
    forward = module.forward
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # To its end, or hooks that ZeRO-3 has set behind the last modules would not run.
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
def _statistics_kept(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Within, batches are normalised as ever, but do not enter the running statistics again."""
    before: list[tuple[_BatchNorm, float | None, torch.Tensor | None]] = []
    for norm in norms:
        before.append((norm, norm.momentum, norm.num_batches_tracked))
        # A momentum of 0 leaves the statistics to the bit. With the counter away nothing
        # counts either.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, counter in before:
            norm.momentum, norm.num_batches_tracked = momentum, counter
