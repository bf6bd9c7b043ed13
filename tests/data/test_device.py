"""Slots and events, with late threads in a GPU's place; JPEGs by torchvision; and all of
it on a GPU."""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import simplejpeg
import torch

from flallm_ds.batch import Batch, FeatureBatch, JpegBatch, VideoBatch
from flallm_ds.data import device
from flallm_ds.data.device import BrokenJpeg, decode_on_device, on_device
from flallm_ds.data.readers import FrameBuffers
from flallm_ds.errors import RankError, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_STEPS, MICRO_BATCHES = 40, 2


def fields_of(num_frames: int, name: str = "") -> dict[str, object]:
    """The fields of any batch of one clip."""
    return {
        "num_frames_B": torch.tensor([num_frames]),
        "draws_B9": torch.zeros(1, 9),
        "target_ids_BL": torch.zeros(1, 1, dtype=torch.long),
        "keys": (name,),
        "texts": ("",),
        "corpora": ("",),
        "languages": ("de",),
        "real_B": (True,),
    }


def batch_of(frames_NHWC: torch.Tensor, name: str = "") -> VideoBatch:
    num_frames, height, width, _ = frames_NHWC.shape
    size_B2 = torch.tensor([[float(height), float(width)]])
    return VideoBatch(
        frames_NHWC=frames_NHWC, size_B2=size_B2, **fields_of(num_frames, name)
    )


class Source:
    """Steps of batches of one colour each, in memory that is used again once nobody holds it."""

    def __init__(
        self,
        num_steps: int = NUM_STEPS,
        fail_at: int | None = None,
        features: str | None = None,
    ) -> None:
        self.buffers, self.features = FrameBuffers(), features  # features: their dtype
        self.num_steps, self.fail_at = num_steps, fail_at
        self.closed = False
        self.sizes = (
            np.random.default_rng(0).integers(1, 9, num_steps * MICRO_BATCHES).tolist()
        )

    def steps(self) -> Iterator[list[Batch]]:
        try:
            for step in range(self.num_steps):
                if step == self.fail_at:
                    raise RankError("a disk is gone.")
                yield [
                    self._batch(step * MICRO_BATCHES + place)
                    for place in range(MICRO_BATCHES)
                ]
        finally:
            self.closed = True

    def _batch(self, number: int) -> Batch:
        if self.features is not None:
            features_ND = self.buffers.take((self.sizes[number], 40), self.features)
            features_ND.fill_(self.colour(number))
            fields = fields_of(self.sizes[number], str(number))
            return FeatureBatch(features_ND=features_ND, **fields)
        frames = self.buffers.take((self.sizes[number], 40, 30, 3))
        frames.fill_(self.colour(number))
        return batch_of(frames, name=str(number))

    def colour(self, number: int) -> int:
        return number % 251

    def expected(self) -> list[tuple[int, int, int]]:
        """(frames, darkest, brightest) of each batch."""
        return [(size, self.colour(n), self.colour(n)) for n, size in enumerate(self.sizes)]


@dataclass(frozen=True)
class Passed:
    """A mark in a thread's work."""

    work: Future[None]

    def query(self) -> bool:
        return self.work.done()

    def synchronize(self) -> None:
        self.work.result()


