"""What must hold of the table of a shard folder, which may come from anyone.

It is checked once, where it is loaded, whole columns at a time. All that follows (plans,
batches, offsets into tars) relies on it. Whether the tars hold what the table says,
`shards/verify.py` finds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# (least, most) of a clip's numbers. They leave room for any real clip and stop what no
# memory could hold.
LIMITS: dict[str, tuple[float, float]] = {
    "num_frames": (1, 2**20),  # eleven hours at 25 a second
    "height": (1, 8192),  # px; the levels of H.264 end there
    "width": (1, 8192),
    # the writers' limit; faster than any high-speed camera of signing
    "fps": (1e-3, 10_000),
}
MAX_CLIP_BYTES = 2**31  # sizes in an AVI are 32 bits wide
MAX_CLIP_S = 86_400  # a day
_BLOCK_BYTES = 2**24  # of text that is decoded at a time


def check_table(
    table: Mapping[str, np.ndarray],
    types: Mapping[str, Any],
    strings: Sequence[str],
    shard_bytes: np.ndarray,
    is_video: bool,
) -> None:
    """Raise ValueError, with the column and the row (the first is 0), unless all values
    can be used.

    types: of the columns of numbers. strings: the names of the string columns.
    shard_bytes: int64, the size of the tar with each shard number (of features: of its
    smallest view).
    """
    required = list(types)
    for name in strings:
        required += [name, f"{name}_ends"]
    for name in required:
        if name not in table:
            raise ValueError(f"it must have a column {name}, but has none")
    numbers = {name: _column(table, name, dtype) for name, dtype in types.items()}
    num_clips = len(numbers["num_frames"])
    for name, values in numbers.items():
        _must_be_one_a_clip(name, len(values), num_clips)
    for name, (least, most) in LIMITS.items():
        within = (numbers[name] >= least) & (numbers[name] <= most)  # NaN is not
        _must(within, numbers[name], f"{name} must be from {least:,} to {most:,}")

    num_frames = numbers["num_frames"]
    seconds = num_frames / numbers["fps"].astype(np.float64)
    short = seconds <= MAX_CLIP_S
    _must(short, seconds, f"num_frames / fps must be at most {MAX_CLIP_S:,} s")
    _check_places(numbers, shard_bytes)
    if is_video:
        fits = num_frames <= numbers["size"]
        _must(fits, num_frames, "num_frames must be at most size, a byte a frame")

    for name in strings:
        blob = _column(table, name, np.uint8)
        ends = _column(table, f"{name}_ends", np.int64)
        _must_be_one_a_clip(f"{name}_ends", len(ends), num_clips)
        _check_strings(name, blob, ends)
        if name == "key":
            _check_keys(blob, ends)


def _column(table: Mapping[str, np.ndarray], name: str, dtype: Any) -> np.ndarray:
    values = table[name]
    if values.dtype != dtype or values.ndim != 1:
        raise ValueError(
            f"column {name} must have one dimension of {np.dtype(dtype).name}, got "
            f"{values.ndim} of {values.dtype.name}"
        )
    return values


def _must_be_one_a_clip(name: str, found: int, num_clips: int) -> None:
    if found != num_clips:
        raise ValueError(
            f"column {name} must have one entry a clip ({num_clips:,}, as num_frames has), "
            f"got {found:,}"
        )


def _must(holds: np.ndarray, values: np.ndarray, sentence: str) -> None:
    """Raise ValueError with the first row where it does not hold."""
    if not holds.all():
        row = int(np.argmin(holds))
        value = values[row].item()
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        raise ValueError(f"{sentence}, got {shown} in row {row}")


def _check_places(numbers: Mapping[str, np.ndarray], shard_bytes: np.ndarray) -> None:
    """Every clip lies within its tar, and none within another."""
    shard, offset, size = numbers["shard"], numbers["offset"], numbers["size"]
    last = len(shard_bytes) - 1
    within = (shard >= 0) & (shard <= last)
    _must(within, shard, f"shard must be from 0 to {last:,}, the last of the split's tars")
    tar_bytes = shard_bytes[shard]
    within = (offset >= 0) & (offset <= tar_bytes)
    _must(within, offset, "offset must lie within the clip's tar")
    within = (size >= 1) & (size <= MAX_CLIP_BYTES)
    _must(within, size, f"size must be from 1 to {MAX_CLIP_BYTES:,}")
    within = size <= tar_bytes - offset  # no sum: it could overflow
    _must(within, size, "size must end within the clip's tar")

    # Clips in order of shard and offset: each must end before the next one begins.
    order = np.lexsort((offset, shard))
    before, after = order[:-1], order[1:]
    other_shard = shard[before] != shard[after]
    apart = other_shard | (offset[before] + size[before] <= offset[after])
    if not apart.all():
        place = int(np.argmin(apart))
        raise ValueError(
            "offset must lie behind the clip before it in the tar, got "
            f"{offset[after[place]]:,} in row {after[place]}, which overlaps with row "
            f"{before[place]}"
        )


def _check_strings(name: str, blob: np.ndarray, ends: np.ndarray) -> None:
    """Ends ascend to the end of the blob, and every string is UTF-8."""
    begins = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    ascending = (ends >= begins) & (ends <= len(blob))
    _must(ascending, ends, f"{name}_ends must ascend, and end within {name}")
    if (ends[-1] if len(ends) else 0) != len(blob):
        raise ValueError(
            f"{name}_ends must reach the end of {name}, which has {len(blob):,} bytes"
        )
    if not (blob & 0x80).any():
        return  # ASCII
    # A row that begins within a character makes the row before it end within one.
    cut = np.append(blob, np.uint8(0))[begins] & 0xC0 == 0x80
    first = 0
    while first < len(ends):
        # Whole strings, about a block of them.
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + _BLOCK_BYTES)))
        row = None
        try:
            blob[begins[first] : ends[last - 1]].tobytes().decode("utf-8")
            if cut[first:last].any():
                row = first + int(np.argmax(cut[first:last]))
        except UnicodeDecodeError as error:
            row = int(np.searchsorted(ends, begins[first] + error.start, side="right"))
        if row is not None:
            raise ValueError(f"{name} must be UTF-8, but is not in row {row}")
        first = last


def _check_keys(blob: np.ndarray, ends: np.ndarray) -> None:
    """Every key is there, and once."""
    content = blob.tobytes()
    seen: dict[bytes, int] = {}
    begin = 0
    for row, end in enumerate(ends.tolist()):
        key = content[begin:end]
        begin = end
        must = "key must be there and be once in a split"
        if not key:
            raise ValueError(f"{must}, but is empty in row {row}")
        first = seen.setdefault(key, row)
        if first != row:
            raise ValueError(f"{must}, got {key.decode()!r} in rows {first} and {row}")
