"""Resample and normalise frames in one Triton kernel.

PyTorch's functions make four passes over memory, three of them over float32 copies of the
frames. The kernel reads the four neighbours of each pixel as bytes and writes it once.
"""

import torch
import triton
import triton.language as tl

BLOCK = 256  # pixels per program


@triton.jit  # type: ignore[untyped-decorator]
def resample_kernel(  # type: ignore[no-untyped-def]
    frames, theta, clips, pixels, height, width,
    CROP: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a block of pixels of a frame; the grid is (frames, blocks)."""
    frame = tl.program_id(0).to(tl.int64)  # a batch may have more than 2^31 bytes
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Coordinates in [-1, 1] are of pixel centres, in the crop and in the canvas, as in
    # affine_grid and grid_sample with align_corners=False.
    u = (2 * (place % CROP) + 1).to(tl.float32) / CROP - 1
    v = (2 * (place // CROP) + 1).to(tl.float32) / CROP - 1
    # Map the crop's (u, v) to pixels (x, y) of the canvas, with the matrix of the clip.
    row = theta + tl.load(clips + frame) * 6
    x = (
        (tl.load(row + 0) * u + tl.load(row + 1) * v + tl.load(row + 2) + 1) * width - 1
    ) / 2
    y = (
        (tl.load(row + 3) * u + tl.load(row + 4) * v + tl.load(row + 5) + 1) * height - 1
    ) / 2
    # Bilinear weights of the four neighbours.
    left, top = tl.floor(x), tl.floor(y)
    right_weight, bottom_weight = x - left, y - top
    source = frames + frame * height * width * 3
    target = pixels + frame * 3 * CROP * CROP + place
    for channel in tl.static_range(3):
        value = tl.zeros((BLOCK,), tl.float32)
        for down in tl.static_range(2):
            for aside in tl.static_range(2):
                i, j = top.to(tl.int32) + down, left.to(tl.int32) + aside
                # A neighbour outside of the canvas counts as black.
                seen = (
                    (i >= 0) & (i < height) & (j >= 0) & (j < width) & (place < CROP * CROP)
                )
                byte = tl.load(source + (i * width + j) * 3 + channel, mask=seen, other=0)
                weight = (bottom_weight if down else 1 - bottom_weight) * (
                    right_weight if aside else 1 - right_weight
                )
                value += byte.to(tl.float32) * weight
        value = (value - MEAN[channel]) / STD[channel]
        tl.store(target + channel * CROP * CROP, value, mask=place < CROP * CROP)


def resample(
    frames_NHWC: torch.Tensor,
    theta_B23: torch.Tensor,
    clips_N: torch.Tensor,
    crop_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return pixels_NCHW: bilinear samples of each frame, minus mean, divided by std.

    All tensors are on one device.
    frames_NHWC: uint8; pixels outside of the canvas are black.
    theta_B23: float32, the argument of `affine_grid`.
    clips_N: int32, the clip of each frame, from 0 to B - 1.
    mean, std: for each channel, for pixels from 0 to 255.
    dtype: float32 or bfloat16.
    """
    num_frames, height, width, channels = frames_NHWC.shape
    assert channels == 3 and frames_NHWC.dtype == torch.uint8 and len(clips_N) == num_frames
    pixels_NCHW = torch.empty(
        (num_frames, 3, crop_size, crop_size), dtype=dtype, device=frames_NHWC.device
    )
    grid = (num_frames, triton.cdiv(crop_size**2, BLOCK))
    # Triton launches on the current device.
    with torch.cuda.device(frames_NHWC.get_device()):
        resample_kernel[grid](
            frames_NHWC.contiguous(), theta_B23.contiguous(), clips_N.contiguous(), pixels_NCHW,
            height, width, CROP=crop_size, MEAN=mean, STD=std, BLOCK=BLOCK,
        )  # fmt: skip
    return pixels_NCHW