class ThreadQueues:
    """Two threads that do what they are given in order, late, and in parallel to each
    other and the consumer.

    Copies hold no reference to what they read, as those of a GPU do not.
    """

    def __init__(self, copy_s: float, compute_s: float) -> None:
        self.copies, self.computing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.copy_s, self.compute_s = copy_s, compute_s
        self.memories: list[torch.Tensor] = []
        self.num_asked = self.num_copied = 0

    def memory(self, num_bytes: int) -> torch.Tensor:
        self.memories.append(torch.full((num_bytes,), 255, dtype=torch.uint8))
        return self.memories[-1]

    def computed(self) -> Passed:
        return Passed(self.computing.submit(lambda: None))

    def compute_after(self, mark: Passed) -> None:
        self.computing.submit(mark.synchronize)

    def fill(self, content: torch.Tensor, source: Batch, after: Passed) -> Passed:
        host = source.content
        addresses = (
            content.data_ptr(),
            host.data_ptr(),
            content.numel() * content.element_size(),
        )
        self.num_asked += 1
        return Passed(self.copies.submit(self._copy, *addresses, after))

    def _copy(self, target: int, source: int, num_bytes: int, after: Passed) -> None:
        after.synchronize()
        time.sleep(self.copy_s)
        ctypes.memmove(target, source, num_bytes)
        self.num_copied += 1

    def summary(self, frames_NHWC: torch.Tensor) -> Future[tuple[int, int, int]]:
        """What the consumer computes, later."""

        def compute() -> tuple[int, int, int]:
            time.sleep(self.compute_s)
            return len(frames_NHWC), int(frames_NHWC.min()), int(frames_NHWC.max())

        return self.computing.submit(compute)


def to_device_threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("to-device")
    ]


# --- slots and events


@pytest.mark.parametrize(
    ("copy_s", "compute_s"), [(0.002, 0.0), (0.0, 0.002), (0.001, 0.001)]
)
def test_every_batch_arrives_whole_whichever_queue_is_behind(copy_s, compute_s):
    source, queues = Source(), ThreadQueues(copy_s, compute_s)
    seen = [
        queues.summary(b.frames_NHWC)
        for step in device.ahead(source.steps(), queues)
        for b in step
    ]
    assert [s.result() for s in seen] == source.expected()
    assert not to_device_threads()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_features_arrive_in_place_of_frames(dtype):
    source, queues = Source(features=dtype), ThreadQueues(0.001, 0.001)
    seen = []
    for step in device.ahead(source.steps(), queues):
        for batch in step:
            assert batch.features_ND.dtype == getattr(torch, dtype)
            seen.append(queues.summary(batch.features_ND))
    assert [s.result() for s in seen] == source.expected()


@pytest.mark.gpu
def test_cached_features_arrive_on_a_gpu():
    source = Source(features="float16")
    seen = []
    for step in on_device(source.steps(), CUDA):
        for batch in step:
            assert batch.features_ND.is_cuda
            seen.append(
                (
                    len(batch.features_ND),
                    int(batch.features_ND.min()),
                    int(batch.features_ND.max()),
                )
            )
    assert seen == source.expected()


def test_slots_and_host_memory_are_used_again():
    source, queues = Source(), ThreadQueues(0.0, 0.0)
    addresses = set()
    for step in device.ahead(source.steps(), queues):
        for batch in step:
            addresses.add(batch.frames_NHWC.data_ptr())
            queues.summary(batch.frames_NHWC).result()
    slots = MICRO_BATCHES * (device.STEPS_AHEAD + 1)
    largest = max(source.sizes) * 40 * 30 * 3
    assert len([m for m in queues.memories if len(m) == largest]) <= slots, (
        "a slot never shrinks"
    )
    assert len(addresses) <= len(queues.memories) < NUM_STEPS
    assert len(source.buffers) <= slots + MICRO_BATCHES


