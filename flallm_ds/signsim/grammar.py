"""Draw random sentences of the synthetic language; each belongs to one split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from flallm_ds.signsim.plans import PLANS
from flallm_ds.signsim.words import NO_PHRASE, Draw, Glosses

SPLITS = ("train", "dev", "test")

# Shares of phrases and sentences with another wording than the usual one, which no system
# can predict.
FREE_PHRASE = 0.08
FREE_ORDER = 0.08

_SHARES = np.cumsum([share for _, share in PLANS])
assert abs(_SHARES[-1] - 1) < 1e-9, "the plans' shares must add up to 1"


@dataclass(frozen=True)
class Sentence:
    """Hold one sentence of the language."""

    glosses: Glosses
    """Signs in signing order."""
    text: str
    usual: str
    """The most frequent wording of these signs: the output of an ideal translator."""


def draw_any(rng: np.random.Generator) -> Sentence:
    """Draw a sentence of any split."""
    # Draw the plan. Because of rounding, the last share may be a little below 1.
    number = int(np.searchsorted(_SHARES, rng.random(), side="right"))
    plan, _ = PLANS[min(number, len(PLANS) - 1)]
    glosses, wordings = plan(Draw(rng))
    # Skip wordings with an empty first phrase: their verb would not be in second place.
    usual, *others = [wording for wording in wordings if wording[0] != NO_PHRASE]
    wording = usual
    if others and rng.random() < FREE_ORDER:
        wording = others[int(rng.integers(len(others)))]
    # Draw the form of each phrase: the usual form, or rarely another one.
    words = []
    for phrase in wording:
        form = 0
        if len(phrase) > 1 and rng.random() < FREE_PHRASE:
            form = 1 + int(rng.integers(len(phrase) - 1))
        words.append(phrase[form])
    usual_words = [phrase[0] for phrase in usual]
    return Sentence(glosses, _joined(words), _joined(usual_words))


def _joined(words: list[str]) -> str:
    return " ".join(filter(None, words))


def draw_sentence(rng: np.random.Generator, split: str) -> Sentence:
    """Draw a sentence of a split.

    The hash of a sentence and the hash of its sign sequence determine the split. Splits
    share no sentence and no sign sequence, for any size and seed of the corpus.
    """
    assert split in SPLITS, split
    while True:
        sentence = draw_any(rng)
        signs = " ".join(sentence.glosses)
        if _split_of(sentence.text) == split and _split_of(signs) == split:
            return sentence


def _split_of(key: str) -> str:
    """Return the split of a sentence or sign sequence: 60 % train, 20 % dev, 20 % test."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    if bucket < 6:
        return "train"
    return "dev" if bucket < 8 else "test"
