"""Resample sequences of visual features to another frame rate, and mask them.

Corpora have 24, 25, 30 or 50 frames per second.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torchaudio import functional as F
from torchaudio.transforms import TimeMasking

# Largest denominator of the ratio of two rates: the filter bank grows with it, and 5 / 6
# differs from 25 / 29.97 by only 0.1 %.
MAX_DENOMINATOR = 24
# Lowest weight of the real features in an output place: where only side lobes of the
# filter reach, there is no signal to scale up.
_LEAST_WEIGHT = 1e-3


def resample(
    features_BTD: torch.Tensor, lengths_B: torch.Tensor, from_fps: float, to_fps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features_BSD at `to_fps` and their lengths, anti-aliased along time.

    features_BTD: float, with any values as padding. lengths_B: int64, places of each
    sequence. Each sequence is resampled on its own: padding changes nothing. Raises
    ValueError if a rate is not above 0, or if the rates are too far apart.
    """
    ratio = _ratio(from_fps, to_fps)
    if ratio == 1:
        return features_BTD, lengths_B
    device = features_BTD.device
    new_lengths_B = -(-lengths_B * ratio.numerator // ratio.denominator)

    # Filter the features, with zeros for padding, and next to them a channel of ones.
    places_T = torch.arange(features_BTD.shape[1], device=device)
    mask_BT1 = (places_T < lengths_B[:, None])[..., None]
    masked_BTD = features_BTD.masked_fill(~mask_BT1, 0)
    together_BCT = torch.cat([masked_BTD, mask_BT1], dim=2).mT.contiguous()
    resampled_BCS = F.resample(together_BCT, ratio.denominator, ratio.numerator)

    # The filter reads zeros beyond a sequence, which would turn a constant 1 into 0.41 at
    # its end. Divide by the filtered ones, so that a constant stays constant.
    weights_BS1 = resampled_BCS[:, -1:].mT.clamp_min(_LEAST_WEIGHT)
    features_BSD = resampled_BCS[:, :-1].mT / weights_BS1

    new_places_S = torch.arange(features_BSD.shape[1], device=device)
    new_mask_BS1 = (new_places_S < new_lengths_B[:, None])[..., None]
    return features_BSD.masked_fill(~new_mask_BS1, 0), new_lengths_B


def _ratio(from_fps: float, to_fps: float) -> Fraction:
    """Return `to_fps` / `from_fps` with a small denominator.

    Raises ValueError if a rate is not above 0, or if the rates are too far apart.
    """
    if min(from_fps, to_fps) <= 0:
        raise ValueError(f"frame rates must be above 0, got {from_fps} and {to_fps}")
    ratio = Fraction(to_fps / from_fps).limit_denominator(MAX_DENOMINATOR)
    if ratio == 0:
        raise ValueError(
            f"frame rates must not differ by more than {MAX_DENOMINATOR} times, got "
            f"{from_fps} and {to_fps}"
        )
    return ratio


def resampled_lengths(
    lengths_B: np.ndarray, from_fps_B: np.ndarray, to_fps: float
) -> np.ndarray:
    """Return the lengths that `resample` returns for these lengths and rates, int64 (B,).

    Raises ValueError as `resample` does.
    """
    # Compute one ratio per rate, not per clip: a corpus has few rates.
    rates, which_B = np.unique(from_fps_B, return_inverse=True)
    up, down = np.ones(len(rates), np.int64), np.ones(len(rates), np.int64)
    for number, rate in enumerate(rates.tolist()):
        ratio = _ratio(rate, to_fps)
        up[number], down[number] = ratio.numerator, ratio.denominator
    up_B, down_B = up[which_B], down[which_B]
    # Round up, as `resample` does: -(-a // b) is the ceiling of a / b.
    resampled_B: np.ndarray = -(-np.asarray(lengths_B, np.int64) * up_B // down_B)
    return resampled_B


@dataclass(frozen=True)
class FeatureMasks:
    """Sets random spans of packed features to zero, as SpecAugment does (arXiv 1904.08779).

    times: spans of time in a clip. time_width: the most features in one span, which never
    covers a whole clip. channels, channel_width: the same along the feature dimension. The
    spans of a clip depend on the draws of that clip alone, not on the rest of the batch.
    """

    times: int = 0
    time_width: int = 0
    channels: int = 0
    channel_width: int = 0

    def __call__(
        self, features_ND: torch.Tensor, num_frames_B: torch.Tensor, draws_B9: torch.Tensor
    ) -> torch.Tensor:
        """Return features_ND with zeros in the spans.

        num_frames_B, draws_B9: on the host.
        """
        if not self.times and not self.channels:
            return features_ND
        device, width = features_ND.device, features_ND.shape[1]

        # Draw the spans of each clip, along time and along the feature dimension.
        times, channels = [], []
        for length, draws_9 in zip(num_frames_B.tolist(), draws_B9, strict=True):
            time, channel = self.keep(length, width, draws_9)
            times.append(time)
            channels.append(channel)
        time_N = torch.cat(times).to(device, non_blocking=True)
        channel_BD = torch.stack(channels).to(device, non_blocking=True)

        # Find the clip of each packed feature, to give it the channels of that clip.
        clips_N = torch.arange(len(num_frames_B)).repeat_interleave(num_frames_B).to(device)
        return features_ND * time_N[:, None] * channel_BD[clips_N]

    def keep(
        self,
        length: int,
        width: int,
        draws_9: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masks of a clip, (length,) and (width,): 0 in the spans, 1 elsewhere.

        length: features of the clip. width: channels of a feature. draws_9: float32, on
        the host.
        """
        # Seed with the bits of the draws, which are the same on any number of ranks.
        words = draws_9.contiguous().view(torch.int32).numpy().view(np.uint32)
        seed = int(np.random.SeedSequence(words.tolist()).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also seeds the GPUs.
            torch.default_generator.manual_seed(seed)
            time = _kept(self.times, self.time_width, length)
            channel = _kept(self.channels, self.channel_width, width)
        return time, channel


def _kept(masks: int, width: int, size: int) -> torch.Tensor:
    """Return a mask (size,) of ones with zeros in `masks` random spans of up to `width`."""
    if not masks:
        return torch.ones(size)
    # torchaudio's parameter is one more than the widest span.
    masking = TimeMasking(min(width + 1, size), iid_masks=True)
    kept: torch.Tensor = masking(torch.ones(masks, 1, 1, size))
    return kept.prod(dim=0).flatten()
