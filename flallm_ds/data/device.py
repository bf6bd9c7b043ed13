"""Copies batches to the GPU during the computation of earlier steps: `for batches in
on_device(loader.steps(), device)`.

A second CUDA stream copies the frames into slots, reusable memory of the device. Three
rules, each enforced by an event, make this safe: the computing stream reads a slot after
its copy is done; a slot is overwritten after the computing stream has passed its last
use; the frames on the host are kept until they are copied.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np
import simplejpeg
import torch

from flallm_ds.batch import Batch, JpegBatch
from flallm_ds.errors import RankError, UserError

STEPS_AHEAD = 2  # steps that are copied ahead of the step in use


def on_device(
    steps: Iterable[Sequence[Batch]], device: torch.device
) -> Iterator[list[Batch]]:
    """Yield the same steps with their frames or cached features on the device.

    All other tensors stay on the host. On a CPU, the steps are yielded unchanged. Frames
    on a GPU are valid until the next step is requested; use them on the stream that is
    current then. Raises RankError if a JPEG does not decode.
    """
    if device.type != "cuda":
        # `check_nvjpeg` refuses JPEG batches on a CPU.
        return cast(Iterator[list[Batch]], iter(steps))
    return ahead(steps, CudaQueues(device))


class Mark(Protocol):
    """A point in a queue of work (a CUDA event)."""

    def query(self) -> bool: ...  # whether the queue has passed the mark
    def synchronize(self) -> None: ...  # wait until the queue has passed the mark


class Queues(Protocol):
    """Two asynchronous queues of work of a device: copies, and the consumer's computation."""

    def memory(self, num_bytes: int) -> torch.Tensor: ...
    def computed(self) -> Mark: ...  # after all work in the computing queue
    def compute_after(self, mark: Mark) -> None: ...
    def fill(self, content: torch.Tensor, source: Batch, after: Mark) -> Mark: ...


class CudaQueues:
    """The current stream of the consumer, and a stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Allocate from the pool of the computing stream, which may reuse freed slots at
        once."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def computed(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def compute_after(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def fill(self, content: torch.Tensor, source: Batch, after: Any) -> Any:
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(after)
            if isinstance(source, JpegBatch):
                decode_batch(source, content)
            else:
                content.copy_(source.content, non_blocking=True)
            return self.copies.record_event()


@dataclass
class _Slot:
    memory: torch.Tensor  # uint8
    free: Mark  # after its last use


@dataclass(frozen=True)
class _Filled:
    batch: Batch
    slot: _Slot
    mark: Future[Mark]  # of the copy


class _Slots:
    """The slots of a run; their number and size grow with the needs of the steps."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._free: deque[_Slot] = deque()
        self._held: deque[tuple[Future[Mark], object]] = deque()
        # A thread, because nvJPEG blocks the host, and so does a copy from memory that is
        # not pinned.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="to-device")

    def fill(self, step: Sequence[Batch]) -> list[_Filled]:
        """Start to copy the batches of a step into slots."""
        # Release the host memory of finished copies.
        while self._held and _is_done(self._held[0][0]):
            self._held.popleft()
        return list(map(self._fill, step))

    def _fill(self, source: Batch) -> _Filled:
        host = source.content
        num_bytes = host.numel() * host.element_size()
        slot = self._free.popleft() if self._free else None
        if slot is None or len(slot.memory) < num_bytes:
            memory = self._queues.memory(num_bytes)
            # The pool may return memory that the computing stream still uses.
            slot = _Slot(memory, self._queues.computed())
        content = slot.memory[:num_bytes].view(host.dtype).view(host.shape)
        mark = self._worker.submit(self._queues.fill, content, source, slot.free)
        self._held.append((mark, source))
        return _Filled(source.with_content(content), slot, mark)

    def lend(self, step: list[_Filled]) -> Iterator[list[Batch]]:
        """Yield the batches of a step; their slots are free when the consumer continues."""
        for filled in step:
            self._queues.compute_after(filled.mark.result())
        yield [filled.batch for filled in step]
        used = self._queues.computed()
        for filled in step:
            filled.slot.free = used
            self._free.append(filled.slot)

    def settle(self) -> None:
        """Wait for the copies in progress, so that their memory can be freed."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for mark, _ in self._held:
            if not mark.cancelled() and mark.exception() is None:
                mark.result().synchronize()
        self._held.clear()


def ahead(steps: Iterable[Sequence[Batch]], queues: Queues) -> Iterator[list[Batch]]:
    """Do the work of `on_device` with any implementation of the two queues."""
    slots = _Slots(queues)
    coming: deque[list[_Filled]] = deque()
    try:
        # No local variable for the frames on the host: it would keep their memory.
        for step in map(slots.fill, steps):
            coming.append(step)
            if len(coming) > STEPS_AHEAD:
                yield from slots.lend(coming.popleft())
        while coming:
            yield from slots.lend(coming.popleft())
    finally:
        slots.settle()
        # Stop the threads of the loader now: a traceback may keep `steps` alive.
        if isinstance(steps, Generator):
            steps.close()


def _is_done(mark: Future[Mark]) -> bool:
    return mark.done() and mark.exception() is None and mark.result().query()


class BrokenJpeg(ValueError):
    """The JPEG at `position` does not decode, or has another size; the message is the
    reason."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


