"""Batches onto the GPU while earlier ones are computed: `for batches in
on_device(loader.steps(), device)`.

Frames are copied on a stream of their own into slots, memory of the device that is used
again and again. Three rules keep it right, each by an event: the consumer's stream
computes on a slot once its copy is done; a slot is filled again once that stream has
passed the last use of it; the host's frames are held until they are copied.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np
import simplejpeg
import torch

from flallm_ds.batch import Batch, EncodedBatch
from flallm_ds.errors import RankError, UserError

STEPS_AHEAD = 2  # on their way to the device, besides the step in use


def on_device(
    steps: Iterable[Sequence[Batch | EncodedBatch]], device: torch.device
) -> Iterator[list[Batch]]:
    """The same steps, their frames (or cached features) on the device; all else stays on
    the host. On a CPU: the steps themselves.

    Frames on a GPU are valid until the next step is asked for; use them on the stream
    that is current there. Raises RankError if a JPEG does not decode.
    """
    if device.type != "cuda":
        # `check_nvjpeg` has refused JPEGs
        return cast(Iterator[list[Batch]], iter(steps))
    return ahead(steps, CudaQueues(device))


class Mark(Protocol):
    """A point in a queue of work (a CUDA event)."""

    def query(self) -> bool: ...  # whether the queue has passed it
    def synchronize(self) -> None: ...  # wait until it has


class Queues(Protocol):
    """Two queues of work that a device goes through on its own: copies, and what the
    consumer computes."""

    def memory(self, num_bytes: int) -> torch.Tensor: ...
    def computed(self) -> Mark: ...  # all that was handed to the computing queue by now
    def compute_after(self, mark: Mark) -> None: ...
    def fill(
        self, content: torch.Tensor, source: Batch | EncodedBatch, after: Mark
    ) -> Mark: ...


class CudaQueues:
    """The consumer's current stream, and one for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Of the computing stream's pool: what a slot gives back may be used by that
        stream at once."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def computed(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def compute_after(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def fill(self, content: torch.Tensor, source: Batch | EncodedBatch, after: Any) -> Any:
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(after)
            if isinstance(source, EncodedBatch):
                decode_batch(source, content)
            else:
                content.copy_(_content(source), non_blocking=True)
            return self.copies.record_event()


@dataclass
class _Slot:
    memory: torch.Tensor  # uint8
    free: Mark  # the last use of it


@dataclass(frozen=True)
class _Filled:
    batch: Batch
    slot: _Slot
    mark: Future[Mark]  # of the copy


class _Slots:
    """Slots of which as many are made, and as large, as the steps turn out to need."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._free: deque[_Slot] = deque()
        self._held: deque[tuple[Future[Mark], object]] = deque()
        # A thread, because nvJPEG makes the host wait, and so does a copy from memory
        # that is not pinned.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="to-device")

    def fill(self, step: Sequence[Batch | EncodedBatch]) -> list[_Filled]:
        while self._held and _is_done(self._held[0][0]):
            self._held.popleft()
        return [self._fill(source) for source in step]

    def _fill(self, source: Batch | EncodedBatch) -> _Filled:
        batch = source.batch if isinstance(source, EncodedBatch) else source
        host = _content(batch)
        num_bytes = host.numel() * host.element_size()
        slot = self._free.popleft() if self._free else None
        if slot is None or len(slot.memory) < num_bytes:
            memory = self._queues.memory(num_bytes)
            # it may have been in use until now
            slot = _Slot(memory, self._queues.computed())
        content = slot.memory[:num_bytes].view(host.dtype).view(host.shape)
        mark = self._worker.submit(self._queues.fill, content, source, slot.free)
        self._held.append((mark, source))
        if batch.features_ND is None:
            return _Filled(replace(batch, frames_NHWC=content), slot, mark)
        return _Filled(replace(batch, features_ND=content), slot, mark)

    def lend(self, step: list[_Filled]) -> Iterator[list[Batch]]:
        """Yield the step's batches once; their slots are free when the consumer comes back."""
        for filled in step:
            self._queues.compute_after(filled.mark.result())
        yield [filled.batch for filled in step]
        used = self._queues.computed()
        for filled in step:
            filled.slot.free = used
            self._free.append(filled.slot)

    def settle(self) -> None:
        """Wait for the copies under way: their memory is given back after this."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for mark, _ in self._held:
            if not mark.cancelled() and mark.exception() is None:
                mark.result().synchronize()
        self._held.clear()


def ahead(
    steps: Iterable[Sequence[Batch | EncodedBatch]], queues: Queues
) -> Iterator[list[Batch]]:
    """What `on_device` does, whatever runs the two queues."""
    slots = _Slots(queues)
    coming: deque[list[_Filled]] = deque()
    try:
        # no name here for the host's frames, which would hold them
        for step in map(slots.fill, steps):
            coming.append(step)
            if len(coming) > STEPS_AHEAD:
                yield from slots.lend(coming.popleft())
        while coming:
            yield from slots.lend(coming.popleft())
    finally:
        slots.settle()
        # a traceback would keep it, and the loader's threads, for a while
        if isinstance(steps, Generator):
            steps.close()


def _content(batch: Batch) -> torch.Tensor:
    """What a batch is for: its frames, or the features that stand for them."""
    return batch.frames_NHWC if batch.features_ND is None else batch.features_ND


def _is_done(mark: Future[Mark]) -> bool:
    return mark.done() and mark.exception() is None and mark.result().query()


class BrokenJpeg(ValueError):
    """The JPEG at `position` does not decode, or not to its size; the text is the rest of
    a sentence."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


