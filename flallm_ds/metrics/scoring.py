"""Score hypotheses: all of a split, each corpus or language, a blind control, a perfect model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from flallm_ds.batch import Hypothesis
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.metrics import Scores, score_by_language
from flallm_ds.metrics.ceiling import Ceiling, ceiling

Part = Literal["corpus", "language"]  # fields of a hypothesis by which a split is divided


def scores_of(hypotheses: Sequence[Hypothesis]) -> Scores:
    """Score hypotheses by the rule of their language; several languages have the mean over them.

    Raises UserError where there are none.
    """
    return score_by_language(
        [h.hypothesis for h in hypotheses],
        [h.reference for h in hypotheses],
        [h.language for h in hypotheses],
    )


def scores_by(hypotheses: Sequence[Hypothesis], part: Part) -> dict[str, Scores]:
    """Score each corpus or language alone: {its name: scores}, in the order of the names."""
    parts: dict[str, list[Hypothesis]] = {}
    for said in hypotheses:
        parts.setdefault(getattr(said, part), []).append(said)
    return {name: scores_of(said) for name, said in sorted(parts.items())}


def blind_scores(hypotheses: Sequence[Hypothesis], seed: int = 0) -> Scores:
    """Score the same model with the videos shuffled: what it guesses without looking.

    A hypothesis depends on its video (and language) alone, so each reference is compared
    with the hypothesis of another clip of its language. No clip keeps its own, unless it
    is the only one of its language.
    """
    order = np.random.default_rng(seed).permutation(len(hypotheses))
    rows: dict[str, list[int]] = {}
    for row in order.tolist():
        rows.setdefault(hypotheses[row].language, []).append(row)
    other = np.empty_like(order)
    for part in rows.values():
        other[part] = np.roll(part, 1)
    said = [hypotheses[i].hypothesis for i in other]
    shuffled = [
        replace(h, hypothesis=text) for h, text in zip(hypotheses, said, strict=True)
    ]
    return scores_of(shuffled)


def perfect(hypotheses: Sequence[Hypothesis], codec: TextCodec) -> list[Hypothesis]:
    """Return what a perfect model would say: each reference as its tokenizer writes it."""
    written = [codec.decode(codec.encode(h.reference)) for h in hypotheses]
    return [
        replace(h, hypothesis=w, nbest=()) for h, w in zip(hypotheses, written, strict=True)
    ]


def ceiling_of(written: Sequence[Hypothesis]) -> Ceiling:
    """Return the ceiling of BLEU-4. written: what `perfect` made of hypotheses."""
    return ceiling(
        [h.hypothesis for h in written],
        [h.reference for h in written],
        [h.language for h in written],
    )