def decode_on_device(
    jpegs: Sequence[bytes | memoryview],
    sizes: Sequence[tuple[int, int]],
    out_NHWC: torch.Tensor,
) -> None:
    """Decode N JPEGs into the top left corners of the canvases; the rest becomes black.

    sizes: expected height and width of each. out_NHWC: uint8, RGB; its device decodes. On
    a GPU, nvJPEG decodes: the host waits for it and for all work of the current stream,
    and pixels differ by a few levels from those of the CPU decoder. Raises BrokenJpeg, or
    ImportError without torchvision.
    """
    # An optional dependency, for data.decoder=nvjpeg alone.
    from torchvision.io import ImageReadMode, decode_jpeg

    device = out_NHWC.device
    block = torch.frombuffer(bytearray().join(jpegs), dtype=torch.uint8)
    encoded = list(torch.split(block, [len(jpeg) for jpeg in jpegs]))
    if device.type == "cuda":
        # torchvision may write into memory that this stream still reads (pytorch/vision
        # issue 9606).
        torch.cuda.current_stream(device).synchronize()
    try:
        frames_CHW = decode_jpeg(encoded, ImageReadMode.RGB, device)
    except RuntimeError as error:
        broken = _first_broken(jpegs)  # torchvision does not name the JPEG
        if broken is None:
            raise
        raise broken from error
    # Copy runs of frames of one size at once.
    begin = 0
    for (height, width), group in groupby(sizes):
        end = begin + len(list(group))
        for position in range(begin, end):
            seen = tuple(frames_CHW[position].shape[1:])
            if seen != (height, width):
                raise BrokenJpeg(
                    position,
                    f"its frames must be {width}x{height}, got {seen[1]}x{seen[0]}",
                )
        canvas_NHWC = out_NHWC[begin:end]
        canvas_NHWC[:, height:] = 0
        canvas_NHWC[:, :height, width:] = 0
        canvas_NHWC[:, :height, :width] = torch.stack(frames_CHW[begin:end]).permute(
            0, 2, 3, 1
        )
        begin = end


def _first_broken(jpegs: Sequence[bytes | memoryview]) -> BrokenJpeg | None:
    for position, jpeg in enumerate(jpegs):
        try:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        except ValueError as error:
            return BrokenJpeg(position, str(error))
    return None


def decode_batch(batch: JpegBatch, out_NHWC: torch.Tensor) -> None:
    """Decode the JPEGs of a batch. Raises RankError that names the clip of a broken one."""
    clips_N = np.repeat(np.arange(len(batch.keys)), batch.num_frames_B.numpy())
    sizes_B = [(int(height), int(width)) for height, width in batch.size_B2.tolist()]
    try:
        decode_on_device(batch.jpegs, [sizes_B[clip] for clip in clips_N], out_NHWC)
    except BrokenJpeg as error:
        raise RankError(
            f"Cannot decode clip {batch.keys[clips_N[error.position]]}: {error}. Run "
            "shards/verify.py on the shards, or use --data.decoder=cpu, which replaces "
            "broken clips."
        ) from error


def check_nvjpeg(device: torch.device) -> None:
    """Raise UserError if `decode_on_device` does not work on this device."""
    instead = "or use --data.decoder=cpu"
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), 90, "RGB")
    # On the CPU first: the errors below then tell what is missing.
    devices = [torch.device("cpu")]
    if device.type == "cuda":
        devices.append(device)
    try:
        for one in devices:
            out_NHWC = torch.empty(1, 16, 16, 3, dtype=torch.uint8, device=one)
            decode_on_device([jpeg], [(16, 16)], out_NHWC)
    except ImportError as error:
        raise UserError(
            f"Cannot use data.decoder=nvjpeg: torchvision is not installed ({error}). "
            f"Install flallm_ds with its extra [gpu], {instead}."
        ) from error
    except RuntimeError as error:
        raise UserError(
            "Cannot use data.decoder=nvjpeg: this torchvision does not decode on the GPU "
            f"({str(error).splitlines()[0]}). Install the version of the extra [gpu] of "
            f"flallm_ds, {instead}."
        ) from error
    if device.type != "cuda":
        raise UserError(
            f"Cannot use data.decoder=nvjpeg: there is no CUDA device. Use a GPU, {instead}."
        )
