"""Score a split: overall, by corpus or language, controls by exchange, a perfect model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from flallm_ds.batch import Hypothesis
from flallm_ds.data.overlap import plain_text
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
    # Rotate the random order. In a random order alone, one clip on average would keep its
    # own hypothesis.
    source = np.empty(len(hypotheses), int)
    for rows in _random_rows(hypotheses, seed):
        source[rows] = np.roll(rows, 1)

    shuffled = []
    for clip, row in zip(hypotheses, source.tolist(), strict=True):
        shuffled.append(replace(clip, hypothesis=hypotheses[row].hypothesis))
    return scores_of(shuffled, resamples=resamples)


def signer_scores(
    hypotheses: Sequence[Hypothesis],
    signers: Mapping[str, str],
    seed: int = 0,
    resamples: int = 0,
) -> tuple[Scores, Scores] | None:
    """Score the model with videos of other signers, and with videos of any signer.

    Both compare the references of the same clips with hypotheses of other clips of the same
    language. In the first, each is of a clip by another signer with another sentence. The
    second allows clips by the same signer, too, so it is higher only if clips by the same
    signer resemble each other.

    signers: maps keys to names. Clips without a signer, and clips for which there is no
    such other clip, are not scored. Returns None if no clip is left.
    """
    # Rows of the scored clips: (row of a clip by another signer, row of one by any signer).
    sources: dict[int, tuple[int, int]] = {}
    for in_language in _random_rows(hypotheses, seed):
        rows = [row for row in in_language if signers.get(hypotheses[row].key)]
        clips = [hypotheses[row] for row in rows]
        signer_N = _codes(signers[clip.key] for clip in clips)
        text_N = _codes(plain_text(clip.reference) for clip in clips)
        for place, row in enumerate(rows):
            # The first clip before this one that fits, where the blind control takes the
            # first one.
            before = np.arange(place - 1, place - len(rows), -1)
            is_other = signer_N[before] != signer_N[place]
            says_other = text_N[before] != text_N[place]
            fits = is_other & says_other
            if not fits.any():
                continue
            other = before[fits.argmax()]
            # The same sentence by another signer would raise this score, too.
            anyone = before[(~is_other | says_other).argmax()]
            sources[row] = rows[other], rows[anyone]
    if not sources:
        return None
    others: list[Hypothesis] = []
    of_any: list[Hypothesis] = []
    for row, (other, anyone) in sorted(sources.items()):
        others.append(replace(hypotheses[row], hypothesis=hypotheses[other].hypothesis))
        of_any.append(replace(hypotheses[row], hypothesis=hypotheses[anyone].hypothesis))
    return scores_of(others, resamples=resamples), scores_of(of_any, resamples=resamples)


def _codes(texts: Iterable[str]) -> np.ndarray:
    """Return an int for each text, equal for equal texts."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(text, len(known)) for text in texts])


def _random_rows(hypotheses: Sequence[Hypothesis], seed: int) -> list[list[int]]:
    """Return the rows of the clips of each language, in random order."""
    rows_by_language: dict[str, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(len(hypotheses)).tolist():
        rows_by_language.setdefault(hypotheses[row].language, []).append(row)
    return list(rows_by_language.values())


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
