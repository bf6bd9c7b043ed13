"""Preprocess frames on the device: squash, crop, rotate, scale, shift and normalise them.

All steps together are one resampling. Each clip has one random draw for all its frames,
because jitter between frames would look like motion. Frames are never mirrored, because
handedness has meaning. A GPU uses one Triton kernel (`preprocess_triton.py`), other
devices `resample`.
"""

import math
import subprocess
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from flallm_ds.batch import VideoBatch

# Shapes: B clips, N frames of all clips, H x W pixels of the canvas, C channels.
# Draws: the columns of draws_B9 are numbers in [0, 1): crop (x and y offset), use of the
# three augmentations, angle, scale, shift in two directions.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The paper names the augmentations without values; these four are ours.
PROBABILITY = 0.5  # of each augmentation
MAX_DEGREES = 30.0
MAX_SCALE = 0.2
MAX_SHIFT = 10 / 256  # in sides of the frame


@dataclass(frozen=True)
class Preprocess:
    """Turn the frames of a batch into the input of the backbone.

    frame_size: side in pixels of the square that frames are squashed to.
    crop_size: side in pixels of the crop that the backbone sees. Training crops at a random
    place, evaluation in the centre.
    augment: rotate, scale and shift in training.
    """

    frame_size: int
    crop_size: int
    augment: bool = True

    def __call__(
        self,
        batch: VideoBatch,
        train: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Return pixels_NCHW of `dtype`, normalised with ImageNet's mean and deviation.

        The call does not wait for the device.
        """
        frames_NHWC = batch.frames_NHWC.to(device, non_blocking=True)
        height, width = frames_NHWC.shape[1:3]
        theta_B23 = self.affine(batch.draws_B9, batch.size_B2, (height, width), train)
        clips_N = torch.arange(len(theta_B23), dtype=torch.int32).repeat_interleave(
            batch.num_frames_B
        )
        # These are not pinned, but CUDA copies so small a source before the call returns.
        theta_B23 = theta_B23.to(device, non_blocking=True)
        clips_N = clips_N.to(device, non_blocking=True)
        # The same pixels by either way, up to rounding.
        function = _fused if device.type == "cuda" and _can_fuse(device) else resample
        return function(frames_NHWC, theta_B23, clips_N, self.crop_size, dtype)

    def affine(
        self,
        draws_B9: torch.Tensor,
        size_B2: torch.Tensor,
        canvas_hw: tuple[int, int],
        train: bool,
    ) -> torch.Tensor:
        """Return theta_B23 for `affine_grid`: crop coordinates to canvas coordinates.

        Both run over [-1, 1]. size_B2: height and width of a clip's frames in the canvas.
        """
        side, crop = float(self.frame_size), float(self.crop_size)
        num_clips = len(draws_B9)
        free = side - crop  # largest offset of the crop
        offset_B2 = torch.full((num_clips, 2), free / 2)
        if train:
            offset_B2 = draws_B9[:, :2] * free
        angle_B, scale_B, shift_B2 = self._augmentation(draws_B9, train)

        # From the crop to the square, in pixels: p = centre + R (q - centre) / scale +
        # shift, with q = offset + (u + 1) / 2 * crop for a crop coordinate u in [-1, 1].
        cos_B, sin_B = torch.cos(angle_B) / scale_B, torch.sin(angle_B) / scale_B
        upper_B2 = torch.stack([cos_B, -sin_B], -1)
        lower_B2 = torch.stack([sin_B, cos_B], -1)
        turn_B22 = torch.stack([upper_B2, lower_B2], -2)
        start_B2 = offset_B2 + crop / 2 - side / 2
        turned_B2 = torch.einsum("bij,bj->bi", turn_B22, start_B2)
        shift_px_B2 = side / 2 + turned_B2 + shift_B2 * side

        # From the square to the canvas, with x before y.
        canvas_2 = torch.tensor([canvas_hw[1], canvas_hw[0]], dtype=torch.float32)
        stretch_B2 = 2 * size_B2.flip(1) / side / canvas_2
        # The crop's coordinates run over [-1, 1], so half a crop is one unit.
        linear_B22 = turn_B22 * (crop / 2) * stretch_B2.unsqueeze(-1)
        constant_B21 = (shift_px_B2 * stretch_B2 - 1).unsqueeze(-1)
        return torch.cat([linear_B22, constant_B21], dim=-1)

    def _augmentation(
        self, draws_B9: torch.Tensor, train: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each clip's angle in radians, scale, and shift in sides of the frame."""
        num_clips = len(draws_B9)
        if not (train and self.augment):
            return torch.zeros(num_clips), torch.ones(num_clips), torch.zeros(num_clips, 2)
        # Each augmentation has a draw for its use, and one in [-1, 1] for its strength.
        used_B3 = draws_B9[:, 2:5] < PROBABILITY
        rotate, zoom = draws_B9[:, 5] * 2 - 1, draws_B9[:, 6] * 2 - 1
        shift = draws_B9[:, 7:9] * 2 - 1
        angle = torch.where(used_B3[:, 0], rotate * math.radians(MAX_DEGREES), 0.0)
        scale = torch.where(used_B3[:, 1], 1 + zoom * MAX_SCALE, 1.0)
        return angle, scale, torch.where(used_B3[:, 2:3], shift * MAX_SHIFT, 0.0)


def resample(
    frames_NHWC: torch.Tensor,
    theta_B23: torch.Tensor,
    clips_N: torch.Tensor,
    crop_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return pixels_NCHW with PyTorch's functions, on any device.

    The kernel is tested against this function. theta_B23: the argument of `affine_grid`.
    clips_N: int32, the clip of each frame.
    """
    frames_NCHW = frames_NHWC.permute(0, 3, 1, 2).float()
    shape = (len(theta_B23), 3, crop_size, crop_size)
    grid_BHW2 = F.affine_grid(theta_B23, list(shape), align_corners=False)
    grid_NHW2 = grid_BHW2.index_select(0, clips_N)
    pixels_NCHW = F.grid_sample(
        frames_NCHW, grid_NHW2, mode="bilinear", align_corners=False
    )
    # The statistics are for pixels from 0 to 1; the frames have pixels from 0 to 255.
    device = frames_NHWC.device
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1) * 255
    return ((pixels_NCHW - mean) / std).to(dtype)


def _fused(
    frames_NHWC: torch.Tensor,
    theta_B23: torch.Tensor,
    clips_N: torch.Tensor,
    crop_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return pixels_NCHW with the Triton kernel."""
    # Triton is installed on machines with a GPU only.
    from flallm_ds.data import preprocess_triton

    mean = tuple(255 * value for value in IMAGENET_MEAN)
    std = tuple(255 * value for value in IMAGENET_STD)
    return preprocess_triton.resample(
        frames_NHWC, theta_B23, clips_N, crop_size, mean, std, dtype
    )


@cache
def _can_fuse(device: torch.device) -> bool:
    """Return whether the kernel runs on this machine.

    Triton compiles it at run time, which needs a C compiler and Python's headers.
    """
    # A batch of one small frame compiles and runs it.
    try:
        _fused(
            torch.zeros(1, 2, 2, 3, dtype=torch.uint8, device=device),
            torch.zeros(1, 2, 3, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            crop_size=2,
        )
    except ModuleNotFoundError:  # PyTorch's wheels include Triton, other builds may not
        return False
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(
            "warning: frames are preprocessed without the fused kernel, because Triton "
            f"cannot compile it: {reason}",
            flush=True,
        )
        return False
    return True
