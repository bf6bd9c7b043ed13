"""Tests of the paired bootstrap: agreement with sacreBLEU, size of differences."""

import numpy as np
import pytest

from flallm_ds.errors import UserError
from flallm_ds.metrics import score
from flallm_ds.metrics.significance import paired_bootstrap

WORDS = "der regen zieht am abend von westen nach osten über das land".split()  # noqa: SIM905


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 9)) for _ in range(count)]


def degraded(references: list[str], share: float, seed: int) -> list[str]:
    """Replace a share of the sentences by others."""
    rng = np.random.default_rng(seed)
    others = sentences(len(references), seed + 100)
    return [
        o if rng.random() < share else r for r, o in zip(references, others, strict=True)
    ]


REFERENCES = sentences(80, 0)


def test_the_score_of_the_whole_set_equals_sacrebleu():
    runs = [degraded(REFERENCES, 0.5, 1), degraded(REFERENCES, 0.5, 2)]
    found = paired_bootstrap({"half": runs}, REFERENCES, resamples=20).score("half")
    assert found.value == pytest.approx(
        np.mean([score(r, REFERENCES, language="de").bleu4 for r in runs])
    )
    assert found.low < found.value < found.high


def test_only_a_clear_difference_is_significant():
    systems = {
        "good": [degraded(REFERENCES, 0.2, 3)],
        "bad": [degraded(REFERENCES, 0.7, 4)],
        "as bad": [degraded(REFERENCES, 0.7, 5)],
    }
    found = paired_bootstrap(systems, REFERENCES, resamples=200)
    gap, chance = found.difference("good", "bad")
    assert chance < 0.01 and gap.low > 0
    gap, chance = found.difference("as bad", "bad")
    assert chance > 0.05 and gap.low < 0 < gap.high


def test_equal_systems_do_not_differ_on_any_resampled_set():
    same = [degraded(REFERENCES, 0.5, 6)]
    gap, chance = paired_bootstrap(
        {"a": same, "b": same}, REFERENCES, resamples=20
    ).difference("a", "b")
    assert (gap.low, gap.value, gap.high, chance) == (0, 0, 0, 1)


def test_the_same_seed_gives_the_same_interval():
    runs = {"a": [degraded(REFERENCES, 0.5, 7)]}
    assert paired_bootstrap(runs, REFERENCES, resamples=30).score("a") == paired_bootstrap(
        runs, REFERENCES, resamples=30
    ).score("a")


@pytest.mark.parametrize(("hypotheses", "references"), [(["x"], ["x", "y"]), ([], [])])
def test_different_numbers_of_sentences_are_refused(hypotheses, references):
    with pytest.raises(UserError, match="must have one hypothesis for each"):
        paired_bootstrap({"a": [hypotheses]}, references)
