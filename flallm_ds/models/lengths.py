"""How packed clips are laid out; no other file knows it."""

from collections.abc import Sequence
from typing import Literal

import torch


def pad_parts(
    parts: Sequence[torch.Tensor], side: Literal["left", "right"] = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(padded_BSE with zeros on one side of each part, mask_BS of 1 where there is a token)."""
    pad = torch.nn.utils.rnn.pad_sequence
    padded_BSE = pad(list(parts), batch_first=True, padding_side=side)
    ones = [torch.ones(len(part), dtype=torch.long) for part in parts]
    mask_BS = pad(ones, batch_first=True, padding_side=side)
    return padded_BSE, mask_BS.to(padded_BSE.device)


def pad_packed(
    packed_ND: torch.Tensor, num_frames_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(padded_BSD with zeros after each clip's end, mask_BS of 1 where there is a token)."""
    return pad_parts(torch.split(packed_ND, num_frames_B.tolist()))


def gap_positions(num_frames_B: torch.Tensor, gap: int) -> torch.Tensor:
    """Where each packed frame stands when `gap` empty places follow every clip; int64 (N,)."""
    # The number of the clip that each frame belongs to: so many gaps come before the
    # frame.
    clip_N = torch.repeat_interleave(torch.arange(len(num_frames_B)), num_frames_B.cpu())
    return torch.arange(len(clip_N)) + clip_N * gap
