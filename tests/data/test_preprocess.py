import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from flallm_ds.batch import VideoBatch
from flallm_ds.data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_DEGREES,
    MAX_SCALE,
    MAX_SHIFT,
    Preprocess,
)

CPU = torch.device("cpu")
CENTRE = [0.5, 0.5]  # draws of the crop's place
NEVER = [0.9, 0.9, 0.9]  # no rotation, no scale, no shift
NEUTRAL = [0.5, 0.5, 0.5, 0.5]  # the middle of angle, scale, shift x, shift y


def batch_of(
    frames_NHWC: torch.Tensor, num_frames: list[int], draws=None, sizes=None
) -> VideoBatch:
    num_clips = len(num_frames)
    draws = [[*CENTRE, *NEVER, *NEUTRAL]] * num_clips if draws is None else draws
    sizes = [list(frames_NHWC.shape[1:3])] * num_clips if sizes is None else sizes
    return VideoBatch(
        frames_NHWC=frames_NHWC,
        num_frames_B=torch.tensor(num_frames),
        size_B2=torch.tensor(sizes, dtype=torch.float32),
        draws_B9=torch.tensor(draws, dtype=torch.float32),
        target_ids_BL=torch.zeros(num_clips, 1, dtype=torch.long),
        keys=("k",) * num_clips,
        texts=("",) * num_clips,
        corpora=("c",) * num_clips,
        languages=("de",) * num_clips,
        real_B=(True,) * num_clips,
    )


def noise(num: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (num, height, width, 3), dtype=torch.uint8, generator=generator
    )


def pixels_of(
    preprocess: Preprocess, batch: VideoBatch, train: bool = False
) -> torch.Tensor:
    """Return pixels from 0 to 255 without the normalisation, of shape (N, 3, crop, crop)."""
    normalised = preprocess(batch, train, CPU)
    assert normalised.dtype == torch.float32
    std, mean = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_STD, IMAGENET_MEAN))
    return (normalised * std + mean) * 255


def chw(frames_NHWC: torch.Tensor) -> torch.Tensor:
    return frames_NHWC.permute(0, 3, 1, 2).float()


# --- evaluation


def test_at_the_stored_size_evaluation_is_the_centre_slice():
    frames = noise(3, 64, 64)
    got = pixels_of(Preprocess(64, 56), batch_of(frames, [2, 1]))
    assert torch.allclose(got, chw(frames)[:, :, 4:60, 4:60], atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(79, 64), (260, 210), (48, 100)])
def test_evaluation_is_the_centre_of_the_squashed_frame(height, width):
    frames = noise(2, height, width)
    squashed = F.interpolate(chw(frames), (64, 64), mode="bilinear", align_corners=False)
    got = pixels_of(Preprocess(64, 56), batch_of(frames, [2]))
    assert torch.allclose(got, squashed[:, :, 4:60, 4:60], atol=0.1)


