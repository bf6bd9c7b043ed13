"""Check that a resumed run has the same frozen parameters: a checkpoint contains only their
digest."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from flallm_ds.dist import World, gather_objects
from flallm_ds.errors import UserError

# Returns a context in which every rank has the whole parameters.
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]


def frozen_digest(module: nn.Module, gathered: Gather, world: World) -> str:
    """Return a sha256 of the names, shapes and values of the frozen parameters.

    Empty if there are none. It does not depend on the number of ranks. Every rank must
    call this function.
    """
    frozen: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            frozen.append((name, parameter))

    # All ranks gather each parameter, because that is collective. The ranks take turns in
    # computing the digests.
    own: dict[str, str] = {}
    for number, (name, parameter) in enumerate(frozen):
        with gathered([parameter]):
            if number % world.size == world.rank:
                own[name] = _sha256(parameter)

    # Sort by name, so that the result does not depend on the number of ranks.
    digests: dict[str, str] = {}
    for part in gather_objects(own, world):
        digests |= part
    if not digests:
        return ""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def check_digest(checkpoint: Path, saved: str, digest: str) -> None:
    """Raise UserError if a checkpoint was saved with other frozen parameters."""
    if digest != saved:
        raise UserError(
            f"Checkpoint {checkpoint} was saved with other frozen parameters. Use the "
            "original LLM, visual encoder and DeepSpeed JSON, or start another run."
        )


def _sha256(tensor: torch.Tensor) -> str:
    """Return the shape of a tensor and the sha256 of its bytes."""
    # As bytes, because numpy has no bfloat16.
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {hashlib.sha256(values.data).hexdigest()}"
