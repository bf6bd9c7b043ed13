"""Decode clips in a plain webdataset pipeline.

`webdataset.WebDataset(tars).map(decode_clip(keep_every=4))` needs nothing else of this
package. The decoder reads only the members that shards of this package have, and unpickles
nothing. It imports neither torch nor webdataset.
"""

import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from flallm_ds.data.codecs.decode import EXTENSIONS, decode_frames
from flallm_ds.data.sampling import Cap, FrameSampling
from flallm_ds.data.table_check import LIMITS

# Fields of a clip's JSON with their types.
_FACTS: dict[str, type | tuple[type, ...]] = {
    "id": str, "text": str, "signer": str, "video": str, "language": str,
    "num_frames": int, "fps": (int, float), "width": int, "height": int,
}  # fmt: skip


def decode_clip(
    keep_every: int = 1,
    max_frames: int = 512,
    target_fps: float | None = None,
    cap: Cap = "uniform",
    train: bool = False,
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a function that decodes a sample of webdataset into a clip.

    keep_every, max_frames, target_fps, cap: the frames to keep; see
    `sampling.FrameSampling`. Other frames are not decoded.
    train: keep a random frame of each group instead of the first one. It is drawn from
    Python's `random`, which a DataLoader seeds differently in each worker.

    A sample has undecoded members. A clip is a dict with `key`, `frames` (uint8 RGB of
    shape (T, height, width, 3)), `picks` (int64 of shape (T,), the indices of these frames
    in the stored clip), the fields of the clip's JSON (text, id, signer, video, language,
    num_frames, fps, width, height, gloss), and webdataset's `__key__` and `__url__`.

    The function can be pickled for workers. Raises ValueError for invalid arguments. The
    function raises ValueError for a damaged clip, with its key, its tar and the reason.
    """
    sampling = FrameSampling(keep_every, max_frames, target_fps, cap)
    return partial(_decode, sampling, train)


def _decode(
    sampling: FrameSampling, train: bool, sample: Mapping[str, Any]
) -> dict[str, Any]:
    """Decode one sample; see `decode_clip`."""
    try:
        facts, member = _facts(sample), _member(sample)
        # A frame takes at least a byte. A wrong number must not allocate memory below.
        if facts["num_frames"] > len(member):
            raise ValueError(
                f"num_frames in the JSON must be at most the clip's size ({len(member)} "
                f"bytes), got {facts['num_frames']}"
            )
        # Evaluation draws nothing: rng is None.
        rng = np.random.default_rng(random.getrandbits(64)) if train else None
        picks = sampling.picks(facts["num_frames"], facts["fps"], rng)
        hw = facts["height"], facts["width"]
        frames = np.empty((len(picks), *hw, 3), np.uint8)
        decode_frames(member, picks, facts["num_frames"], frames, hw)
    except (ValueError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"Cannot decode {sample.get('__key__')} of {sample.get('__url__')}: {error}."
        ) from error
    clip = facts | {"key": sample["__key__"], "frames": frames, "picks": picks}
    for name, value in sample.items():
        if name.startswith("__"):  # fields that webdataset adds
            clip[name] = value
    return clip


def _facts(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the clip's JSON; raise ValueError if a field is missing or out of range."""
    content = sample.get("json")
    if not isinstance(content, bytes):
        found = type(content).__name__
        raise ValueError(f"the JSON must be bytes, without .decode() before, got {found}")
    facts = json.loads(content)
    if not isinstance(facts, dict):
        raise ValueError(f"the JSON must be an object, got {type(facts).__name__}")
    # The numbers decide how much memory is allocated, and a tar may come from anyone.
    for name, kind in _FACTS.items():
        if not isinstance(facts.get(name), kind):
            raise ValueError(
                f"{name} in the JSON must have the right type, got {facts.get(name)!r}"
            )
    for name, (least, most) in LIMITS.items():
        if not least <= facts[name] <= most:
            raise ValueError(
                f"{name} in the JSON must be from {least:,} to {most:,}, got {facts[name]}"
            )
    return facts


def _member(sample: Mapping[str, Any]) -> bytes:
    """Return the bytes of the stored clip."""
    for extension in EXTENSIONS:
        if isinstance(sample.get(extension), bytes):
            return bytes(sample[extension])
    raise ValueError(
        f"the sample must have a member {' or '.join(EXTENSIONS)}, got {', '.join(sample)}"
    )
