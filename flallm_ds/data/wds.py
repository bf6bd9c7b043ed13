"""The decoder for a loop of one's own:
`webdataset.WebDataset(tars).map(decode_clip(keep_every=4))`.

It reads what our tars hold and nothing else; nothing is unpickled. Neither torch nor
webdataset is imported.
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
    """What turns a sample of undecoded members into a clip; it can be pickled into workers.

    The first four are those of `sampling.FrameSampling`: which frames are kept, before
    any is decoded. train: keep a random frame of each group, not the first. It is drawn
    from Python's `random`, which a DataLoader seeds differently in each worker.

    A clip is a dict of `key`, `frames` (uint8 RGB of shape (T, height, width, 3)),
    `picks` (int64 (T,): the frames' numbers in the stored clip), everything in the clip's
    JSON (text, id, signer, video, language, num_frames, fps, width, height, gloss), and
    webdataset's own `__key__` and `__url__`. Raises ValueError, here for impossible
    values, there for a broken clip: with its key, its tar and why.
    """
    sampling = FrameSampling(keep_every, max_frames, target_fps, cap)
    return partial(_decode, sampling, train)


def _decode(
    sampling: FrameSampling, train: bool, sample: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        facts, member = _facts(sample), _member(sample)
        if facts["num_frames"] > len(member):
            raise ValueError(
                f"it cannot hold {facts['num_frames']} frames in {len(member)} bytes"
            )
        rng = np.random.default_rng(random.getrandbits(64)) if train else None
        picks = sampling.picks(facts["num_frames"], facts["fps"], rng)
        hw = facts["height"], facts["width"]
        frames = np.empty((len(picks), *hw, 3), np.uint8)
        decode_frames(member, picks, facts["num_frames"], frames, hw)
    except (ValueError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"a clip must decode, but {sample.get('__key__')} of {sample.get('__url__')} "
            f"does not: {error}"
        ) from error
    clip = facts | {"key": sample["__key__"], "frames": frames, "picks": picks}
    for name, value in sample.items():
        if name.startswith("__"):  # webdataset's own
            clip[name] = value
    return clip


def _facts(sample: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(sample.get("json"), bytes):
        raise ValueError("it must come with its JSON as bytes, without .decode() before")
    facts = json.loads(sample["json"])
    if not isinstance(facts, dict):
        raise ValueError("its JSON must be an object")
    for name, kind in _FACTS.items():
        if not isinstance(facts.get(name), kind):
            raise ValueError(
                f"its JSON must have a {name} of the right type, but has "
                f"{facts.get(name)!r}"
            )
    for name, (least, most) in LIMITS.items():
        if not least <= facts[name] <= most:
            raise ValueError(
                f"its {name} must be from {least:,} to {most:,}, got {facts[name]}"
            )
    return facts


def _member(sample: Mapping[str, Any]) -> bytes:
    for extension in EXTENSIONS:
        if isinstance(sample.get(extension), bytes):
            return bytes(sample[extension])
    raise ValueError(
        f"it must have a member {' or '.join(EXTENSIONS)}, but has {', '.join(sample)}"
    )
