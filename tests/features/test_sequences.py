"""Test the resampling of sequences of features."""

import math

import pytest
import torch

from flallm_ds.features.sequences import resample


def wave(num: int, fps: float, hertz: float) -> torch.Tensor:
    """Return (1, num, 2): a cosine and a sine."""
    angle = 2 * math.pi * hertz * torch.arange(num) / fps
    return torch.stack([angle.cos(), angle.sin()], dim=1)[None]


@pytest.mark.parametrize(
    ("from_fps", "to_fps"),
    [(50, 25), (30, 25), (24, 25), (25, 12.5), (29.97, 25), (25, 30)],
)
def test_a_slow_movement_is_the_same_at_another_rate(from_fps, to_fps):
    num = int(4 * from_fps)
    got, lengths = resample(wave(num, from_fps, 1.0), torch.tensor([num]), from_fps, to_fps)
    expected = wave(int(lengths[0]), to_fps, 1.0)
    assert abs(int(lengths[0]) - 4 * to_fps) <= 1 and got.shape == expected.shape
    inner = slice(8, -8)
    assert (got - expected)[:, inner].abs().max() < 0.05


def test_a_constant_stays_constant_to_its_ends():
    """torchaudio alone turns a 1 into 0.41 at the end."""
    for from_fps, to_fps in ((50, 25), (30, 25), (25, 30), (25, 6.25)):
        got, _ = resample(torch.full((1, 40, 3), 7.0), torch.tensor([40]), from_fps, to_fps)
        assert torch.allclose(got, torch.full_like(got, 7.0), atol=1e-4)


def test_frequencies_above_half_the_new_rate_are_removed():
    fast = wave(400, 50, 20.0)  # above the 12.5 / 2 Hz that 12.5 frames a second can hold
    got, _ = resample(fast, torch.tensor([400]), 50, 12.5)
    assert got[:, 8:-8].abs().max() < 0.1 and fast[:, ::4][:, 8:-8].abs().max() > 0.9


def test_padding_and_other_sequences_of_the_batch_change_nothing():
    torch.manual_seed(0)
    lengths = torch.tensor([7, 40, 23])
    padded = torch.randn(3, 60, 5) * 100  # rubbish beyond the lengths, too
    together, new_lengths = resample(padded, lengths, 30, 25)
    for row, length in enumerate(lengths.tolist()):
        alone, (new_length,) = resample(
            padded[row : row + 1, :length], lengths[row : row + 1], 30, 25
        )
        assert new_length == new_lengths[row] == math.ceil(length * 5 / 6)
        assert torch.allclose(together[row, :new_length], alone[0, :new_length], atol=1e-4)
        assert not together[row, new_length:].any()


def test_the_same_rate_changes_nothing_and_impossible_rates_are_errors():
    features, lengths = torch.randn(2, 9, 4), torch.tensor([9, 3])
    assert resample(features, lengths, 25, 25)[0] is features
    for rates in ((0, 25), (25, -1), (500, 1)):
        with pytest.raises(ValueError, match="rates must"):
            resample(features, lengths, *rates)
