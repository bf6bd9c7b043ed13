"""Open index, plan and loader of flallm_ds for the benchmarks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from flallm_ds.data.codecs.avi import frame_spans
from flallm_ds.data.codecs.decode import FAST
from flallm_ds.data.index import Index, load_index
from flallm_ds.data.plan import EpochPlan, Plan
from flallm_ds.data.sampling import FrameSampling

if TYPE_CHECKING:
    from flallm_ds.batch import Batch
    from flallm_ds.data.text.codec import TextCodec

SEED = 1


def load(shards: Path) -> Index:
    return load_index(shards, "train")


def plan_of(
    index: Index, *, keep_every: int, batch_clips: int, num_micro_batches: int
) -> Plan:
    num_kept = FrameSampling(keep_every).num_kept(index.num_frames, index.arrays["fps"])
    return Plan(
        index.fingerprint,
        num_kept,
        index.arrays["shard"],
        SEED,
        batch_clips,
        num_micro_batches,
    )


class OurLoader:
    """The loader on one rank with one micro-batch per step, without texts.

    `epochs` epochs of the few clips of a benchmark are joined to one, because a real epoch
    has many steps: its start (threads, memory) must not count every few steps.
    """

    def __init__(
        self, shards: Path, keep_every: int, batch_clips: int, threads: int, epochs: int = 1
    ) -> None:
        # Imported here: torch takes seconds to import and the plan does not need it.
        from flallm_ds.data.loader import Loader
        from flallm_ds.data.readers import VideoReader

        index = load(shards)
        plan = plan_of(
            index, keep_every=keep_every, batch_clips=batch_clips, num_micro_batches=1
        )
        reader = VideoReader(index, FrameSampling(keep_every), SEED, train=True)
        order = joined([plan.epoch(epoch) for epoch in range(epochs)])
        self._loader = Loader(reader, order, threads=threads)

    def batches(self) -> Iterator["Batch"]:
        yield from self._loader


def joined(epochs: list[EpochPlan]) -> EpochPlan:
    num_clips = [len(epoch.order) for epoch in epochs]
    begins = np.cumsum([0, *num_clips[:-1]])
    return EpochPlan(
        order=np.concatenate([epoch.order for epoch in epochs]),
        passes=np.concatenate([epoch.passes for epoch in epochs]),
        ends=np.concatenate(
            [epoch.ends + begin for epoch, begin in zip(epochs, begins, strict=True)]
        ),
        num_kept=epochs[0].num_kept,
        num_micro_batches=epochs[0].num_micro_batches,
    )


def small_codec(index: Index) -> "TextCodec":
    """Train a tokenizer of the class of mBART on the texts of the clips."""
    from flallm_ds.data.text.codec import TextCodec
    from flallm_ds.data.text.prompt import Instruction
    from flallm_ds.models.llm.standin_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(list(index.strings("text")), 200, "de_DE")
    return TextCodec(tokenizer, Instruction(language="de_DE"))


def tar_of(index: Index, row: int) -> Path:
    return Path(index.root) / index.shards[int(index.arrays["shard"][row])].file


def member(index: Index, row: int) -> bytes:
    """Read the bytes of a clip at the offset in the index."""
    with tar_of(index, row).open("rb", buffering=0) as file:
        return os.pread(
            file.fileno(), int(index.arrays["size"][row]), int(index.arrays["offset"][row])
        )


def jpegs(index: Index, row: int) -> list[memoryview]:
    """Return the encoded frames of a clip."""
    clip = memoryview(member(index, row))
    return [clip[begin : begin + size] for begin, size in frame_spans(clip).tolist()]


def decode_clip(index: Index, row: int, picks: np.ndarray) -> np.ndarray:
    """Decode picked frames as our loader does: uint8 (frames, height, width, 3)."""
    encoded = jpegs(index, row)
    height, width = int(index.arrays["height"][row]), int(index.arrays["width"][row])
    decoded = np.empty((len(picks), height, width, 3), np.uint8)
    for place, pick in zip(decoded, picks.tolist(), strict=True):
        simplejpeg.decode_jpeg(encoded[pick], "RGB", buffer=place, **FAST)
    return decoded