def decode_on_device(
    jpegs: Sequence[bytes | memoryview],
    sizes: Sequence[tuple[int, int]],
    out_NHWC: torch.Tensor,
) -> None:
    """Decode N JPEGs into the canvases' top left corners, on their device; the rest
    becomes black.

    sizes: height and width that each must have. out_NHWC: uint8, RGB. On a GPU nvJPEG
    decodes: the host waits for it and for all work of the current stream, and pixels
    differ from the CPU decoder's by a few levels. Raises BrokenJpeg, or ImportError
    without torchvision.
    """
    # optional: only for data.decoder=nvjpeg
    from torchvision.io import ImageReadMode, decode_jpeg

    device = out_NHWC.device
    block = torch.frombuffer(bytearray().join(jpegs), dtype=torch.uint8)
    encoded = list(torch.split(block, [len(jpeg) for jpeg in jpegs]))
    if device.type == "cuda":
        # torchvision writes into memory that this stream may still be reading
        # (pytorch/vision, 9606).
        torch.cuda.current_stream(device).synchronize()
    try:
        frames_CHW = decode_jpeg(encoded, ImageReadMode.RGB, device)
    except RuntimeError as error:
        broken = _first_broken(jpegs)  # torchvision does not say which
        if broken is None:
            raise
        raise broken from error
    begin = 0
    for (height, width), group in groupby(sizes):
        end = begin + len(list(group))
        for position in range(begin, end):
            seen = tuple(frames_CHW[position].shape[1:])
            if seen != (height, width):
                raise BrokenJpeg(
                    position,
                    f"frames must be {width}x{height}, but one is {seen[1]}x{seen[0]}",
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


def decode_batch(encoded: EncodedBatch, out_NHWC: torch.Tensor) -> None:
    """Decode a batch's JPEGs. Raises RankError that names the clip where one is broken."""
    batch = encoded.batch
    clips_N = np.repeat(np.arange(len(batch.keys)), batch.num_frames_B.numpy())
    sizes_B = [(int(height), int(width)) for height, width in batch.size_B2.tolist()]
    try:
        decode_on_device(encoded.jpegs, [sizes_B[clip] for clip in clips_N], out_NHWC)
    except BrokenJpeg as error:
        raise RankError(
            f"a clip must decode, but {batch.keys[clips_N[error.position]]} does not: "
            f"{error}. Run shards/verify.py on the shards, or give --data.decoder=cpu, "
            "which replaces broken clips."
        ) from error


def check_nvjpeg(device: torch.device) -> None:
    """Raise UserError unless `decode_on_device` works there."""
    leave = "or give --data.decoder=cpu"
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), 90, "RGB")
    try:
        decode_on_device([jpeg], [(16, 16)], torch.empty(1, 16, 16, 3, dtype=torch.uint8))
        if device.type == "cuda":
            decode_on_device(
                [jpeg],
                [(16, 16)],
                torch.empty(1, 16, 16, 3, dtype=torch.uint8, device=device),
            )
            return
    except ImportError as error:
        raise UserError(
            f"data.decoder=nvjpeg needs torchvision, but there is none ({error}). "
            f"Install flallm_ds with its extra [gpu], {leave}."
        ) from error
    except RuntimeError as error:
        raise UserError(
            "data.decoder=nvjpeg needs a torchvision that decodes on the GPU, but this one "
            f"does not ({str(error).splitlines()[0]}). Install the one of flallm_ds's "
            f"extra [gpu], {leave}."
        ) from error
    raise UserError(
        f"data.decoder=nvjpeg needs a CUDA device, but there is none. Use a GPU, {leave}."
    )
