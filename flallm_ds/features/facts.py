"""The description of a folder of cached features, and the features of a clip as bytes.

This module must not import torch, because data/index.py imports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from flallm_ds.data.sampling import SAMPLING_OPTIONS, FrameSampling
from flallm_ds.errors import UserError

DTYPES = ("float32", "float16")
MAX_WIDTH = 2**16  # channels of a feature; the widest encoders have 6,144
# The options of a run (data.NAME) that decide the pixels that the encoder reads.
OPTIONS = (*SAMPLING_OPTIONS, "frame_size", "crop_size", "augment")


@dataclass(frozen=True)
class FeatureFacts:
    """Describes the cached features of one split in one folder.

    root: the folder or address. source: the video shards. encoder: the fingerprint of the
    encoder; made_by: the run that the encoder was read from. width: channels of a feature.
    options: the values of `OPTIONS`. training: whether the views come from random frames
    and augmentations, drawn with `seed`; otherwise there is one view, for evaluation.
    digest: changes with the bytes of the tars.
    """

    KIND: ClassVar[str] = "features"  # the kind of the folder in index.json

    root: str
    source: str
    encoder: str
    made_by: str
    width: int
    dtype: str
    options: Mapping[str, Any]
    seed: int
    views: int
    training: bool
    digest: str

    @classmethod
    def load(
        cls, manifest: Mapping[str, Any], entry: Mapping[str, Any], root: str, digest: str
    ) -> "FeatureFacts":
        """Return the description in index.json and its entry for the split.

        Raises UserError if a value is missing, wrong, or does not fit the others.
        """
        try:
            facts = cls(
                root=root,
                views=entry["views"],
                training=entry["training"],
                digest=digest,
                **manifest["features"],
            )
            is_valid = (
                facts._is_valid()
                and isinstance(entry["source_fingerprint"], str)
                and len(entry["shards"]) % facts.views == 0
            )
        # ValueError: a sampling that is impossible
        except (KeyError, TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise UserError(
                "index.json must describe the features, got missing or wrong values in "
                f"{root}. Write the features again with launch/features.py."
            )
        return facts

    def _is_valid(self) -> bool:
        """Return whether each value has the right type and range.

        Raises TypeError or ValueError for some wrong values.
        """
        for number in (self.views, self.width, self.seed):
            # Not isinstance: True is an int for it.
            if type(number) is not int:
                return False
        for text in (self.source, self.encoder, self.made_by):
            if not isinstance(text, str):
                return False
        return (
            self.dtype in DTYPES
            and self.views >= 1
            and 1 <= self.width <= MAX_WIDTH
            and self.seed >= 0
            and isinstance(self.training, bool)
            and set(self.options) == set(OPTIONS)
            and self.sampling.has_types()
        )

    @property
    def sampling(self) -> FrameSampling:
        """The sampling of the frames that the encoder read."""
        return FrameSampling.of_settings(self.options)

    def check_sizes(
        self, num_frames: np.ndarray, fps: np.ndarray, sizes: np.ndarray
    ) -> None:
        """Raise ValueError if a clip has fewer bytes than its features need.

        num_frames, fps, sizes: columns of the table, one entry per clip.
        """
        # A lower bound without the header: it finds a wrong width before the first batch.
        kept = self.sampling.num_kept(num_frames, fps)
        least = kept * self.width * np.dtype(self.dtype).itemsize
        if (sizes < least).any():
            row = int(np.argmax(sizes < least))
            raise ValueError(
                f"size must be at least {least[row]:,} for {kept[row]:,} features of width "
                f"{self.width:,}, got {sizes[row]:,} in row {row}"
            )

    @property
    def seed_matters(self) -> bool:
        """Whether the features depend on the seed."""
        # A crop as large as the frame has a single position.
        crops = self.options["crop_size"] != self.options["frame_size"]
        augments = crops or bool(self.options["augment"])
        return self.training and (augments or not self.sampling.draws_nothing)


def to_npy(features_SD: np.ndarray) -> bytes:
    """Return the bytes of a member: features in numpy's format 1.0, without pickle."""
    file = BytesIO()
    np.lib.format.write_array(
        file, np.ascontiguousarray(features_SD), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()


def from_npy(member: memoryview, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Return a view of the features in a member, without a copy.

    Raises ValueError unless they are an array of this shape and dtype, all finite. Nothing
    is unpickled, and no memory is allocated for the shape that a header claims. The header
    is compared, not parsed: numpy parses it with `ast`, which fails if several threads do
    so at once (CPython issue 106905).
    """
    # A member is the magic bytes, the length of the header in two bytes, the header, and
    # the numbers.
    magic = np.lib.format.magic(1, 0)
    begin = len(magic) + 2
    end = begin + int.from_bytes(member[len(magic) : begin], "little")
    if bytes(member[: len(magic)]) != magic or end > len(member):
        raise ValueError("features must be in numpy's format 1.0, got other bytes")

    # Compare the header with the only one that `to_npy` writes for this shape.
    header = bytes(member[begin:end]).decode("latin1").strip()
    expected = (
        f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': {shape}, }}"
    )
    if header != expected:
        raise ValueError(
            f"features must be {dtype} of shape {shape}, got the header {header[:200]}"
        )
    if len(member) != end + shape[0] * shape[1] * np.dtype(dtype).itemsize:
        raise ValueError(f"features must be of shape {shape}, got {len(member)} bytes")

    features_SD: np.ndarray = np.frombuffer(member, dtype, offset=end).reshape(shape)
    # The writer stores NaN for a clip that did not decode.
    if not np.isfinite(features_SD).all():
        raise ValueError(
            "features must be finite, got NaN or infinity: the clip was broken in the video"
        )
    return features_SD
