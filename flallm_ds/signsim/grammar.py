"""Sentences of the synthetic language: drawn from its plans, each owned by one split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from flallm_ds.signsim.plans import PLANS
from flallm_ds.signsim.words import NO_PHRASE, Draw, Glosses

SPLITS = ("train", "dev", "test")

# Shares of phrases and of sentences whose wording is not the usual one: what no system
# can predict.
FREE_PHRASE = 0.08
FREE_ORDER = 0.08

_SHARES = np.cumsum([share for _, share in PLANS])
assert abs(_SHARES[-1] - 1) < 1e-9, "the plans' shares must add up to 1"


@dataclass(frozen=True)
class Sentence:
    """One sentence of the language."""

    glosses: Glosses
    """Signs in the order in which they are made."""
    text: str
    usual: str
    """The most frequent wording of these signs: what an ideal translator would say."""


def draw_any(rng: np.random.Generator) -> Sentence:
    """Draw a sentence of any split."""
    # The plan's number; rounding may leave the last share a little below 1.
    number = int(np.searchsorted(_SHARES, rng.random(), side="right"))
    plan, _ = PLANS[min(number, len(PLANS) - 1)]
    glosses, wordings = plan(Draw(rng))
    # A wording that begins with what is not said would move the verb from its second
    # place.
    usual, *others = [wording for wording in wordings if wording[0] != NO_PHRASE]
    wording = usual
    if others and rng.random() < FREE_ORDER:
        wording = others[int(rng.integers(len(others)))]
    # The usual form of each phrase, or now and then another one.
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
    """Draw a sentence that only `split` may hold.

    Sentences and sign sequences belong to splits by their hash, so neither is shared
    between splits, in no corpus of any size or seed.
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
