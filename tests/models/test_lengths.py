"""The layout of packed clips."""

import torch

from flallm_ds.models.lengths import pad_packed
from flallm_ds.models.visual_encoder import gap_positions


def test_packed_clips_are_padded_with_zeros_on_the_right():
    packed_ND = torch.arange(1.0, 13).view(6, 2)
    padded_BSD, mask_BS = pad_packed(packed_ND, torch.tensor([1, 3, 2]))
    assert padded_BSD.shape == (3, 3, 2)
    assert mask_BS.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert torch.equal(padded_BSD[mask_BS.bool()], packed_ND)
    assert not padded_BSD[~mask_BS.bool()].any()


def test_gradients_reach_every_packed_frame():
    packed_ND = torch.randn(5, 2, requires_grad=True)
    pad_packed(packed_ND, torch.tensor([2, 3]))[0].sum().backward()
    assert torch.equal(packed_ND.grad, torch.ones(5, 2))


def test_a_gap_follows_every_clip():
    assert gap_positions(torch.tensor([2, 1, 3]), 2).tolist() == [0, 1, 4, 7, 8, 9]
    assert gap_positions(torch.tensor([2, 1, 3]), 0).tolist() == [0, 1, 2, 3, 4, 5]
