"""The layout of packed clips: padding, and gaps between clips.

N packed frames, B clips, S tokens of the longest clip, D width of the features, E width of
the language model. No other file depends on the layout.
"""

from collections.abc import Sequence
from typing import Literal

import torch


def pad_parts(
    parts: Sequence[torch.Tensor], side: Literal["left", "right"] = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (padded_BSE, mask_BS).

    padded_BSE: the parts, (S_i, E) each, padded with zeros on one side. mask_BS: int64, 1
    for a token and 0 for padding.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    padded_BSE = pad(list(parts), batch_first=True, padding_side=side)
    # Pad ones in the same way to get the mask.
    ones = [torch.ones(len(part), dtype=torch.long) for part in parts]
    mask_BS = pad(ones, batch_first=True, padding_side=side)
    return padded_BSE, mask_BS.to(padded_BSE.device)


def pad_packed(
    packed_ND: torch.Tensor, num_frames_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (padded_BSD, mask_BS) of packed clips, padded on the right."""
    return pad_parts(torch.split(packed_ND, num_frames_B.tolist()))


def gap_positions(num_frames_B: torch.Tensor, gap: int) -> torch.Tensor:
    """Return places_N (int64): frames in a row, with `gap` empty places after each clip."""
    # The number of a frame's clip is the number of gaps before the frame.
    clip_N = torch.repeat_interleave(torch.arange(len(num_frames_B)), num_frames_B.cpu())
    return torch.arange(len(clip_N)) + clip_N * gap
