"""What a shard folder holds, in numbers: python shards/stats.py FOLDER.

Sizes, words, lengths, and what splits share: pure functions over rows of the index, as
`iter_rows` yields them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from flallm_ds.data.index import iter_rows, load_index, read_manifest
from flallm_ds.data.text.languages import word_rule

Rows = Sequence[Mapping[str, Any]]
# Each split's rows.
Splits = Mapping[str, Rows]

# Values named in a note, and how much of a long one is shown.
_NUM_EXAMPLES = 3
_EXAMPLE_CHARS = 40
# The histogram: bins of equal width, without the last one for the longest 1 % of the clips.
_MAX_BINS = 10
_BAR_CHARS = 12
# 1, 2 and 5 in every power of ten, from 0.01 s: widths that are easy to read.
_BIN_WIDTHS_S: list[float] = np.outer(10.0 ** np.arange(-2, 5), (1, 2, 5)).ravel().tolist()


def stats(folder: Path) -> None:
    """Print clips, hours, signers, words, lengths and overlaps of every split of a shard
    folder."""
    splits = {}
    for split in read_manifest(folder)["splits"]:
        splits[split] = list(iter_rows(load_index(folder, split)))
    print(summarise(splits))
    for note in overlap_notes(splits):
        print(f"note: {note}")


def summarise(splits: Splits) -> str:
    """Return tables of sizes, words and lengths, and a histogram of lengths, as plain text.

    Empty splits are left out.
    """
    splits = {split: rows for split, rows in splits.items() if rows}
    if not splits:
        return "no clips"
    # Split the texts into words once: two tables count them.
    words: dict[str, list[list[str]]] = {}
    for split, rows in splits.items():
        words[split] = [_words(row) for row in rows]
    tables = [
        _size_table(splits),
        _word_table(words),
        _length_table(splits, words),
        _histogram(splits),
    ]
    return "\n\n".join(map("\n".join, tables))


def overlap_notes(splits: Splits) -> list[str]:
    """Say what each pair of splits shares: source videos, then signers and texts."""
    return leakage_notes(splits) + _shared(splits, {"signer": "signers", "text": "texts"})


def leakage_notes(splits: Splits) -> list[str]:
    """Return one sentence for each pair of splits that were cut from the same source videos."""
    shared = _shared(splits, {"video": "source videos"})
    return [f"{note}, which is leakage" for note in shared]


def _shared(splits: Splits, columns: Mapping[str, str]) -> list[str]:
    """Return one sentence for each pair of splits with values in common.

    columns: the columns to compare, and what their values are called. Empty values do not
    count.
    """
    notes = []
    for one, other in combinations(splits, 2):
        # One part of the sentence for each column with common values.
        shared = []
        for column, noun in columns.items():
            both = _values(splits[one], column) & _values(splits[other], column)
            if both:
                num_clips = sum(value in both for value in _column(splits[other], column))
                where = f"{num_clips:,} clips of {other}: {_some(sorted(both))}"
                shared.append(f"{len(both):,} {noun} ({where})")
        if shared:
            notes.append(f"{one} and {other} share {' and '.join(shared)}")
    return notes


def _column(rows: Rows, column: str) -> list[Any]:
    """Return a column's value in each row."""
    return [row[column] for row in rows]


def _values(rows: Rows, column: str) -> set[str]:
    """Return the different values of a column, without the empty one."""
    return set(_column(rows, column)) - {""}


def _some(names: Sequence[str]) -> str:
    """Return the first names, each cut where it is long."""
    shown = []
    for name in names[:_NUM_EXAMPLES]:
        shown.append(name if len(name) <= _EXAMPLE_CHARS else f"{name[:_EXAMPLE_CHARS]}...")
    return ", ".join(shown) + (", ..." if len(names) > _NUM_EXAMPLES else "")


_TOKENIZERS = {"13a": Tokenizer13a(), "zh": TokenizerZh(), "char": TokenizerChar()}


def _words(row: Mapping[str, Any]) -> list[str]:
    """Return the words of a text as scores count them; characters in a language without
    spaces."""
    return str(_TOKENIZERS[word_rule(row["language"])](row["text"])).split()


def _size_table(splits: Splits) -> list[str]:
    widths = (8, 11, 8, 8, 8, 9)
    lines = [_line(widths, "split", "clips", "frames", "hours", "signers", "videos", "MB")]
    for split, rows in splits.items():
        num_frames = sum(_column(rows, "num_frames"))
        hours = f"{_seconds(rows).sum() / 3600:.2f}"
        signers, videos = len(_values(rows, "signer")), len(_values(rows, "video"))
        # Of the clips alone: JSON and headers of the tars are not counted.
        megabytes = f"{sum(_column(rows, 'size')) / 1e6:,.1f}"
        cells = (len(rows), num_frames, hours, signers, videos, megabytes)
        lines.append(_line(widths, split, *cells))
    return lines


