"""Comparisons and counts of tensors and parameters."""

from collections.abc import Mapping

import torch
from torch import nn


def same_tensors(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> bool:
    """Return whether two state dicts have the same names and equal values."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(one[name], other[name]) for name in one)


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that require gradients."""
    return {name for name, p in model.named_parameters() if p.requires_grad}
