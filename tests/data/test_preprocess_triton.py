"""Compare the fused kernel with PyTorch: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="PyTorch came without Triton")

from flallm_ds.data import preprocess
from flallm_ds.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

TOLERANCE = 2e-4  # of about 4.8 from black to white; coordinates are float32


@dataclass(frozen=True)
class Case:
    """Random frames, the sizes of their clips in the canvas, and the crop."""

    canvas_hw: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    num_frames: tuple[int, ...]
    frame_size: int
    crop_size: int

    def tensors(self, train: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (frames_NHWC, theta_B23, clips_N), with all augmentations in training."""
        generator = torch.Generator().manual_seed(7)
        shape = (sum(self.num_frames), *self.canvas_hw, 3)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        draws = torch.rand(len(self.sizes), 9, generator=generator)
        draws[:, 2:5] = 0  # below the probability: every augmentation is used
        sizes = torch.tensor(self.sizes, dtype=torch.float32)
        theta = Preprocess(self.frame_size, self.crop_size).affine(
            draws, sizes, self.canvas_hw, train
        )
        clips = torch.arange(len(self.sizes), dtype=torch.int32)
        return frames, theta, clips.repeat_interleave(torch.tensor(self.num_frames))


CASES = (  # small: Triton's interpreter takes about 0.1 s for a block of 256 pixels
    # the last block of pixels is not full
    Case((79, 64), ((79, 64), (79, 64)), (1, 1), 20, 17),
    # several sizes in one canvas
    Case((81, 65), ((81, 65), (41, 60), (33, 17)), (1, 1, 2), 20, 15),
    Case((9, 100), ((9, 100),), (1,), 16, 16),  # enlarged one way, squashed the other
    Case((1, 3), ((1, 3),), (1,), 8, 5),
)


def check(device: torch.device, cases: tuple[Case, ...]) -> None:
    from flallm_ds.data.preprocess_triton import resample

    mean, std = (tuple(255 * v for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for case in cases:
        for train in (False, True):
            tensors = [t.to(device) for t in case.tensors(train)]
            expected = preprocess.resample(*tensors, case.crop_size)
            assert expected.std() > 0.3, "the crop must show the frames"
            got = resample(*tensors, case.crop_size, mean, std)
            assert got.dtype == torch.float32 and got.shape == expected.shape
            assert (got - expected).abs().max() < TOLERANCE, (
                case,
                train,
                (got - expected).abs().max(),
            )
            if not train:
                continue
            half = resample(*tensors, case.crop_size, mean, std, torch.bfloat16)
            assert half.dtype == torch.bfloat16
            # Both round the same number to 8 bits. Where it is between two values, the last
            # bit may differ.
            assert (
                (half.float() - expected).abs() < 2**-7 * expected.abs() + TOLERANCE
            ).all()


def test_the_interpreted_kernel_equals_pytorch():
    """Run in a new process, because Triton reads the variable when the kernel is defined."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked", str(len(CASES))]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pixels", ["*fp32", "*bf16"])
def test_the_kernel_compiles_for_gpus(capability, pixels, tmp_path, monkeypatch):
    """Use Triton's own compiler, which needs no GPU. 80 is an A100, 90 an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flallm_ds.data.preprocess_triton import BLOCK, resample_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"frames": "*u8", "theta": "*fp32", "clips": "*i32", "pixels": pixels}
    signature |= {"height": "i32", "width": "i32"}
    constants = {"CROP": 224, "MEAN": IMAGENET_MEAN, "STD": IMAGENET_STD, "BLOCK": BLOCK}
    source = ASTSource(
        resample_kernel, signature | dict.fromkeys(constants, "constexpr"), constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"] and f".target sm_{capability}" in compiled.asm["ptx"]


def test_without_a_gpu_the_kernel_is_not_used(monkeypatch):
    monkeypatch.setattr(preprocess, "_fused", None)  # called, it would fail
    case = CASES[0]
    frames, _, _ = case.tensors(train=False)
    batch = batch_of(frames, list(case.num_frames))
    pixels = Preprocess(case.frame_size, case.crop_size)(
        batch, False, torch.device("cpu"), torch.bfloat16
    )
    assert pixels.dtype == torch.bfloat16


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_equals_pytorch():
    large = Case((256, 256), ((256, 256), (210, 256), (255, 199)), (9, 3, 5), 256, 224)
    check(torch.device("cuda"), (*CASES, large))


@pytest.mark.gpu
def test_a_gpu_uses_the_kernel_and_equals_the_cpu():
    case = CASES[1]
    frames, _, _ = case.tensors(train=True)
    draws = torch.rand(
        len(case.sizes), 9, generator=torch.Generator().manual_seed(8)
    ).tolist()
    batch = batch_of(
        frames, list(case.num_frames), draws, [list(size) for size in case.sizes]
    )
    cuda, make = torch.device("cuda"), Preprocess(case.frame_size, case.crop_size)
    assert preprocess._can_fuse(cuda)
    for train in (False, True):
        got, expected = make(batch, train, cuda), make(batch, train, torch.device("cpu"))
        assert got.device.type == "cuda" and torch.allclose(
            got.cpu(), expected, atol=TOLERANCE
        )


if __name__ == "__main__":
    check(torch.device("cpu"), CASES)
    print("checked", len(CASES))
else:
    from tests.data.test_preprocess import batch_of