def test_all_else_of_a_batch_is_passed_on_as_it_is():
    source = Source(num_steps=3)
    got = [b for step in device.ahead(source.steps(), ThreadQueues(0, 0)) for b in step]
    assert [b.keys[0] for b in got] == [str(n) for n in range(3 * MICRO_BATCHES)]
    kept = batch_of(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    (step,) = device.ahead([[kept]], ThreadQueues(0, 0))
    assert all(
        getattr(step[0], name) is getattr(kept, name)
        for name in ("num_frames_B", "target_ids_BL", "texts")
    )


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_an_epoch_shorter_than_the_lookahead_is_whole(num_steps):
    source, queues = Source(num_steps=num_steps), ThreadQueues(0.001, 0.0)
    seen = [
        queues.summary(b.frames_NHWC)
        for step in device.ahead(source.steps(), queues)
        for b in step
    ]
    assert [s.result() for s in seen] == source.expected()


def test_a_consumer_may_stop_early():
    """The copies under way are waited for: afterwards their memory on both sides may be
    used for anything."""
    source, queues = Source(), ThreadQueues(0.02, 0.0)
    steps = device.ahead(source.steps(), queues)
    for _ in range(2):
        next(steps)
    steps.close()
    assert (
        2 <= queues.num_copied == queues.num_asked
        and source.closed
        and not to_device_threads()
    )
    known = len(source.buffers)
    again = [source.buffers.take((1,)) for _ in range(known)]
    assert len(again) == len(source.buffers) == known, "the host's frames are let go"


def test_a_fault_of_the_loader_comes_through():
    source, queues = Source(fail_at=5), ThreadQueues(0.001, 0.0)
    seen = []
    with pytest.raises(RankError, match="a disk is gone"):
        for step in device.ahead(source.steps(), queues):
            seen.append(step)
    assert len(seen) == 5 - device.STEPS_AHEAD and source.closed and not to_device_threads()


def test_a_fault_of_a_copy_comes_through():
    class Failing(ThreadQueues):
        def fill(self, frames_NHWC, source, after):
            if source.keys == ("7",):
                raise RankError("clip 7 is broken.")
            return super().fill(frames_NHWC, source, after)

    source = Source()
    with pytest.raises(RankError, match="clip 7"):
        list(device.ahead(source.steps(), Failing(0.001, 0.0)))
    assert source.closed and not to_device_threads()


def test_on_a_cpu_the_steps_are_the_same_objects():
    steps = list(Source(num_steps=3).steps())
    assert all(a is b for a, b in zip(on_device(steps, CPU), steps, strict=True))


# --- JPEGs by torchvision


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, so that a decoder's own way to blow up the colours costs little."""
    small = np.random.default_rng(seed).integers(0, 256, (1, 3, 4, 4)).astype(np.float32)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(small), (height, width), mode="bilinear"
    )
    return np.ascontiguousarray(large[0].permute(1, 2, 0).numpy(), dtype=np.uint8)


def jpegs_of(sizes: list[tuple[int, int]]) -> list[bytes | memoryview]:
    """Alternately as bytes and within a larger block of memory, as a clip's frames are."""
    made = [
        simplejpeg.encode_jpeg(picture(*hw, seed=n), 90, "RGB")
        for n, hw in enumerate(sizes)
    ]
    return [
        memoryview(b"head" + jpeg)[4:] if n % 2 else jpeg for n, jpeg in enumerate(made)
    ]


SIZES = [(40, 30), (40, 30), (40, 30), (25, 30), (16, 24), (16, 24)]


def check_decoding(where: torch.device, levels: int) -> None:
    jpegs = jpegs_of(SIZES)
    canvas = torch.full((len(SIZES), 40, 30, 3), 99, dtype=torch.uint8, device=where)
    decode_on_device(jpegs, SIZES, canvas)
    for got, jpeg, (height, width) in zip(
        canvas.cpu().numpy().astype(int), jpegs, SIZES, strict=True
    ):
        expected = simplejpeg.decode_jpeg(jpeg, "RGB")
        assert np.abs(got[:height, :width] - expected).max() <= levels
        assert not got[height:].any() and not got[:, width:].any(), "the rest is black"


def needs_torchvision() -> None:
    pytest.importorskip("torchvision", reason="torchvision comes with the extra [gpu] only")


def test_jpegs_fill_their_canvases():
    needs_torchvision()
    check_decoding(CPU, levels=0)


def encoded_batch(
    jpegs: list[bytes | memoryview], height: int = 40, width: int = 30
) -> JpegBatch:
    """Two clips: all frames but the last, and the last."""
    shape = torch.empty((len(jpegs), height, width, 3), dtype=torch.uint8, device="meta")
    fields = fields_of(len(jpegs)) | {
        "num_frames_B": torch.tensor([len(jpegs) - 1, 1]),
        "keys": ("first", "second"),
    }
    size_B2 = torch.tensor([[40.0, 30.0], [25.0, 30.0]])
    return JpegBatch(frames_NHWC=shape, size_B2=size_B2, jpegs=jpegs, **fields)


