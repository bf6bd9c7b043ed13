"""Tests of resampled test sets: agreement with sacreBLEU, coverage of the intervals."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER

from flallm_ds.metrics import preset_counts, score, score_by_language
from flallm_ds.metrics.counts import Counts, interval, resampled_scores
from flallm_ds.metrics.presets import find_preset
from tests.helpers.pairs import pairs


@pytest.mark.parametrize(
    ("key", "metric"), [("bleu4", BLEU()), ("chrf", CHRF()), ("ter", TER())]
)
def test_intervals_equal_those_of_sacrebleu(key: str, metric: object) -> None:
    said, meant = pairs("de")
    low, high = score(said, meant, "de", resamples=300).intervals[key]
    expected = metric.corpus_score(said, [meant], n_bootstrap=300)
    assert (high - low) / 2 == pytest.approx(expected._ci, abs=0.01)
    assert low < expected.score < high


def test_every_score_has_an_interval_around_it() -> None:
    found = score(*pairs("zh"), "zh", resamples=100)
    assert found.intervals.keys() == found.values.keys()
    for key, (low, high) in found.intervals.items():
        assert low <= found.values[key] <= high and low < high
    assert found.as_dict()["intervals"] == found.intervals
    assert "intervals" not in score(*pairs("zh"), "zh").as_dict()


def test_the_mean_of_languages_has_an_interval_too() -> None:
    (german, meant), (english, other) = pairs("de"), pairs("en")
    languages = ["de"] * len(german) + ["en"] * len(english)
    mixed = score_by_language(
        german + english, meant + other, languages, error_rates=False, resamples=100
    )
    alone = score(german, meant, "de", error_rates=False, resamples=100)
    low, high = mixed.intervals["bleu4"]
    assert low < mixed.bleu4 < high
    assert high - low < alone.intervals["bleu4"][1] - alone.intervals["bleu4"][0]


def test_the_counts_of_a_part_score_that_part_alone() -> None:
    said, meant = pairs("de")
    rows = np.arange(10, 60)
    whole = preset_counts(find_preset("sacrebleu"), said, meant, "de", error_rates=True)
    alone = score(said[10:60], meant[10:60], "de").values
    found: dict[str, float] = {}
    for counts in whole:
        found |= counts.score(rows)
    assert found == pytest.approx(alone)


def test_intervals_contain_the_true_score_at_their_nominal_rate() -> None:
    """Test sets are drawn from a population of sentences whose score is known."""
    said, meant = pairs("de", count=4000, seed=1)
    bleu, rouge, _ = preset_counts(find_preset("sacrebleu"), said, meant, "de")
    true = bleu.score() | rouge.score()
    draw = np.random.default_rng(0)
    hits = {"bleu4": 0, "rouge_l": 0}
    trials = 200
    for trial in range(trials):
        rows = draw.choice(len(said), 200, replace=False)
        sample = []
        for counts in (bleu, rouge):
            chosen = counts.counts_NC[rows]
            sample.append(Counts(counts.keys, chosen, counts.scores_of, counts.signatures))
        resampled = resampled_scores(sample, resamples=120, seed=trial)
        for key in hits:
            low, high = interval(resampled[key])
            hits[key] += low <= true[key] <= high
    # 95 % of 200 is 190, with a standard deviation of 3.
    for key, count in hits.items():
        assert 178 <= count <= 198, (key, count)
