"""Way-stations of the data: what one room hands to the next.

Shape letters, here and in every file: B clips, N frames packed over a batch (no padding
frames), S visual tokens of the longest clip, L text tokens of the longest text, C
channels, H and W pixels, D width of visual features, E width of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B clips, their kept frames packed one after another.

    With `features_ND` there are no frames: frames_NHWC has none, and N and num_frames_B
    count features.
    """

    # uint8; a clip's frame fills the top left corner of the canvas
    frames_NHWC: torch.Tensor
    num_frames_B: torch.Tensor  # int64, on the host; sums to N
    # float32: height and width of each clip's frames within the canvas, pixels
    size_B2: torch.Tensor
    # float32 in [0, 1): the clip's random numbers, from (seed, epoch, sample)
    draws_B9: torch.Tensor
    # int64, padded with -100; pieces and end of sentence, no start token
    target_ids_BL: torch.Tensor
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    corpora: tuple[str, ...]  # each clip's corpus
    languages: tuple[str, ...]  # of each text: de, en, zh, ...
    # False: a dummy that keeps ranks in step; it weighs nothing and is not scored
    real_B: tuple[bool, ...]
    # cached features (float32 or float16) instead of frames
    features_ND: torch.Tensor | None = None

    @property
    def num_target_tokens(self) -> int:
        return int((self.target_ids_BL != -100).sum())


@dataclass(frozen=True)
class EncodedBatch:
    """A batch whose frames are still JPEGs.

    batch: all but the pixels; its frames_NHWC has a shape but no memory (PyTorch's device
    `meta`). jpegs: those of its N frames, in order.
    """

    batch: Batch
    jpegs: Sequence[bytes | memoryview]


@dataclass(frozen=True)
class Hypothesis:
    """What the model said of one clip."""

    key: str
    hypothesis: str
    reference: str
    corpus: str = ""
    language: str = ""  # of both sentences
    # (sentence, score), best first, where several were asked for
    nbest: tuple[tuple[str, float], ...] = ()
