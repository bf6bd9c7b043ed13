"""Sequences of visual features at another rate: corpora of 24, 25, 30 or 50 frames a second at one pace."""

from fractions import Fraction

import torch
from torchaudio import functional as F

MAX_DENOMINATOR = 24  # of the ratio of rates: the filter bank grows with it, and 25 / 29.97 is 5 / 6 to 0.1 %
_LEAST_WEIGHT = 1e-3  # of the real features in an output place; the filter's side lobes alone are no signal


def resample(
    features_BTD: torch.Tensor, lengths_B: torch.Tensor, from_fps: float, to_fps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features_BSD at `to_fps`, their lengths): anti-aliased along time, each sequence by its own length.

    features_BTD: float, padded with anything; lengths_B: int64, places of each sequence.
    torchaudio's filter takes what lies beyond a sequence for zeros, which would turn a constant into 0.41 at
    its end. So each output is divided by what the same filter makes of ones: a constant stays constant, and
    padding changes nothing. Raises ValueError if a rate is not above 0.
    """
    if min(from_fps, to_fps) <= 0:
        raise ValueError(f"rates must be above 0, but are {from_fps} and {to_fps}")
    ratio = Fraction(to_fps / from_fps).limit_denominator(MAX_DENOMINATOR)
    if ratio == 0:
        raise ValueError(
            f"rates must not differ by more than {MAX_DENOMINATOR} times, but are {from_fps}, {to_fps}"
        )
    if ratio == 1:
        return features_BTD, lengths_B
    mask_BT = torch.arange(features_BTD.shape[1], device=features_BTD.device) < lengths_B[:, None]
    new_lengths_B = -(-lengths_B * ratio.numerator // ratio.denominator)
    together_BCT = torch.cat([features_BTD.masked_fill(~mask_BT[..., None], 0), mask_BT[..., None]], dim=2).mT
    resampled_BCS = F.resample(together_BCT.contiguous(), ratio.denominator, ratio.numerator)
    features_BSD = resampled_BCS[:, :-1].mT / resampled_BCS[:, -1:].mT.clamp_min(_LEAST_WEIGHT)
    new_mask_BS = torch.arange(features_BSD.shape[1], device=features_BTD.device) < new_lengths_B[:, None]
    return features_BSD.masked_fill(~new_mask_BS[..., None], 0), new_lengths_B
