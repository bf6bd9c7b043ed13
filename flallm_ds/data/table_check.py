"""Check the table of a shard folder, which may come from anyone.

The table is checked once, when it is loaded, a column at a time. Plans, batches and reads
from tars rely on the checks. `shards/verify.py` checks that the tars match the table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# (minimum, maximum) of the numbers of a clip. Every real clip is within these limits, and
# memory suffices for them.
LIMITS: dict[str, tuple[float, float]] = {
    "num_frames": (1, 2**20),  # eleven hours at 25 frames a second
    "height": (1, 8192),  # in pixels; the largest size of H.264
    "width": (1, 8192),
    # the limit of `pack_frames` and `encode_h264`
    "fps": (1e-3, 10_000),
}
MAX_CLIP_BYTES = 2**31  # sizes in an AVI are 32 bits wide
MAX_CLIP_S = 86_400  # a day
_BLOCK_BYTES = 2**24  # bytes of text that are decoded at a time


def check_table(
    table: Mapping[str, np.ndarray],
    types: Mapping[str, Any],
    strings: Sequence[str],
    shard_bytes: np.ndarray,
    is_video: bool,
) -> None:
    """Raise ValueError if a value of the table is invalid.

    The message has the column and the row; the first row is 0.
    types: the columns of numbers and their types.
    strings: the names of the string columns.
    shard_bytes: int64, the size of each tar (for cached features: of its smallest view).
    is_video: whether the clips are videos, not cached features.
    """
    # A string column has two arrays: all bytes in a row, and where each string ends.
    required = list(types)
    for name in strings:
        required += [name, f"{name}_ends"]
    for name in required:
        if name not in table:
            raise ValueError(f"the table must have a column {name}, got none")
    numbers = {name: _column(table, name, dtype) for name, dtype in types.items()}
    num_clips = len(numbers["num_frames"])
    for name, values in numbers.items():
        _check_length(name, len(values), num_clips)
    for name, (least, most) in LIMITS.items():
        within = (numbers[name] >= least) & (numbers[name] <= most)  # NaN is not
        _must(within, numbers[name], f"{name} must be from {least:,} to {most:,}")

    num_frames = numbers["num_frames"]
    # Two valid numbers can still give an impossible length.
    seconds = num_frames / numbers["fps"].astype(np.float64)
    short = seconds <= MAX_CLIP_S
    _must(short, seconds, f"num_frames / fps must be at most {MAX_CLIP_S:,} s")
    _check_places(numbers, shard_bytes)
    # A frame takes at least a byte, so a small clip cannot ask for much memory.
    if is_video:
        fits = num_frames <= numbers["size"]
        _must(fits, num_frames, "num_frames must be at most size, a byte a frame")

    for name in strings:
        blob = _column(table, name, np.uint8)
        ends = _column(table, f"{name}_ends", np.int64)
        _check_length(f"{name}_ends", len(ends), num_clips)
        _check_strings(name, blob, ends)
        if name == "key":
            _check_keys(blob, ends)


def _column(table: Mapping[str, np.ndarray], name: str, dtype: Any) -> np.ndarray:
    """Return a column; raise ValueError if it has another type or shape."""
    values = table[name]
    if values.dtype != dtype or values.ndim != 1:
        raise ValueError(
            f"column {name} must have 1 dimension of {np.dtype(dtype).name}, got "
            f"{values.ndim} of {values.dtype.name}"
        )
    return values


def _check_length(name: str, found: int, num_clips: int) -> None:
    """Raise ValueError unless a column has one entry for each clip."""
    if found != num_clips:
        raise ValueError(
            f"column {name} must have one entry for each clip ({num_clips:,}, as num_frames "
            f"has), got {found:,}"
        )


def _must(holds: np.ndarray, values: np.ndarray, sentence: str) -> None:
    """Raise ValueError for the first row where `holds` is false.

    sentence: `NAME must CONDITION`; the value and the row follow.
    """
    if not holds.all():
        row = int(np.argmin(holds))
        value = values[row].item()
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        raise ValueError(f"{sentence}, got {shown} in row {row}")


def _check_places(numbers: Mapping[str, np.ndarray], shard_bytes: np.ndarray) -> None:
    """Raise ValueError unless all clips are within their tars and do not overlap."""
    shard, offset, size = numbers["shard"], numbers["offset"], numbers["size"]
    last = len(shard_bytes) - 1
    within = (shard >= 0) & (shard <= last)
    _must(within, shard, f"shard must be from 0 to {last:,}, the last of the split's tars")
    tar_bytes = shard_bytes[shard]
    within = (offset >= 0) & (offset <= tar_bytes)
    _must(within, offset, "offset must be within the clip's tar")
    within = (size >= 1) & (size <= MAX_CLIP_BYTES)
    _must(within, size, f"size must be from 1 to {MAX_CLIP_BYTES:,}")
    within = size <= tar_bytes - offset  # a sum could overflow
    _must(within, size, "size must end within the clip's tar")

    # In the order of shard and offset, each clip must end before the next one begins.
    order = np.lexsort((offset, shard))
    before, after = order[:-1], order[1:]
    other_shard = shard[before] != shard[after]
    apart = other_shard | (offset[before] + size[before] <= offset[after])
    if not apart.all():
        place = int(np.argmin(apart))
        raise ValueError(
            "offset must be behind the previous clip in the tar, got "
            f"{offset[after[place]]:,} in row {after[place]}, which overlaps with row "
            f"{before[place]}"
        )


def _check_strings(name: str, blob: np.ndarray, ends: np.ndarray) -> None:
    """Raise ValueError unless the ends ascend to the blob's end and strings are UTF-8."""
    begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    ascending = (ends >= begins) & (ends <= len(blob))
    _must(ascending, ends, f"{name}_ends must ascend, and end within {name}")
    last_end = int(ends[-1]) if len(ends) else 0
    if last_end != len(blob):
        raise ValueError(
            f"{name}_ends must reach the end of {name} ({len(blob):,} bytes), got "
            f"{last_end:,}"
        )
    if not (blob & 0x80).any():
        return  # ASCII

    # Decode several strings at once. That does not find a row that begins within a
    # character, after a row that ends in it: `cut` marks rows that begin so.
    cut = np.append(blob, np.uint8(0))[begins] & 0xC0 == 0x80
    first = 0
    while first < len(ends):
        # As many complete strings as fit into a block, at least one.
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + _BLOCK_BYTES)))
        row = None
        try:
            blob[begins[first] : ends[last - 1]].tobytes().decode("utf-8")
            if cut[first:last].any():
                row = first + int(np.argmax(cut[first:last]))
        except UnicodeDecodeError as error:
            row = int(np.searchsorted(ends, begins[first] + error.start, side="right"))
        if row is not None:
            raise ValueError(f"{name} must be UTF-8, got other bytes in row {row}")
        first = last


def _check_keys(blob: np.ndarray, ends: np.ndarray) -> None:
    """Raise ValueError unless the keys are unique and not empty."""
    content = blob.tobytes()
    seen: dict[bytes, int] = {}
    begin = 0
    for row, end in enumerate(ends.tolist()):
        key = content[begin:end]
        begin = end
        must = "key must be unique in a split and not empty"
        if not key:
            raise ValueError(f"{must}, got '' in row {row}")
        first = seen.setdefault(key, row)
        if first != row:
            raise ValueError(f"{must}, got {key.decode()!r} in rows {first} and {row}")
