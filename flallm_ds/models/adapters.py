"""The MLP between visual features and a language model, in both stages."""

import torch
from torch import nn


class Adapter(nn.Sequential):
    """The MLP between visual encoder and translator: VL-Adapter (stage 1), LLM-Adapter (stage 2).

    Linear-ReLU-Linear, one hidden layer as wide as the output (FLa-LLM; the paper does
    not give the hidden width). scale: what the output is multiplied by, sqrt(E) where the
    language model scales its word embeddings.
    """

    def __init__(self, in_width: int, out_width: int, scale: float = 1.0) -> None:
        super().__init__(
            nn.Linear(in_width, out_width), nn.ReLU(), nn.Linear(out_width, out_width)
        )
        self.scale = scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., E)."""
        adapted: torch.Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return adapted * self.scale
