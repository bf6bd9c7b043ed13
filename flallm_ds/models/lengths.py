"""The only place that knows how packed clips are laid out."""

import torch


def pad_packed(packed_ND: torch.Tensor, num_frames_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(padded_BSD with zeros after each clip's end, mask_BS of 1 where there is a token)."""
    parts = torch.split(packed_ND, num_frames_B.tolist())
    padded_BSD = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    steps_S = torch.arange(padded_BSD.shape[1])
    mask_BS = (steps_S < num_frames_B.cpu().unsqueeze(1)).long().to(packed_ND.device)
    return padded_BSD, mask_BS


def gap_positions(num_frames_B: torch.Tensor, gap: int) -> torch.Tensor:
    """Where each packed frame stands when `gap` empty places follow every clip; int64 (N,)."""
    clip_N = torch.repeat_interleave(torch.arange(len(num_frames_B)), num_frames_B.cpu())
    return torch.arange(len(clip_N)) + clip_N * gap
