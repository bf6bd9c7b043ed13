"""The samples of a report: references and hypotheses, their differences and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from sacrebleu.metrics.chrf import CHRF

from flallm_ds.batch import Hypothesis
from flallm_ds.data.text.languages import word_rule
from flallm_ds.metrics.bleu import BleuRule
from flallm_ds.metrics.differences import Parts, differences
from flallm_ds.reporting.runs import Run


@dataclass(frozen=True)
class Translation:
    """The hypothesis of one run for a clip.

    hypothesis, reference: with the differences between both. bleu, chrf: of the sentence,
    in percent.
    """

    hypothesis: Parts
    reference: Parts
    bleu: float
    chrf: float
    nbest: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Sample:
    """A clip of the split. translations: by run; None where a run has no hypothesis."""

    key: str
    reference: str
    corpus: str
    language: str
    translations: Sequence[Translation | None]

    @property
    def quality(self) -> float:
        """Return the sentence chrF of the first run that has a hypothesis."""
        found = [one.chrf for one in self.translations if one is not None]
        return found[0] if found else 0.0


def samples_of(runs: Sequence[Run], split: str) -> list[Sample]:
    """Return the samples of a split that at least one run was evaluated on, by key."""
    by_run: list[dict[str, Hypothesis]] = []
    clips: dict[str, Hypothesis] = {}
    for run in runs:
        evaluation = run.evaluations.get(split)
        hypotheses = evaluation.hypotheses if evaluation is not None else ()
        by_run.append({clip.key: clip for clip in hypotheses})
        clips = by_run[-1] | clips
    samples = []
    for key, clip in sorted(clips.items()):
        translations: list[Translation | None] = []
        for of_run in by_run:
            found = of_run.get(key)
            # The shards of another run may have another clip under the same key.
            same = found is not None and found.reference == clip.reference
            translations.append(_translation(found) if found is not None and same else None)
        samples.append(
            Sample(key, clip.reference, clip.corpus, clip.language, translations)
        )
    return samples


def _translation(clip: Hypothesis) -> Translation:
    rule = word_rule(clip.language)
    hypothesis, reference = differences(clip.hypothesis, clip.reference, rule != "13a")
    bleu, chrf = sentence_scores(clip.hypothesis, clip.reference, rule)
    return Translation(hypothesis, reference, bleu, chrf, clip.nbest)


def sentence_scores(hypothesis: str, reference: str, rule: str) -> tuple[float, float]:
    """Return (BLEU-4, chrF) of one sentence in percent.

    rule: `word_rule` of the language. BLEU counts n-grams only up to the longest one of
    the sentence.
    """
    bleu, chrf = _metrics(rule)
    return (
        float(bleu.sentence_score(hypothesis, [reference]).score),
        float(chrf.sentence_score(hypothesis, [reference]).score),
    )


@lru_cache
def _metrics(rule: str) -> tuple[Any, Any]:
    """Return the metrics of sacreBLEU, which take longer to create than to use."""
    return BleuRule(rule, effective_order=True).metric(), CHRF()


def evenly_chosen(samples: Sequence[Sample], count: int) -> list[str]:
    """Return keys of samples from the worst to the best, evenly spaced by quality."""
    if not samples or count < 1:
        return []
    by_quality = sorted(samples, key=lambda sample: (sample.quality, sample.key))
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    chosen = dict.fromkeys(places.tolist())
    return [by_quality[place].key for place in chosen]


def by_epoch(
    records: Sequence[Mapping[str, object]], most: int = 6
) -> dict[str, list[tuple[int, str]]]:
    """Return {reference: [(epoch, hypothesis)]} of the clips that training shows.

    records: of hypotheses.jsonl. most: epochs of each clip, evenly chosen with the last.
    """
    found: dict[str, dict[int, str]] = {}
    for record in records:
        of_clip = found.setdefault(str(record.get("reference", "")), {})
        of_clip[int(str(record.get("epoch", 0)))] = str(record.get("hypothesis", ""))
    chosen = {}
    for reference, by_number in found.items():
        epochs = sorted(by_number)
        places = np.linspace(0, len(epochs) - 1, min(most, len(epochs))).round()
        kept = [epochs[int(place)] for place in places]
        chosen[reference] = [(epoch, by_number[epoch]) for epoch in kept]
    return chosen
