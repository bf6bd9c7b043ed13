"""The learning-rate schedule."""

from itertools import pairwise

import pytest

from flallm_ds.training.schedule import lr_factor


def test_rates_rise_linearly_then_fall_as_a_cosine():
    assert [lr_factor(p, 0.2) for p in (0.0, 0.05, 0.1)] == pytest.approx([0, 0.25, 0.5])
    assert lr_factor(0.2, 0.2) == 1.0
    assert lr_factor(0.6, 0.2) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.2) == pytest.approx(0.0)


def test_without_warmup_the_first_step_has_the_whole_rate():
    assert lr_factor(0.0, 0.0) == 1.0


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_rates_are_between_nothing_and_the_base_rate_and_never_jump(warmup):
    factors = [lr_factor(i / 1000, warmup) for i in range(1001)]
    assert all(0 <= f <= 1 for f in factors)
    steps = [abs(b - a) for a, b in pairwise(factors)]
    assert max(steps) < 0.021
    after = factors[int(1000 * warmup) :]
    assert all(b <= a for a, b in pairwise(after))