def test_pixels_are_normalised_with_the_values_of_imagenet():
    frames = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    normalised = Preprocess(32, 32)(batch_of(frames, [1]), False, CPU)
    expected = [(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    assert torch.allclose(normalised.mean((0, 2, 3)), torch.tensor(expected), atol=1e-5)


def test_evaluation_uses_no_random_numbers():
    frames = noise(1, 64, 64)
    first = Preprocess(64, 56)(batch_of(frames, [1], [[0.0] * 9]), False, CPU)
    second = Preprocess(64, 56)(batch_of(frames, [1], [[0.99] * 9]), False, CPU)
    assert torch.equal(first, second)


def test_each_clip_of_a_mixed_canvas_is_squashed_from_its_own_size():
    big, small = noise(2, 80, 64), noise(1, 40, 60)
    canvas = torch.zeros(3, 80, 64, 3, dtype=torch.uint8)
    canvas[:2] = big
    canvas[2:, :40, :60] = small
    got = pixels_of(
        Preprocess(32, 24), batch_of(canvas, [2, 1], sizes=[[80, 64], [40, 60]])
    )
    for clip, frames in ((got[:2], big), (got[2:], small)):
        alone = pixels_of(Preprocess(32, 24), batch_of(frames, [len(frames)]))
        assert torch.allclose(clip, alone, atol=1e-2)


# --- training


def test_without_augmentation_training_crops_at_a_random_place():
    frames = noise(1, 64, 64)
    preprocess = Preprocess(64, 56, augment=False)
    for x, y in ((0.0, 0.0), (0.25, 0.75), (0.5, 0.0)):
        got = pixels_of(preprocess, batch_of(frames, [1], [[x, y, *[0.0] * 7]]), train=True)
        left, top = int(8 * x), int(8 * y)
        assert torch.allclose(
            got, chw(frames)[:, :, top : top + 56, left : left + 56], atol=1e-2
        )


def test_a_clip_has_one_draw_for_all_its_frames():
    """Equal frames of a clip stay equal; in another clip they have another crop."""
    frames = noise(1, 64, 64).repeat(5, 1, 1, 1)
    draws = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)).tolist()
    got = pixels_of(Preprocess(64, 56), batch_of(frames, [3, 2], draws), train=True)
    assert (
        torch.equal(got[0], got[1])
        and torch.equal(got[0], got[2])
        and torch.equal(got[3], got[4])
    )
    assert not torch.allclose(got[0], got[3], atol=1)


def test_a_clip_is_the_same_in_any_batch():
    frames = noise(5, 64, 48)
    draws = torch.rand(2, 9, generator=torch.Generator().manual_seed(4)).tolist()
    together = pixels_of(Preprocess(64, 56), batch_of(frames, [3, 2], draws), train=True)
    alone = pixels_of(Preprocess(64, 56), batch_of(frames[3:], [2], draws[1:]), train=True)
    assert torch.allclose(together[3:], alone, atol=1e-2)


def marked() -> torch.Tensor:
    """Return a frame that is brighter on the left, and slightly brighter at the top."""
    frame = torch.zeros(1, 64, 64, 3)
    frame[:, :, :32] += 150
    frame[:, :32] += 60
    return frame.to(torch.uint8)


def test_no_draw_mirrors_a_frame():
    """Handedness has meaning: left stays left and up stays up."""
    draws = torch.rand(500, 9, generator=torch.Generator().manual_seed(5))
    for row in draws.tolist():
        got = pixels_of(Preprocess(64, 56), batch_of(marked(), [1], [row]), train=True)[
            0
        ].mean(0)
        assert got[:, :20].mean() > got[:, -20:].mean() + 50
    assert (
        torch.linalg.det(
            Preprocess(64, 56).affine(draws, torch.full((500, 2), 64.0), (64, 64), True)[
                :, :, :2
            ]
        )
        > 0
    ).all()


def dot_at(x: int, y: int) -> torch.Tensor:
    frame = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    frame[0, y - 1 : y + 1, x - 1 : x + 1] = 255  # centred on the corner (x, y)
    return frame


def centroid(pixels_CHW: torch.Tensor) -> tuple[float, float]:
    """Return (x, y) of the mean brightness in pixels from the centre; y grows downwards."""
    weight = pixels_CHW.clamp(min=0).mean(0)
    places = torch.arange(weight.shape[0]) + 0.5 - weight.shape[0] / 2
    return float((weight.sum(0) * places).sum() / weight.sum()), float(
        (weight.sum(1) * places).sum() / weight.sum()
    )


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_a_rotation_has_the_drawn_angle(side):
    draws = [*CENTRE, 0.0, 0.9, 0.9, side, 0.5, 0.5, 0.5]
    got = pixels_of(Preprocess(64, 64), batch_of(dot_at(48, 32), [1], [draws]), train=True)[
        0
    ]
    x, y = centroid(got)
    assert math.hypot(x, y) == pytest.approx(16, abs=0.3)
    assert abs(math.degrees(math.atan2(y, x))) == pytest.approx(MAX_DEGREES, abs=1)
    again = pixels_of(
        Preprocess(64, 64), batch_of(dot_at(32, 48), [1], [draws]), train=True
    )[0]
    x2, y2 = centroid(again)  # a right angle further round, as a turn and not a shear
    assert (x2, y2) == pytest.approx((-y, x), abs=0.3)
    opposite = [*draws[:5], 1 - side, *draws[6:]]
    x3, y3 = centroid(
        pixels_of(
            Preprocess(64, 64), batch_of(dot_at(48, 32), [1], [opposite]), train=True
        )[0]
    )
    assert (x3, y3) == pytest.approx((x, -y), abs=0.3)


