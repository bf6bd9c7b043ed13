"""What a shard folder holds, in numbers: python shards/stats.py FOLDER.

Sizes, words, lengths, and what splits share: pure functions over rows of the index, as
`iter_rows` yields them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from flallm_ds.data.index import iter_rows, load_index, read_manifest
from flallm_ds.data.text.languages import word_rule

Splits = Mapping[str, Sequence[Mapping[str, Any]]]  # each split's rows

_NUM_EXAMPLES = 3
_EXAMPLE_CHARS = 40
_MAX_BINS = 10  # of the histogram, and one more for the longest hundredth
_BAR_CHARS = 12
_BIN_WIDTHS_S = [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]


def stats(folder: Path) -> None:
    """Print clips, hours, signers, words, lengths and overlaps of every split of a shard
    folder."""
    names = read_manifest(folder)["splits"]
    splits = {split: list(iter_rows(load_index(folder, split))) for split in names}
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
    words: dict[str, list[list[str]]] = {}
    for split, rows in splits.items():
        words[split] = [_words(row) for row in rows]
    tables = [_size_table(splits), _word_table(words), _length_table(splits, words)]
    tables.append(_histogram(splits))
    return "\n\n".join("\n".join(table) for table in tables)


def overlap_notes(splits: Splits) -> list[str]:
    """Say what each pair of splits shares: source videos, then signers and texts."""
    return leakage_notes(splits) + _shared(splits, {"signer": "signers", "text": "texts"})


def leakage_notes(splits: Splits) -> list[str]:
    """Return one sentence for each pair of splits that were cut from the same source videos."""
    return [
        f"{note}, which is leakage" for note in _shared(splits, {"video": "source videos"})
    ]


def _shared(splits: Splits, columns: Mapping[str, str]) -> list[str]:
    """Return one sentence for each pair of splits with values in common.

    columns: the columns to compare, and what their values are called. Empty values do not
    count.
    """
    notes = []
    for one, other in combinations(splits, 2):
        shared = []
        for column, noun in columns.items():
            both = _values(splits[one], column) & _values(splits[other], column)
            if both:
                num_clips = sum(row[column] in both for row in splits[other])
                where = f"{num_clips:,} clips of {other}: {_some(sorted(both))}"
                shared.append(f"{len(both):,} {noun} ({where})")
        if shared:
            notes.append(f"{one} and {other} share {' and '.join(shared)}")
    return notes


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> set[str]:
    """Return the different values of a column, without the empty one."""
    return {row[column] for row in rows} - {""}


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
        num_frames = sum(row["num_frames"] for row in rows)
        hours = f"{_seconds(rows).sum() / 3600:.2f}"
        signers, videos = len(_values(rows, "signer")), len(_values(rows, "video"))
        megabytes = f"{sum(row['size'] for row in rows) / 1e6:,.1f}"
        lines.append(
            _line(widths, split, len(rows), num_frames, hours, signers, videos, megabytes)
        )
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
        counts[split] = Counter(word for text in texts for word in text)
    for split, count in counts.items():
        singletons = sum(times == 1 for times in count.values())
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
        frames = _range([row["num_frames"] for row in rows], 0)
        seconds = _range(_seconds(rows), 1)
        lines.append(
            _line(widths, split, frames, seconds, _range(map(len, words[split]), 0))
        )
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
    shown = (array.min(), np.median(array), array.max())
    return ", ".join(f"{value:.{digits}f}" for value in shown)


def _seconds(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["num_frames"] / row["fps"] for row in rows], np.float64)


def _histogram(splits: Splits) -> list[str]:
    """Return each split's shares of clips in bins of equal width.

    Bins are in seconds, and in frames too where all clips have one rate.
    """
    # Bins that hold the shorter 99 % of all clips; one more holds the rest.
    seconds = {split: _seconds(rows) for split, rows in splits.items()}
    long_s = float(np.quantile(np.concatenate(list(seconds.values())), 0.99))
    wide_enough = [width for width in _BIN_WIDTHS_S if width * _MAX_BINS >= long_s]
    width = wide_enough[0] if wide_enough else _BIN_WIDTHS_S[-1]
    num_bins = max(1, int(np.ceil(long_s / width - 1e-9)))
    # Each split's share of clips in each bin.
    shares: dict[str, np.ndarray] = {}
    for split, lengths in seconds.items():
        # A hair above the clip's length: 1 s of 25 frames belongs to the bin that begins
        # at 1 s.
        bins = np.minimum((lengths / width + 1e-6).astype(int), num_bins)
        shares[split] = np.bincount(bins, minlength=num_bins + 1) / len(bins)
    most = max(float(share.max()) for share in shares.values())
    rates = {round(row["fps"], 3) for rows in splits.values() for row in rows}
    fps = rates.pop() if len(rates) == 1 else None
    columns = "".join(f"  {split:{_BAR_CHARS + 9}}" for split in splits)
    lines = [
        f"{'seconds':14} {'frames':14}{columns}" if fps else f"{'seconds':14}{columns}"
    ]
    has_longer = any(share[num_bins] for share in shares.values())
    for number in range(num_bins + has_longer):
        line = _bin_name(number, width, fps, last=number == num_bins)
        for share in shares.values():
            bar = "#" * round(share[number] / most * _BAR_CHARS)
            line += f"  {100 * share[number]:5.1f} % {bar:{_BAR_CHARS + 1}}"
        lines.append(line)
    return [line.rstrip() for line in lines]


def _bin_name(number: int, width: float, fps: float | None, last: bool) -> str:
    """Return the span of a bin in seconds and, where the rate is known, in frames."""
    low, high = number * width, (number + 1) * width
    seconds = f"{low:g} and over" if last else f"{low:g} to {high:g}"
    if not fps:
        return f"{seconds:14}"
    first = int(np.ceil(low * fps - 1e-3))
    next_first = int(np.ceil(high * fps - 1e-3))
    frames = f"{first} and over" if last else f"{first} to {next_first - 1}"
    return f"{seconds:14} {frames:14}"
