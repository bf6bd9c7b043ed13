"""The highest score that a tokenizer allows: that of the references, encoded and decoded
by it."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from flallm_ds.metrics import score_by_language
from flallm_ds.metrics.columns import CEILING

HIGH_CEILING = 99.5  # BLEU-4; a ceiling below it is printed next to each score
MAX_CHANGES = 100  # stored in SPLIT.json, the most frequent first
SHOWN_CHANGES = 10  # printed


@dataclass(frozen=True)
class Ceiling:
    """BLEU-4 of a perfect model, whose tokenizer may not be able to write all that the
    references hold.

    changes: (text of a reference, what the tokenizer makes of it, how often), the most
    frequent first; only where BLEU-4 is below HIGH_CEILING.
    """

    bleu4: float
    changes: Sequence[tuple[str, str, int]] = ()

    def __str__(self) -> str:
        """One sentence; empty for a high ceiling."""
        if self.bleu4 >= HIGH_CEILING:
            return ""
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
    """The ceiling by the rule that scores hypotheses.

    written: each reference as the tokenizer writes it. Raises UserError as `score` does.
    """
    bleu4 = score_by_language(written, references, languages).bleu4
    if bleu4 >= HIGH_CEILING:
        return Ceiling(bleu4)
    # Changes of spaces are counted apart: BLEU sees only some of them, so they are listed
    # only where nothing else explains a low ceiling.
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
    """Whether stored scores have a ceiling below HIGH_CEILING, which is shown next to them."""
    ceiling_bleu4: float = scores.get(CEILING.key, 100.0)
    return ceiling_bleu4 < HIGH_CEILING


def _changes(reference: str, written: str) -> list[tuple[str, str]]:
    """(old, new) of each difference, character by character where both sides match up."""
    changes: list[tuple[str, str]] = []
    matcher = SequenceMatcher(None, reference, written, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        old, new = reference[old_start:old_end], written[new_start:new_end]
        # Tokenizers often apply NFKC, which may turn one character into several: pair each
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