@pytest.mark.parametrize(
    ("draw", "factor"), [(0.0, 1 - MAX_SCALE), (0.5, 1.0), (1.0, 1 + MAX_SCALE)]
)
def test_a_scale_above_one_enlarges(draw, factor):
    draws = [*CENTRE, 0.9, 0.0, 0.9, 0.5, draw, 0.5, 0.5]
    got = pixels_of(Preprocess(64, 64), batch_of(dot_at(42, 25), [1], [draws]), train=True)[
        0
    ]
    assert centroid(got) == pytest.approx((10 * factor, -7 * factor), abs=0.2)


def test_a_shift_moves_by_at_most_its_limit():
    places = []
    for draw in (0.0, 1.0):
        draws = [*CENTRE, 0.9, 0.9, 0.0, 0.5, 0.5, draw, 0.5]
        places.append(
            centroid(
                pixels_of(Preprocess(64, 64), batch_of(dot_at(32, 32), [1], [draws]), True)[
                    0
                ]
            )
        )
    assert sorted(x for x, _ in places) == pytest.approx(
        [-64 * MAX_SHIFT, 64 * MAX_SHIFT], abs=0.1
    )
    assert [y for _, y in places] == pytest.approx([0, 0], abs=0.1)


def test_a_frame_that_is_not_square_is_augmented_like_a_square_one():
    """The rotation happens in the squashed square, so the stored shape does not matter."""
    draws = [[0.3, 0.6, 0.0, 0.0, 0.0, 0.9, 0.3, 0.6, 0.2]]
    smooth = F.interpolate(
        torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 255,
        (64, 64),
        mode="bicubic",
    )
    square = smooth.clamp(0, 255).to(torch.uint8)
    wide = (
        F.interpolate(square.float(), (64, 192), mode="bilinear", align_corners=False)
        .round()
        .to(torch.uint8)
    )
    one, other = (
        pixels_of(
            Preprocess(64, 40),
            batch_of(f.permute(0, 2, 3, 1).contiguous(), [1], draws),
            train=True,
        )
        for f in (square, wide)
    )
    assert (one - other).abs().mean() < 2


def test_outside_of_the_frame_is_black():
    white = torch.full((1, 64, 64, 3), 255, dtype=torch.uint8)
    # rotated by 30 degrees, scaled to 80 %
    draws = [*CENTRE, 0.0, 0.0, 0.9, 1.0, 0.0, 0.5, 0.5]
    got = pixels_of(Preprocess(64, 64), batch_of(white, [1], [draws]), train=True)[0]
    assert got[:, 0, 0].abs().max() < 1e-3 and got[:, 32, 32].min() > 254.9


def test_each_augmentation_changes_half_of_the_clips():
    draws = torch.rand(4000, 9, generator=torch.Generator().manual_seed(6))
    preprocess = Preprocess(64, 64)
    theta = preprocess.affine(draws, torch.full((4000, 2), 64.0), (64, 64), train=True)
    turned = (theta[:, 0, 1].abs() > 1e-6).float().mean()
    scaled = (torch.linalg.det(theta[:, :, :2]) - 1).abs().gt(1e-4).float().mean()
    assert turned == pytest.approx(0.5, abs=0.03) and scaled == pytest.approx(0.5, abs=0.03)
    off = replace(preprocess, augment=False).affine(
        draws, torch.full((4000, 2), 64.0), (64, 64), train=True
    )
    assert torch.allclose(
        off, torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand_as(off), atol=1e-6
    )
