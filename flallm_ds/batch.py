"""Data structures passed between components.

Shape letters, here and in every file: B clips, N frames (or features) packed over a batch
without padding, S visual tokens of the longest clip, L text tokens of the longest text,
C channels, H and W pixels, D feature dimension of the visual encoder, E hidden size of the
language model.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Batch(ABC):
    """One micro-batch of one rank: B clips, their content packed one after another.

    The subclass says what the content is: `VideoBatch`, `JpegBatch` or `FeatureBatch`.
    """

    # int64, on the host: frames (or features) of each clip; the sum is N
    num_frames_B: torch.Tensor
    # float32 in [0, 1): the random numbers of each clip, from (seed, epoch, sample)
    draws_B9: torch.Tensor
    # int64, padded with -100: tokens and end of sentence, without a start token
    target_ids_BL: torch.Tensor
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    corpora: tuple[str, ...]  # the corpus of each clip
    languages: tuple[str, ...]  # of each text: de, en, zh, ...
    # False: a dummy clip that keeps the ranks in step; it has no loss and no score
    real_B: tuple[bool, ...]

    @property
    def num_target_tokens(self) -> int:
        return int((self.target_ids_BL != -100).sum())

    @property
    @abstractmethod
    def content(self) -> torch.Tensor:
        """Packed frames or features, with a first dimension of N."""

    @abstractmethod
    def with_content(self, content: torch.Tensor) -> "Batch":
        """Return the same batch with its content in another memory, such as a GPU's."""


@dataclass(frozen=True, kw_only=True)
class VideoBatch(Batch):
    """A batch of decoded frames."""

    # uint8; the frame of a clip fills the top left corner of the canvas
    frames_NHWC: torch.Tensor
    # float32: height and width of each clip's frames within the canvas, pixels
    size_B2: torch.Tensor

    @property
    def content(self) -> torch.Tensor:
        return self.frames_NHWC

    def with_content(self, content: torch.Tensor) -> "VideoBatch":
        return replace(self, frames_NHWC=content)


@dataclass(frozen=True, kw_only=True)
class JpegBatch(VideoBatch):
    """A batch whose frames are still JPEGs, for the device to decode.

    frames_NHWC has the shape of the decoded frames but no memory (PyTorch's device
    `meta`). jpegs: the N frames, in order.
    """

    jpegs: Sequence[bytes | memoryview]

    def with_content(self, content: torch.Tensor) -> VideoBatch:
        """Return the batch of the decoded frames."""
        fields = dict(vars(self))
        del fields["jpegs"]
        return VideoBatch(**fields | {"frames_NHWC": content})


@dataclass(frozen=True, kw_only=True)
class FeatureBatch(Batch):
    """A batch of cached features of the frozen visual encoder."""

    features_ND: torch.Tensor  # float32 or float16

    @property
    def content(self) -> torch.Tensor:
        return self.features_ND

    def with_content(self, content: torch.Tensor) -> "FeatureBatch":
        return replace(self, features_ND=content)


@dataclass(frozen=True)
class Hypothesis:
    """The translation that a model generated for one clip, with its reference."""

    key: str
    hypothesis: str
    reference: str
    corpus: str = ""
    language: str = ""  # of hypothesis and reference
    # (sentence, score), best first, where several were asked for
    nbest: tuple[tuple[str, float], ...] = ()
