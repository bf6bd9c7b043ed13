"""Print statistics of a shard folder: python shards/stats.py FOLDER.

Pure functions compute sizes, words, lengths and overlaps from rows of the index, as
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
# The rows of each split.
Splits = Mapping[str, Rows]

# Values named in a note, and characters shown of each.
_NUM_EXAMPLES = 3
_EXAMPLE_CHARS = 40
# The histogram: the number of bins of equal width, without the bin for the longest 1 % of
# the clips.
_MAX_BINS = 10
_BAR_CHARS = 12
# 1, 2 and 5 in every power of ten, from 0.01 s: widths that are easy to read.
_BIN_WIDTHS_S: list[float] = np.outer(10.0 ** np.arange(-2, 5), (1, 2, 5)).ravel().tolist()


def stats(folder: Path) -> None:
    """Print clips, hours, signers, words, lengths and overlaps of the splits."""
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
    # Two tables count words: split the texts only once.
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
    """Return a note for each pair of splits with common source videos, signers or texts."""
    return leakage_notes(splits) + _shared(splits, {"signer": "signers", "text": "texts"})


def leakage_notes(splits: Splits) -> list[str]:
    """Return a note for each pair of splits with common source videos."""
    shared = _shared(splits, {"video": "source videos"})
    return [f"{note}, which is leakage" for note in shared]


def _shared(splits: Splits, columns: Mapping[str, str]) -> list[str]:
    """Return a note for each pair of splits with common values.

    columns: the columns to compare, each with a noun for its values. Empty values are
    ignored.
    """
    # Count the clips of the later split: those are the ones to remove from dev or test.
    notes = []
    for one, other in combinations(splits, 2):
        # One part of the sentence for each column with common values.
        shared = []
        for column, noun in columns.items():
            both = _values(splits[one], column) & _values(splits[other], column)
            if both:
                num_clips = sum(value in both for value in _column(splits[other], column))
                where = f"{num_clips:,} clips of {other}: {_examples(sorted(both))}"
                shared.append(f"{len(both):,} {noun} ({where})")
        if shared:
            notes.append(f"{one} and {other} share {' and '.join(shared)}")
    return notes


def _column(rows: Rows, column: str) -> list[Any]:
    """Return the value of a column in each row."""
    return [row[column] for row in rows]


def _values(rows: Rows, column: str) -> set[str]:
    """Return the distinct values of a column, without the empty one."""
    return set(_column(rows, column)) - {""}


def _examples(names: Sequence[str]) -> str:
    """Return the first names, shortened if they are long."""
    shown = []
    for name in names[:_NUM_EXAMPLES]:
        shown.append(name if len(name) <= _EXAMPLE_CHARS else f"{name[:_EXAMPLE_CHARS]}...")
    return ", ".join(shown) + (", ..." if len(names) > _NUM_EXAMPLES else "")


# The tokenizers of sacreBLEU, by the word rule of a language.
_TOKENIZERS = {"13a": Tokenizer13a(), "zh": TokenizerZh(), "char": TokenizerChar()}


def _words(row: Mapping[str, Any]) -> list[str]:
    """Return the words of a text, split as for BLEU.

    In a language without spaces, each character is a word.
    """
    return str(_TOKENIZERS[word_rule(row["language"])](row["text"])).split()


def _size_table(splits: Splits) -> list[str]:
    """Return the table of clips, frames, hours, signers, videos and megabytes."""
    widths = (8, 11, 8, 8, 8, 9)
    lines = [_line(widths, "split", "clips", "frames", "hours", "signers", "videos", "MB")]
    for split, rows in splits.items():
        num_frames = sum(_column(rows, "num_frames"))
        hours = f"{_seconds(rows).sum() / 3600:.2f}"
        signers, videos = len(_values(rows, "signer")), len(_values(rows, "video"))
        # Only the clips, without the JSON and the headers in the tars.
        megabytes = f"{sum(_column(rows, 'size')) / 1e6:,.1f}"
        cells = (len(rows), num_frames, hours, signers, videos, megabytes)
        lines.append(_line(widths, split, *cells))
    return lines


def _word_table(words: Mapping[str, list[list[str]]]) -> list[str]:
    """Return the table of words.

    Singletons occur once in their split. Unknown words do not occur in train. They are
    counted once each (types) and with all repetitions (words).
    """
    widths = (11, 11, 11, 17, 17)
    titles = ("words", "vocabulary", "singletons", "unknown types", "unknown words")
    lines = [_line(widths, "split", *titles)]
    counts: dict[str, Counter[str]] = {}
    for split, texts in words.items():
        counts[split] = Counter(chain.from_iterable(texts))
    for split, count in counts.items():
        singletons = list(count.values()).count(1)
        # Without a training split, no word is unknown.
        unknown = ("-", "-")
        if split != "train" and "train" in counts:
            new = count.keys() - counts["train"].keys()
            num_running = sum(count[word] for word in new)
            unknown = (_share(len(new), len(count)), _share(num_running, count.total()))
        lines.append(_line(widths, split, count.total(), len(count), singletons, *unknown))
    return lines


def _share(part: int, whole: int) -> str:
    """Return a count and its percentage."""
    return f"{part:,} ({100 * part / max(1, whole):.1f} %)"


def _length_table(splits: Splits, words: Mapping[str, list[list[str]]]) -> list[str]:
    """Return the table of lengths in frames, seconds and words."""
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
    """Return a line of a table: the name of the split, and right-aligned cells."""
    texts = [f"{split:6}"]
    for cell, width in zip(cells, widths, strict=True):
        text = f"{cell:,}" if isinstance(cell, int) else cell
        texts.append(f"{text:>{width}}")
    return " ".join(texts)


def _range(values: Iterable[float], digits: int) -> str:
    """Return the minimum, the median and the maximum."""
    array = np.fromiter(values, np.float64)
    least, median, most = array.min(), np.median(array), array.max()
    return f"{least:.{digits}f}, {median:.{digits}f}, {most:.{digits}f}"


def _seconds(rows: Rows) -> np.ndarray:
    """Return the length of each clip in seconds, float64 of shape (clips,)."""
    return np.array([row["num_frames"] / row["fps"] for row in rows], np.float64)


def _histogram(splits: Splits) -> list[str]:
    """Return a histogram of the lengths of the clips of each split.

    Bins have equal width in seconds. If all clips have the same frame rate, the bins are
    also shown in frames.
    """
    # The bins cover the shorter 99 % of all clips, and one more bin has the rest. Otherwise
    # a single long clip would make all bins too wide.
    seconds = {split: _seconds(rows) for split, rows in splits.items()}
    long_s = float(np.quantile(np.concatenate(list(seconds.values())), 0.99))
    fps = _common_fps(splits)
    width = _bin_width(long_s, fps)
    num_bins = max(1, int(np.ceil(long_s / width - 1e-9)))
    # The fraction of clips in each bin. A small value is added against rounding: a clip of
    # exactly 1 s belongs to the bin that begins at 1 s.
    shares_of_splits = []
    for lengths in seconds.values():
        bins = np.minimum((lengths / width + 1e-6).astype(int), num_bins)
        shares_of_splits.append(np.bincount(bins, minlength=num_bins + 1) / len(bins))
    # Shape (splits, bins).
    shares = np.stack(shares_of_splits)
    head = f"{'seconds':14}"
    if fps:
        head += f" {'frames':14}"
    for split in splits:
        head += f"  {split:{_BAR_CHARS + 9}}"
    lines = [head.rstrip()]
    # Bars are relative to the largest bin of all splits. The last bin is left out if it is
    # empty.
    has_longer = bool(shares[:, num_bins].any())
    for number in range(num_bins + has_longer):
        line = _bin_name(number, width, fps, last=number == num_bins)
        for share in shares[:, number]:
            bar = "#" * round(share / shares.max() * _BAR_CHARS)
            line += f"  {100 * share:5.1f} % {bar:{_BAR_CHARS + 1}}"
        lines.append(line.rstrip())
    return lines


def _bin_width(long_s: float, fps: float | None) -> float:
    """Return the smallest width with which `_MAX_BINS` bins cover `long_s` seconds.

    fps: of all clips, if it is the same. No bin is then shorter than a frame, because some
    bins would contain no whole number of frames.
    """
    least_s = max(long_s / _MAX_BINS, 1 / fps if fps else 0)
    for width in _BIN_WIDTHS_S:
        if width >= least_s * (1 - 1e-9):
            return width
    return _BIN_WIDTHS_S[-1]


def _common_fps(splits: Splits) -> float | None:
    """Return the frame rate of all clips, None if they have different ones."""
    rates: set[float] = set()
    for rows in splits.values():
        rates.update(round(fps, 3) for fps in _column(rows, "fps"))
    return rates.pop() if len(rates) == 1 else None


def _bin_name(number: int, width: float, fps: float | None, last: bool) -> str:
    """Return the range of a bin in seconds and, with a frame rate, in frames."""
    low, high = number * width, (number + 1) * width
    seconds = f"{low:g} and over" if last else f"{low:g} to {high:g}"
    if not fps:
        return f"{seconds:14}"
    # The smallest number of frames in this bin and in the next. A small value is subtracted
    # against rounding.
    first = int(np.ceil(low * fps - 1e-3))
    next_first = int(np.ceil(high * fps - 1e-3))
    if last:
        frames = f"{first} and over"
    elif next_first - 1 == first:
        frames = f"{first}"
    else:
        frames = f"{first} to {next_first - 1}"
    return f"{seconds:14} {frames:14}"
