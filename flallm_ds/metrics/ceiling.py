"""Compute the highest BLEU-4 that a model can reach with its tokenizer.

A tokenizer may change text, e.g. drop characters that it does not have. The ceiling is the
BLEU-4 of the references after encoding and decoding.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from flallm_ds.metrics import score_by_language
from flallm_ds.metrics.columns import CEILING

# In BLEU-4. A ceiling below this value is shown next to each score.
HIGH_CEILING = 99.5
# Number of changes that SPLIT.json stores, and that are printed.
MAX_CHANGES = 100
SHOWN_CHANGES = 10


@dataclass(frozen=True)
class Ceiling:
    """BLEU-4 of a perfect model with a given tokenizer.

    changes: tuples (text in a reference, text after encoding and decoding, count), the most
    frequent first. Empty if BLEU-4 is at least HIGH_CEILING.
    """

    bleu4: float
    changes: Sequence[tuple[str, str, int]] = ()

    def __str__(self) -> str:
        """Return a sentence for the user; empty if the ceiling is at least HIGH_CEILING."""
        if self.bleu4 >= HIGH_CEILING:
            return ""
        if not self.changes:
            return (
                f"A perfect model would score BLEU-4 {self.bleu4:.2f}, because most "
                "references have fewer than four words."
            )
        shown = []
        for old, new, times in self.changes[:SHOWN_CHANGES]:
            shown.append(f"{old!r} -> {new!r} ({times:,})")
        why = ", ".join(shown)
        if more := len(self.changes) - len(shown):
            why += f" and {more} more"
        return (
            f"A perfect model would score BLEU-4 {self.bleu4:.2f}, because its tokenizer "
            f"changes the references: {why}."
        )


def ceiling(
    written: Sequence[str], references: Sequence[str], languages: Sequence[str]
) -> Ceiling:
    """Compute the ceiling with the same tokenization as `score`.

    written: each reference after encoding and decoding. Raises UserError like `score`.
    """
    scores = score_by_language(written, references, languages, error_rates=False)
    bleu4 = scores.bleu4
    if bleu4 >= HIGH_CEILING:
        return Ceiling(bleu4)
    # Changes of spaces alone are counted apart. BLEU ignores most of them, so they are
    # reported only if there is no other change.
    texts: Counter[tuple[str, str]] = Counter()
    spaces: Counter[tuple[str, str]] = Counter()
    for new_text, old_text in zip(written, references, strict=True):
        for old, new in _changes(" ".join(old_text.split()), " ".join(new_text.split())):
            if (old + new).strip():
                texts[old.strip(), new.strip()] += 1
            else:
                spaces[old, new] += 1
    changes = []
    for (old, new), times in (texts or spaces).most_common(MAX_CHANGES):
        changes.append((old, new, times))
    return Ceiling(bleu4, tuple(changes))


def is_low(scores: Mapping[str, Any]) -> bool:
    """Return whether stored scores have a ceiling below HIGH_CEILING."""
    ceiling_bleu4: float = scores.get(CEILING.key, 100.0)
    return ceiling_bleu4 < HIGH_CEILING


def _changes(reference: str, written: str) -> list[tuple[str, str]]:
    """Return a pair (old, new) for each difference, by characters if lengths allow it."""
    changes: list[tuple[str, str]] = []
    matcher = SequenceMatcher(None, reference, written, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        old, new = reference[old_start:old_end], written[new_start:new_end]
        # Many tokenizers apply NFKC, which may replace one character by several. Pair each
        # character with its own normal form.
        normal = [unicodedata.normalize("NFKC", character) for character in old]
        if "".join(normal) == new:
            for before, after in zip(old, normal, strict=True):
                if before != after:
                    changes.append((before, after))
        elif len(old) == len(new):
            changes.extend(zip(old, new, strict=True))
        else:
            changes.append((old, new))
    return changes