def test_a_batch_of_jpegs_is_decoded_by_the_sizes_of_its_clips():
    needs_torchvision()
    jpegs = jpegs_of(SIZES[1:4])
    canvas = torch.full((3, 40, 30, 3), 99, dtype=torch.uint8)
    device.decode_batch(encoded_batch(jpegs), canvas)
    assert np.array_equal(canvas[2, :25].numpy(), simplejpeg.decode_jpeg(jpegs[2], "RGB"))
    assert not canvas[2, 25:].any()


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8no", "cut"])
def test_a_broken_jpeg_is_named(damage):
    needs_torchvision()
    jpegs = jpegs_of(SIZES[1:4])
    jpegs[2] = bytes(jpegs[2])[:300] if damage == "cut" else damage
    canvas = torch.empty((3, 40, 30, 3), dtype=torch.uint8)
    with pytest.raises(BrokenJpeg) as error:
        decode_on_device(jpegs, SIZES[1:4], canvas)
    assert error.value.position == 2
    with pytest.raises(
        RankError, match=r"Cannot decode clip second: .* --data\.decoder=cpu"
    ):
        device.decode_batch(encoded_batch(jpegs), canvas)


def test_a_jpeg_of_another_size_is_named():
    needs_torchvision()
    with pytest.raises(
        RankError, match="Cannot decode clip second: its frames must be 30x25, got 30x40"
    ):
        device.decode_batch(
            encoded_batch(jpegs_of([(40, 30)] * 3)),
            torch.empty((3, 40, 30, 3), dtype=torch.uint8),
        )


def test_nvjpeg_is_refused_without_a_gpu():
    needs_torchvision()
    with pytest.raises(
        UserError, match=r"nvjpeg: there is no CUDA device.*--data\.decoder=cpu"
    ):
        device.check_nvjpeg(CPU)


def test_nvjpeg_is_refused_without_torchvision(monkeypatch):
    # as Python does for a module that is not there
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"nvjpeg: torchvision is not installed.*\[gpu\]"):
        device.check_nvjpeg(CUDA)


# --- on a GPU


@pytest.mark.gpu
# cycles of the GPU before each batch is read
@pytest.mark.parametrize("busy", [0, 2_000_000])
def test_every_batch_arrives_whole_on_a_gpu(busy):
    source, seen = Source(), []
    for step in on_device(source.steps(), CUDA):
        for batch in step:
            torch.cuda._sleep(busy)
            frames = batch.frames_NHWC
            assert frames.device.type == "cuda" and batch.num_frames_B.device == CPU
            # read when all steps are under way
            seen.append((len(frames), frames.min(), frames.max()))
    assert [(n, int(low), int(high)) for n, low, high in seen] == source.expected()


@pytest.mark.gpu
def test_a_consumer_may_stop_early_on_a_gpu():
    source = Source()
    steps = on_device(source.steps(), CUDA)
    (first, *_), _ = next(steps), next(steps)
    kept = first.frames_NHWC.clone()
    steps.close()
    assert source.closed and not to_device_threads() and int(kept.max()) == source.colour(0)


@pytest.mark.gpu
def test_nvjpeg_fills_canvases_as_the_cpu_does():
    needs_torchvision()
    device.check_nvjpeg(CUDA)
    check_decoding(CUDA, levels=16)


@pytest.mark.gpu
def test_batches_of_jpegs_arrive_decoded_and_broken_ones_are_named():
    needs_torchvision()
    jpegs = jpegs_of(SIZES[1:4])
    expected = torch.empty((3, 40, 30, 3), dtype=torch.uint8)
    device.decode_batch(encoded_batch(jpegs), expected)
    count = 0
    for (batch,) in on_device([[encoded_batch(jpegs)]] * 12, CUDA):
        assert (batch.frames_NHWC.cpu().int() - expected.int()).abs().max() <= 16
        count += 1
    assert count == 12
    with pytest.raises(RankError, match="second"):
        list(on_device([[encoded_batch([*jpegs[:2], b"\xff\xd8no"])]], CUDA))
