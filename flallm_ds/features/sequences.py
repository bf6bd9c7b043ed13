"""Sequences of visual features at another rate (corpora of 24, 25, 30 or 50 frames a second), and masked."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torchaudio import functional as F
from torchaudio.transforms import TimeMasking

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
    ratio = _ratio(from_fps, to_fps)
    if ratio == 1:
        return features_BTD, lengths_B
    mask_BT = torch.arange(features_BTD.shape[1], device=features_BTD.device) < lengths_B[:, None]
    new_lengths_B = -(-lengths_B * ratio.numerator // ratio.denominator)
    together_BCT = torch.cat([features_BTD.masked_fill(~mask_BT[..., None], 0), mask_BT[..., None]], dim=2).mT
    resampled_BCS = F.resample(together_BCT.contiguous(), ratio.denominator, ratio.numerator)
    features_BSD = resampled_BCS[:, :-1].mT / resampled_BCS[:, -1:].mT.clamp_min(_LEAST_WEIGHT)
    new_mask_BS = torch.arange(features_BSD.shape[1], device=features_BTD.device) < new_lengths_B[:, None]
    return features_BSD.masked_fill(~new_mask_BS[..., None], 0), new_lengths_B


def _ratio(from_fps: float, to_fps: float) -> Fraction:
    if min(from_fps, to_fps) <= 0:
        raise ValueError(f"rates must be above 0, but are {from_fps} and {to_fps}")
    ratio = Fraction(to_fps / from_fps).limit_denominator(MAX_DENOMINATOR)
    if ratio == 0:
        raise ValueError(
            f"rates must not differ by more than {MAX_DENOMINATOR} times, but are {from_fps}, {to_fps}"
        )
    return ratio


def resampled_lengths(lengths_B: np.ndarray, from_fps_B: np.ndarray, to_fps: float) -> np.ndarray:
    """What `resample` makes of these lengths at these rates, int64. Raises ValueError as it does."""
    rates, which_B = np.unique(from_fps_B, return_inverse=True)
    ratios = [_ratio(float(rate), to_fps) for rate in rates]
    up_B = np.array([ratio.numerator for ratio in ratios], np.int64)[which_B]
    down_B = np.array([ratio.denominator for ratio in ratios], np.int64)[which_B]
    resampled_B: np.ndarray = -(-np.asarray(lengths_B, np.int64) * up_B // down_B)
    return resampled_B


@dataclass(frozen=True)
class FeatureMasks:
    """SpecAugment (arXiv 1904.08779) on packed features: spans of time and spans of features become zeros.

    times, time_width: masks of a clip, and the most features that one spans; it never spans a whole clip.
    channels, channel_width: the same across the numbers of a feature. The spans of a clip come from its own
    draws alone, whatever else is in the batch.
    """

    times: int = 0
    time_width: int = 0
    channels: int = 0
    channel_width: int = 0

    def __call__(
        self, features_ND: torch.Tensor, num_frames_B: torch.Tensor, draws_B9: torch.Tensor
    ) -> torch.Tensor:
        if not self.times and not self.channels:
            return features_ND
        spans = [
            self.keep(length, features_ND.shape[1], draws)
            for length, draws in zip(num_frames_B.tolist(), draws_B9, strict=True)
        ]
        time_N = torch.cat([time for time, _ in spans]).to(features_ND.device, non_blocking=True)
        channel_BD = torch.stack([channel for _, channel in spans]).to(features_ND.device, non_blocking=True)
        clips_N = torch.arange(len(num_frames_B)).repeat_interleave(num_frames_B).to(features_ND.device)
        return features_ND * time_N[:, None] * channel_BD[clips_N]

    def keep(self, length: int, width: int, draws_9: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(of each place of a clip, of each number of a feature): 1 where it is kept, 0 where masked."""
        words = draws_9.contiguous().view(torch.int32).numpy().view(np.uint32)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds the GPUs as well.
            torch.default_generator.manual_seed(
                int(np.random.SeedSequence(words.tolist()).generate_state(1)[0])
            )
            return _keep(self.times, self.time_width, length), _keep(self.channels, self.channel_width, width)


def _keep(masks: int, width: int, size: int) -> torch.Tensor:
    """Zeros in `masks` random spans of `size` places, ones elsewhere."""
    if not masks:
        return torch.ones(size)
    # torchaudio's parameter is one more than the widest span.
    masking = TimeMasking(min(width + 1, size), iid_masks=True)
    kept: torch.Tensor = masking(torch.ones(masks, 1, 1, size))
    return kept.prod(dim=0).flatten()
