import pytest
import torch

from tests.helpers.backbones import CROP


@pytest.fixture
def pixels_NCHW() -> torch.Tensor:
    return torch.randn(5, 3, CROP, CROP, generator=torch.Generator().manual_seed(1))
