"""Frames to pixels on the device: squash to a square, crop, rotate, scale, shift, normalise; one resampling.

One random draw per clip, never per frame: jitter between frames reads as motion. Never a horizontal flip:
handedness is meaning.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from flallm_ds.contracts import Batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PROBABILITY = 0.5  # of each augmentation; these four are our fill-in, the paper is silent
MAX_DEGREES = 30.0
MAX_SCALE = 0.2
MAX_SHIFT = 10 / 256  # of the frame's side


@dataclass(frozen=True)
class Preprocess:
    """frame_size: side of the square that frames are squashed to. crop_size: of what the backbone sees, px.

    augment: rotate, scale and shift in training. Without `train` the crop is the centre one.
    """

    frame_size: int
    crop_size: int
    augment: bool = True

    def __call__(self, batch: Batch, train: bool, device: torch.device) -> torch.Tensor:
        """pixels_NCHW, float32, normalised as ImageNet's."""
        frames_NHWC = batch.frames_NHWC.to(device, non_blocking=True)
        height, width = frames_NHWC.shape[1:3]
        theta_B23 = self.affine(batch.draws_B9, batch.size_B2, (height, width), train)
        frames_NCHW = frames_NHWC.permute(0, 3, 1, 2).float()
        shape = (len(theta_B23), 3, self.crop_size, self.crop_size)
        grid_BHW2 = F.affine_grid(theta_B23.to(device), list(shape), align_corners=False)
        grid_NHW2 = grid_BHW2.repeat_interleave(
            batch.num_frames_B.to(device), dim=0, output_size=len(frames_NCHW)
        )
        pixels_NCHW = F.grid_sample(frames_NCHW, grid_NHW2, mode="bilinear", align_corners=False)
        mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1) * 255
        std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1) * 255
        return (pixels_NCHW - mean) / std

    def affine(
        self, draws_B9: torch.Tensor, size_B2: torch.Tensor, canvas_hw: tuple[int, int], train: bool
    ) -> torch.Tensor:
        """theta_B23 for `affine_grid`: from the crop's coordinates in [-1, 1] to the canvas's."""
        side, crop = float(self.frame_size), float(self.crop_size)
        num_clips = len(draws_B9)
        free = side - crop
        offset_B2 = draws_B9[:, :2] * free if train else torch.full((num_clips, 2), free / 2)
        angle_B, scale_B, shift_B2 = self._augmentation(draws_B9, train)
        # crop -> square: p = centre + R (q - centre) / scale + shift, with q = offset + (u + 1) / 2 * crop
        cos_B, sin_B = torch.cos(angle_B) / scale_B, torch.sin(angle_B) / scale_B
        turn_B22 = torch.stack([torch.stack([cos_B, -sin_B], -1), torch.stack([sin_B, cos_B], -1)], -2)
        start_B2 = offset_B2 + crop / 2 - side / 2
        shift_px_B2 = side / 2 + torch.einsum("bij,bj->bi", turn_B22, start_B2) + shift_B2 * side
        # square -> canvas, whose coordinates run over [-1, 1]; x first
        canvas_2 = torch.tensor([canvas_hw[1], canvas_hw[0]], dtype=torch.float32)
        stretch_B2 = 2 * size_B2.flip(1) / side / canvas_2
        linear_B22 = turn_B22 * (crop / 2) * stretch_B2.unsqueeze(-1)
        constant_B21 = (shift_px_B2 * stretch_B2 - 1).unsqueeze(-1)
        return torch.cat([linear_B22, constant_B21], dim=-1)

    def _augmentation(
        self, draws_B9: torch.Tensor, train: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(angle in radians, scale, shift in sides) of each clip; each with PROBABILITY."""
        num_clips = len(draws_B9)
        if not (train and self.augment):
            return torch.zeros(num_clips), torch.ones(num_clips), torch.zeros(num_clips, 2)
        used_B3 = draws_B9[:, 2:5] < PROBABILITY
        rotate, zoom = draws_B9[:, 5] * 2 - 1, draws_B9[:, 6] * 2 - 1
        shift = draws_B9[:, 7:9] * 2 - 1
        angle = torch.where(used_B3[:, 0], rotate * math.radians(MAX_DEGREES), 0.0)
        scale = torch.where(used_B3[:, 1], 1 + zoom * MAX_SCALE, 1.0)
        return angle, scale, torch.where(used_B3[:, 2:3], shift * MAX_SHIFT, 0.0)
