"""Divide a test set into parts: by length, by signer, by similarity to the training text."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from flallm_ds.batch import Hypothesis
from flallm_ds.data.overlap import plain_text
from flallm_ds.metrics.words import words_of

# Upper bounds of the lengths of references, in words (characters in languages without
# spaces).
LENGTHS = (5, 10, 20)
# Signers with fewer clips than the first ones are joined.
MAX_SIGNERS = 10
OTHER_SIGNERS = "other signers"
# Share of common word pairs from which on a training sentence is near.
NEAR = 0.5

EXACT, SIMILAR, FAR = "exact", "near", "far"

# Maps the name of a part to its clips.
Parts = dict[str, list[Hypothesis]]


def by_length(clips: Sequence[Hypothesis]) -> Parts:
    """Divide clips by the number of words of their references."""
    bounds = [0, *LENGTHS]
    names = [f"{low + 1} to {high} words" for low, high in pairwise(bounds)]
    names.append(f"more than {LENGTHS[-1]} words")

    def name(clip: Hypothesis) -> str:
        length = len(words_of(clip.reference, clip.language))
        return names[int(np.searchsorted(LENGTHS, length))]

    return _divided(clips, name, names)


def by_signer(clips: Sequence[Hypothesis], signers: Mapping[str, str]) -> Parts:
    """Divide clips by signer, the most frequent first. signers: maps keys to names.

    Returns nothing if fewer than two signers are known.
    """
    counts: dict[str, int] = {}
    for clip in clips:
        signer = signers.get(clip.key, "")
        counts[signer] = counts.get(signer, 0) + 1
    if len(set(counts) - {""}) < 2:
        return {}
    names = sorted(set(counts) - {""}, key=lambda name: (-counts[name], name))
    shown = names[:MAX_SIGNERS]

    def name(clip: Hypothesis) -> str:
        signer = signers.get(clip.key, "")
        return f"signer {signer}" if signer in shown else OTHER_SIGNERS

    return _divided(clips, name, [*(f"signer {one}" for one in shown), OTHER_SIGNERS])


def by_training_text(
    clips: Sequence[Hypothesis], texts: Sequence[str], languages: Sequence[str]
) -> Parts:
    """Divide clips by the similarity of their references to the nearest training sentence.

    exact: equal apart from case, punctuation and spaces. near: the Dice coefficient of
    their word pairs is at least NEAR. texts and languages: the training text.
    """
    sets = [word_pairs(text, one) for text, one in zip(texts, languages, strict=True)]
    nearest = Nearest(sets)
    similarity = {}
    for clip in clips:
        pairs = word_pairs(clip.reference, clip.language)
        similarity[clip.key] = nearest.similarity(pairs)
    training = {plain_text(text) for text in texts}

    def name(clip: Hypothesis) -> str:
        if plain_text(clip.reference) in training:
            return EXACT
        return SIMILAR if similarity[clip.key] >= NEAR else FAR

    return _divided(clips, name, [EXACT, SIMILAR, FAR])


def word_pairs(text: str, language: str) -> frozenset[tuple[str, str]]:
    """Return the pairs of neighbouring words, with the two ends of the sentence."""
    return frozenset(pairwise(["", *words_of(text, language), ""]))


class Nearest:
    """Finds the most similar of many sets, by the Dice coefficient."""

    def __init__(self, sets: Sequence[frozenset[tuple[str, str]]]) -> None:
        rows: dict[tuple[str, str], list[int]] = {}
        for row, members in enumerate(sets):
            for member in members:
                rows.setdefault(member, []).append(row)
        # The rows of the sets that contain each member.
        self._rows = {member: np.array(found) for member, found in rows.items()}
        self._sizes = np.array([len(members) for members in sets])

    def similarity(self, wanted: frozenset[tuple[str, str]]) -> float:
        """Return the Dice coefficient with the most similar set; 0 if there is none."""
        found = [self._rows[member] for member in wanted if member in self._rows]
        if not found:
            return 0.0
        common = np.bincount(np.concatenate(found), minlength=len(self._sizes))
        return float((2 * common / (self._sizes + len(wanted))).max())


def _divided(
    clips: Sequence[Hypothesis], name: Callable[[Hypothesis], str], names: Sequence[str]
) -> Parts:
    """Return the clips of each name, in the order of `names`, without empty parts."""
    parts: Parts = {one: [] for one in names}
    for clip in clips:
        parts[name(clip)].append(clip)
    return {one: found for one, found in parts.items() if found}
