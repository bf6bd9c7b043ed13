"""The frozen parameters of a run: no checkpoint holds them, only a digest of them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from flallm_ds.dist import World, gather_objects
from flallm_ds.errors import UserError

FROZEN = "engine/frozen.json"  # of a checkpoint
# Within what it returns, every rank holds these parameters whole.
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]


def frozen_digest(module: nn.Module, gathered: Gather, world: World) -> str:
    """sha256 over names, shapes and values of the frozen parameters; empty where there are none.

    It does not depend on the number of ranks, each of which reads a part. Every rank must
    call it.
    """
    frozen: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            frozen.append((name, parameter))

    # All ranks gather each parameter, because gathering is collective; the ranks take
    # turns in computing digests.
    own: dict[str, str] = {}
    for number, (name, parameter) in enumerate(frozen):
        with gathered([parameter]):
            if number % world.size == world.rank:
                own[name] = _sha256(parameter)

    # Sorted by name: the result does not depend on the rank that computed a digest.
    digests: dict[str, str] = {}
    for part in gather_objects(own, world):
        digests |= part
    if not digests:
        return ""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def write_digest(checkpoint: Path, digest: str) -> None:
    """Put the digest into a checkpoint. Raises OSError."""
    text = json.dumps({"sha256": digest}) + "\n"
    (checkpoint / FROZEN).write_text(text, encoding="utf-8")


def check_digest(checkpoint: Path, digest: str) -> None:
    """Raise UserError where a checkpoint was saved with other frozen parameters."""
    saved = json.loads((checkpoint / FROZEN).read_text(encoding="utf-8"))["sha256"]
    if digest != saved:
        raise UserError(
            f"the frozen parameters must be those with which {checkpoint} was saved, but "
            "are others. Give the LLM, the visual encoder and the DeepSpeed JSON of then, "
            "or start another run."
        )


def _sha256(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {hashlib.sha256(values.data).hexdigest()}"
