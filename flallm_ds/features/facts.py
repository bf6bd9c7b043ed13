"""What a folder of features says of itself, and one clip's features as bytes. numpy alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from flallm_ds.data.sampling import SAMPLING_OPTIONS, FrameSampling
from flallm_ds.errors import UserError

DTYPES = ("float32", "float16")
MAX_WIDTH = 2**16  # of a feature; the widest encoders have 6,144
# The options of a run (data.NAME) that decide which pixels the encoder saw.
OPTIONS = (*SAMPLING_OPTIONS, "frame_size", "crop_size", "augment")


@dataclass(frozen=True)
class FeatureFacts:
    """The features of one split of one folder.

    root: where they lie. encoder: the fingerprint of what made them; made_by: where that
    was read from. options: the values of `OPTIONS`. training: whether the views are
    training's (random picks, augmented), drawn with `seed`; else there is one view,
    evaluation's. digest: of the tars' bytes.
    """

    KIND: ClassVar[str] = "features"  # of the folder, in index.json

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
        """From index.json and its entry of the split. Raises UserError where they do not
        fit each other."""
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
                f"index.json must say what its features are, but does not: {root}. Make "
                "them again with launch/features.py."
            )
        return facts

    def _is_valid(self) -> bool:
        """Return whether each value has its type and range.

        Raises TypeError or ValueError for some values that have not.
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
        """Which frames the encoder saw."""
        return FrameSampling.of_settings(self.options)

    def check_sizes(
        self, num_frames: np.ndarray, fps: np.ndarray, sizes: np.ndarray
    ) -> None:
        """Raise ValueError where a clip's bytes are too few for its features."""
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
        """Whether anything was drawn."""
        crops = self.options["crop_size"] != self.options["frame_size"]
        augments = crops or bool(self.options["augment"])
        return self.training and (augments or not self.sampling.draws_nothing)


def to_npy(features_SD: np.ndarray) -> bytes:
    """A member's bytes: numpy's plain format."""
    file = BytesIO()
    np.lib.format.write_array(
        file, np.ascontiguousarray(features_SD), version=(1, 0), allow_pickle=False
    )
    return file.getvalue()


def from_npy(member: memoryview, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """A view of the member's numbers. Raises ValueError unless it is an array of this
    shape, all finite.

    Nothing is unpickled, and no memory is taken for what a header claims. The header is
    compared, not parsed: numpy parses it with `ast`, which fails where several threads do
    so at once (CPython issue 106905).
    """
    # A member is the magic bytes, the length of the header in two bytes, the header, and
    # the numbers.
    magic = np.lib.format.magic(1, 0)
    begin = len(magic) + 2
    end = begin + int.from_bytes(member[len(magic) : begin], "little")
    if bytes(member[: len(magic)]) != magic or end > len(member):
        raise ValueError("features must be in numpy's format 1.0, but are not")

    # Compare the header with the only one that `to_npy` writes for this shape.
    header = bytes(member[begin:end]).decode("latin1").strip()
    expected = (
        f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': {shape}, }}"
    )
    if header != expected:
        raise ValueError(
            f"features must be {dtype} of shape {shape}, but their header says "
            f"{header[:200]}"
        )
    if len(member) != end + shape[0] * shape[1] * np.dtype(dtype).itemsize:
        raise ValueError(f"features must be of shape {shape}, but are {len(member)} bytes")

    features_SD: np.ndarray = np.frombuffer(member, dtype, offset=end).reshape(shape)
    # The writer stores NaN for a clip that did not decode.
    if not np.isfinite(features_SD).all():
        raise ValueError(
            "features must be finite, but are not: the clip was broken in their source"
        )
    return features_SD
