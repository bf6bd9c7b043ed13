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
        listed = [
            f"{old!r} -> {new!r} ({times:,})" for old, new, times in self.changes[:10]
        ]
        more = len(self.changes) - len(listed)
        why = ", ".join(listed) + (f" and {more} more" if more else "")
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
    texts: Counter[tuple[str, str]] = Counter()
    spaces: Counter[tuple[str, str]] = Counter()  # of which BLEU sees only some
    for new_text, old_text in zip(written, references, strict=True):
        for old, new in _changes(" ".join(old_text.split()), " ".join(new_text.split())):
            if (old + new).strip():
                texts[old.strip(), new.strip()] += 1
            else:
                spaces[old, new] += 1
    found = (texts or spaces).most_common(100)
    return Ceiling(bleu4, tuple((old, new, times) for (old, new), times in found))


def is_low(scores: Mapping[str, Any]) -> bool:
    """Whether stored scores have a ceiling below HIGH_CEILING, which is shown next to them."""
    ceiling_bleu4: float = scores.get(CEILING.key, 100.0)
    return ceiling_bleu4 < HIGH_CEILING


def _changes(reference: str, written: str) -> list[tuple[str, str]]:
    """(old, new) of each difference, character by character where both sides match up."""
    found = []
    for kind, a, b, c, d in SequenceMatcher(
        None, reference, written, autojunk=False
    ).get_opcodes():
        old, new = reference[a:b], written[c:d]
        normal = [unicodedata.normalize("NFKC", character) for character in old]
        if kind == "equal":
            continue
        if "".join(normal) == new:
            found += [pair for pair in zip(old, normal, strict=True) if pair[0] != pair[1]]
        elif len(old) == len(new):
            found += list(zip(old, new, strict=True))
        else:
            found.append((old, new))
    return found
