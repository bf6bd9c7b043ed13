"""Adapter: the MLP between visual features and a language model, in both stages."""

import torch
from torch import nn


class Adapter(nn.Sequential):
    """The VL-Adapter of stage 1 and the LLM-Adapter of stage 2 (FLa-LLM).

    Linear-ReLU-Linear with a hidden layer as wide as the output; the paper does not give
    the hidden width. scale: factor of the output; sqrt(E) for a language model that scales
    its word embeddings by it.
    """

    def __init__(self, in_width: int, out_width: int, scale: float = 1.0) -> None:
        super().__init__(
            nn.Linear(in_width, out_width), nn.ReLU(), nn.Linear(out_width, out_width)
        )
        self.scale = scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (..., D) to embeddings (..., E)."""
        adapted: torch.Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return adapted * self.scale
