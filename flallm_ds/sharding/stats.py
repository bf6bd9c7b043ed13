"""What a shard folder holds, in numbers: python shards/stats.py FOLDER.

Sizes, words, lengths, and what splits share: pure functions over rows of the index, as `iter_rows` yields
them.
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
    """Print clips, hours, signers, words, lengths and overlaps of every split of a shard folder."""
    names = read_manifest(folder)["splits"]
    splits = {split: list(iter_rows(load_index(folder, split))) for split in names}
    print(summarise(splits))
    for note in overlap_notes(splits):
        print(f"note: {note}")


def summarise(splits: Splits) -> str:
    """Sizes, words, lengths and a histogram of lengths as tables of plain text; empty splits are left out."""
    splits = {split: rows for split, rows in splits.items() if rows}
    if not splits:
        return "no clips"
    words = {split: [_words(row) for row in rows] for split, rows in splits.items()}
    parts = [_size_table(splits), _word_table(words), _length_table(splits, words), _histogram(splits)]
    return "\n\n".join("\n".join(part) for part in parts)


def overlap_notes(splits: Splits) -> list[str]:
    """What each pair of splits shares, with counts and examples: source videos, then signers and texts."""
    return leakage_notes(splits) + _shared(splits, {"signer": "signers", "text": "texts"})


def leakage_notes(splits: Splits) -> list[str]:
    """One sentence for each pair of splits that were cut from the same source videos."""
    return [f"{note}, which is leakage" for note in _shared(splits, {"video": "source videos"})]


def _shared(splits: Splits, columns: Mapping[str, str]) -> list[str]:
    """One sentence for each pair of splits with values in common; columns: name -> what they are called."""
    notes = []
    for one, other in combinations(splits, 2):
        shared = []
        for column, noun in columns.items():
            both = {row[column] for row in splits[one]} & {row[column] for row in splits[other]} - {""}
            if both:
                num_clips = sum(row[column] in both for row in splits[other])
                shared.append(f"{len(both):,} {noun} ({num_clips:,} clips of {other}: {_some(sorted(both))})")
        if shared:
            notes.append(f"{one} and {other} share {' and '.join(shared)}")
    return notes


def _some(names: Sequence[str]) -> str:
    shown = [
        name if len(name) <= _EXAMPLE_CHARS else f"{name[:_EXAMPLE_CHARS]}..."
        for name in names[:_NUM_EXAMPLES]
    ]
    return ", ".join(shown) + (", ..." if len(names) > _NUM_EXAMPLES else "")


_TOKENIZERS = {"13a": Tokenizer13a(), "zh": TokenizerZh(), "char": TokenizerChar()}


def _words(row: Mapping[str, Any]) -> list[str]:
    """The words of a text as scores count them; characters in a language without spaces."""
    return str(_TOKENIZERS[word_rule(row["language"])](row["text"])).split()


def _size_table(splits: Splits) -> list[str]:
    widths = (8, 11, 8, 8, 8, 9)
    lines = [_line(widths, "split", "clips", "frames", "hours", "signers", "videos", "MB")]
    for split, rows in splits.items():
        num_frames = sum(row["num_frames"] for row in rows)
        hours = f"{_seconds(rows).sum() / 3600:.2f}"
        signers, videos = (len({row[column] for row in rows} - {""}) for column in ("signer", "video"))
        megabytes = f"{sum(row['size'] for row in rows) / 1e6:,.1f}"
        lines.append(_line(widths, split, len(rows), num_frames, hours, signers, videos, megabytes))
    return lines


def _word_table(words: Mapping[str, list[list[str]]]) -> list[str]:
    """Singletons occur once in their split. Unknown: not in train, counted as types and as running words."""
    widths = (11, 11, 11, 17, 17)
    lines = [_line(widths, "split", "words", "vocabulary", "singletons", "unknown types", "unknown words")]
    counts = {split: Counter(word for text in texts for word in text) for split, texts in words.items()}
    for split, count in counts.items():
        singletons = sum(times == 1 for times in count.values())
        unknown = ("-", "-")
        if split != "train" and "train" in counts:
            new = count.keys() - counts["train"].keys()
            unknown = (_share(len(new), len(count)), _share(sum(count[w] for w in new), count.total()))
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
        lines.append(_line(widths, split, frames, seconds, _range(map(len, words[split]), 0)))
    return lines


def _line(widths: Sequence[int], split: str, *cells: int | str) -> str:
    texts = (f"{cell:,}" if isinstance(cell, int) else cell for cell in cells)
    return " ".join([f"{split:6}", *(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))])


def _range(values: Iterable[float], digits: int) -> str:
    array = np.fromiter(values, np.float64)
    return ", ".join(f"{value:.{digits}f}" for value in (array.min(), np.median(array), array.max()))


def _seconds(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["num_frames"] / row["fps"] for row in rows], np.float64)


def _histogram(splits: Splits) -> list[str]:
    """Each split's shares of clips in bins of equal width; in frames too, where all clips have one rate."""
    seconds = {split: _seconds(rows) for split, rows in splits.items()}
    long_s = float(np.quantile(np.concatenate(list(seconds.values())), 0.99))
    width = next((w for w in _BIN_WIDTHS_S if w * _MAX_BINS >= long_s), _BIN_WIDTHS_S[-1])
    num_bins = max(1, int(np.ceil(long_s / width - 1e-9)))
    rates = {round(row["fps"], 3) for rows in splits.values() for row in rows}
    fps = rates.pop() if len(rates) == 1 else None
    # A hair above the clip's length: 1 s of 25 frames belongs to the bin that begins at 1 s.
    bins = {s: np.minimum((lengths / width + 1e-6).astype(int), num_bins) for s, lengths in seconds.items()}
    shares = {s: np.bincount(found, minlength=num_bins + 1) / len(found) for s, found in bins.items()}
    most = max(float(share.max()) for share in shares.values())
    columns = "".join(f"  {split:{_BAR_CHARS + 9}}" for split in splits)
    lines = [f"{'seconds':14} {'frames':14}{columns}" if fps else f"{'seconds':14}{columns}"]
    for number in range(num_bins + any(share[num_bins] for share in shares.values())):
        low, high = number * width, (number + 1) * width
        last = number == num_bins
        line = f"{low:g} and over" if last else f"{low:g} to {high:g}"
        if fps:
            first, next_first = (int(np.ceil(edge * fps - 1e-3)) for edge in (low, high))
            frames = f"{first} and over" if last else f"{first} to {next_first - 1}"
            line = f"{line:14} {frames:14}"
        else:
            line = f"{line:14}"
        for share in shares.values():
            bar = "#" * round(share[number] / most * _BAR_CHARS)
            line += f"  {100 * share[number]:5.1f} % {bar:{_BAR_CHARS + 1}}"
        lines.append(line)
    return [line.rstrip() for line in lines]