def _word_table(words: Mapping[str, list[list[str]]]) -> list[str]:
    """Return the table of words.

    Singletons occur once in their split. Unknown words do not occur in train; they are
    counted as types and as running words.
    """
    widths = (11, 11, 11, 17, 17)
    titles = ("words", "vocabulary", "singletons", "unknown types", "unknown words")
    lines = [_line(widths, "split", *titles)]
    counts: dict[str, Counter[str]] = {}
    for split, texts in words.items():
        counts[split] = Counter(chain.from_iterable(texts))
    for split, count in counts.items():
        singletons = list(count.values()).count(1)
        # Train knows its own words; without train, nothing is unknown.
        unknown = ("-", "-")
        if split != "train" and "train" in counts:
            new = count.keys() - counts["train"].keys()
            num_running = sum(count[word] for word in new)
            unknown = (_share(len(new), len(count)), _share(num_running, count.total()))
        lines.append(_line(widths, split, count.total(), len(count), singletons, *unknown))
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / max(1, whole):.1f} %)"


def _length_table(splits: Splits, words: Mapping[str, list[list[str]]]) -> list[str]:
    widths = (20, 20, 20)
    head = _line(widths, "split", "frames a clip", "seconds a clip", "words a text")
    lines = [f"{head}   (least, median, most)"]
    for split, rows in splits.items():
        frames = _range(_column(rows, "num_frames"), 0)
        seconds = _range(_seconds(rows), 1)
        num_words = _range(map(len, words[split]), 0)
        lines.append(_line(widths, split, frames, seconds, num_words))
    return lines


def _line(widths: Sequence[int], split: str, *cells: int | str) -> str:
    """Return a line of a table: the split's name, and cells set to the right of their columns."""
    texts = [f"{split:6}"]
    for cell, width in zip(cells, widths, strict=True):
        text = f"{cell:,}" if isinstance(cell, int) else cell
        texts.append(f"{text:>{width}}")
    return " ".join(texts)


def _range(values: Iterable[float], digits: int) -> str:
    """Return the least, the median and the greatest value."""
    array = np.fromiter(values, np.float64)
    least, median, most = array.min(), np.median(array), array.max()
    return f"{least:.{digits}f}, {median:.{digits}f}, {most:.{digits}f}"


def _seconds(rows: Rows) -> np.ndarray:
    """Return the length of each clip in seconds."""
    return np.array([row["num_frames"] / row["fps"] for row in rows], np.float64)


def _histogram(splits: Splits) -> list[str]:
    """Return each split's shares of clips in bins of equal width.

    Bins are in seconds, and in frames too where all clips have one rate.
    """
    # Bins hold the shorter 99 % of all clips; one more holds the rest. One very long clip
    # then does not put all others into one bin.
    seconds = {split: _seconds(rows) for split, rows in splits.items()}
    long_s = float(np.quantile(np.concatenate(list(seconds.values())), 0.99))
    width = _bin_width(long_s)
    num_bins = max(1, int(np.ceil(long_s / width - 1e-9)))
    # Each split's share of clips in each bin. A hair is added to a length, so that 1 s of
    # 25 frames belongs to the bin that begins at 1 s.
    shares_of_splits = []
    for lengths in seconds.values():
        bins = np.minimum((lengths / width + 1e-6).astype(int), num_bins)
        shares_of_splits.append(np.bincount(bins, minlength=num_bins + 1) / len(bins))
    # Shape (splits, bins).
    shares = np.stack(shares_of_splits)
    fps = _common_fps(splits)
    head = f"{'seconds':14}"
    if fps:
        head += f" {'frames':14}"
    for split in splits:
        head += f"  {split:{_BAR_CHARS + 9}}"
    lines = [head.rstrip()]
    # Bars are relative to the largest share of any split. The last bin is often empty, and
    # is left out then.
    has_longer = bool(shares[:, num_bins].any())
    for number in range(num_bins + has_longer):
        line = _bin_name(number, width, fps, last=number == num_bins)
        for share in shares[:, number]:
            bar = "#" * round(share / shares.max() * _BAR_CHARS)
            line += f"  {100 * share:5.1f} % {bar:{_BAR_CHARS + 1}}"
        lines.append(line.rstrip())
    return lines


def _bin_width(long_s: float) -> float:
    """Return the smallest width whose `_MAX_BINS` bins reach to `long_s`."""
    for width in _BIN_WIDTHS_S:
        if width * _MAX_BINS >= long_s:
            return width
    return _BIN_WIDTHS_S[-1]


def _common_fps(splits: Splits) -> float | None:
    """Return the frame rate of all clips, None where they differ."""
    rates: set[float] = set()
    for rows in splits.values():
        rates.update(round(fps, 3) for fps in _column(rows, "fps"))
    return rates.pop() if len(rates) == 1 else None


def _bin_name(number: int, width: float, fps: float | None, last: bool) -> str:
    """Return the span of a bin in seconds and, where the rate is known, in frames."""
    # The last bin has no upper end.
    low, high = number * width, (number + 1) * width
    seconds = f"{low:g} and over" if last else f"{low:g} to {high:g}"
    if not fps:
        return f"{seconds:14}"
    # The numbers of frames whose time is within the span; a hair below for rounding.
    first = int(np.ceil(low * fps - 1e-3))
    next_first = int(np.ceil(high * fps - 1e-3))
    frames = f"{first} and over" if last else f"{first} to {next_first - 1}"
    return f"{seconds:14} {frames:14}"
