"""Score a split: overall, by corpus or language, a blind control and a perfect model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from flallm_ds.batch import Hypothesis
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.metrics import Scores, score_by_language
from flallm_ds.metrics.ceiling import Ceiling, ceiling

# Fields of a `Hypothesis` by which a split can be divided.
Part = Literal["corpus", "language"]


def scores_of(
    hypotheses: Sequence[Hypothesis], error_rates: bool = False, resamples: int = 0
) -> Scores:
    """Score hypotheses as `score_by_language` does: the mean over their languages.

    error_rates: whether to compute TER, WER and CER, too. resamples: number of resampled
    test sets for intervals. Raises UserError if there are no hypotheses.
    """
    return score_by_language(
        *_columns(hypotheses), error_rates=error_rates, resamples=resamples
    )


def scores_by(
    hypotheses: Sequence[Hypothesis], part: Part, resamples: int = 0
) -> dict[str, Scores]:
    """Score each corpus or language alone. Return {name: scores}, sorted by name."""
    parts: dict[str, list[Hypothesis]] = {}
    for clip in hypotheses:
        parts.setdefault(getattr(clip, part), []).append(clip)
    scores = {}
    for name, clips in sorted(parts.items()):
        scores[name] = scores_of(clips, resamples=resamples)
    return scores


def blind_scores(
    hypotheses: Sequence[Hypothesis], seed: int = 0, resamples: int = 0
) -> Scores:
    """Score the model with shuffled videos: what it guesses without seeing the clip.

    A hypothesis depends only on the video and its language. So this compares each reference
    with the hypothesis of another clip of the same language. A clip keeps its hypothesis
    only if no other clip has its language.
    """
    rows_by_language: dict[str, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(len(hypotheses)).tolist():
        rows_by_language.setdefault(hypotheses[row].language, []).append(row)

    # Rotate the random order. In a random order alone, one clip on average would keep its
    # own hypothesis.
    source = np.empty(len(hypotheses), int)
    for rows in rows_by_language.values():
        source[rows] = np.roll(rows, 1)

    shuffled = []
    for clip, row in zip(hypotheses, source.tolist(), strict=True):
        shuffled.append(replace(clip, hypothesis=hypotheses[row].hypothesis))
    return scores_of(shuffled, resamples=resamples)


def perfect(hypotheses: Sequence[Hypothesis], codec: TextCodec) -> list[Hypothesis]:
    """Return the output of a perfect model: each reference after encoding and decoding."""
    written = []
    for clip in hypotheses:
        text = codec.decode(codec.encode(clip.reference))
        written.append(replace(clip, hypothesis=text, nbest=()))
    return written


def ceiling_of(written: Sequence[Hypothesis]) -> Ceiling:
    """Return the highest BLEU-4 that the tokenizer allows. written: output of `perfect`."""
    return ceiling(*_columns(written))


def _columns(clips: Sequence[Hypothesis]) -> tuple[list[str], list[str], list[str]]:
    """Return the hypotheses, the references and the languages of clips."""
    hypotheses = [clip.hypothesis for clip in clips]
    references = [clip.reference for clip in clips]
    languages = [clip.language for clip in clips]
    return hypotheses, references, languages
