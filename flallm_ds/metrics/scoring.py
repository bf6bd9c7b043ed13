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
    return score_by_language(*_columns(hypotheses))


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
    rows_by_language: dict[str, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(len(hypotheses)).tolist():
        rows_by_language.setdefault(hypotheses[row].language, []).append(row)

    # A rotation of a random order, because a random order alone leaves one clip, on
    # average, with its own hypothesis.
    source = np.empty(len(hypotheses), int)
    for rows in rows_by_language.values():
        source[rows] = np.roll(rows, 1)

    shuffled = []
    for clip, row in zip(hypotheses, source.tolist(), strict=True):
        shuffled.append(replace(clip, hypothesis=hypotheses[row].hypothesis))
    return scores_of(shuffled)


def perfect(hypotheses: Sequence[Hypothesis], codec: TextCodec) -> list[Hypothesis]:
    """Return what a perfect model would say: each reference as its tokenizer writes it."""
    written = []
    for clip in hypotheses:
        text = codec.decode(codec.encode(clip.reference))
        written.append(replace(clip, hypothesis=text, nbest=()))
    return written


def ceiling_of(written: Sequence[Hypothesis]) -> Ceiling:
    """Return the ceiling of BLEU-4. written: what `perfect` made of hypotheses."""
    return ceiling(*_columns(written))


def _columns(clips: Sequence[Hypothesis]) -> tuple[list[str], list[str], list[str]]:
    """Return the hypotheses, the references and the languages of clips."""
    hypotheses = [clip.hypothesis for clip in clips]
    references = [clip.reference for clip in clips]
    languages = [clip.language for clip in clips]
    return hypotheses, references, languages
