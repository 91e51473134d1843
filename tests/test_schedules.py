from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from certtrain.schedules import SmoothedEpsilon, StepwiseRate


def published(step: int, max_eps: Fraction, start: int, end: int, mid: Fraction, beta: int) -> Fraction:
    """The formula of DESIGN, in exact arithmetic: α from the equality of slopes at m."""
    m = start + int(mid * (end - start))
    # α(m-start)^β + αβ(m-start)^(β-1)·(end-m) = max_eps
    alpha = max_eps / (Fraction(m - start) ** beta + beta * Fraction(m - start) ** (beta - 1) * (end - m))
    if step <= start:
        return Fraction(0)
    if step < m:
        return alpha * Fraction(step - start) ** beta
    at_m = alpha * Fraction(m - start) ** beta
    return min(max_eps, at_m + (max_eps - at_m) * Fraction(step - m, end - m))


@given(
    start=st.integers(0, 500),
    length=st.integers(8, 4000),
    mid=st.sampled_from([Fraction(1, 4), Fraction(1, 2)]),
    beta=st.integers(2, 5),
    data=st.data(),
)
def test_epsilon_equals_the_published_formula(start, length, mid, beta, data):
    step = data.draw(st.integers(0, start + length + 10))
    eps = SmoothedEpsilon(8 / 255, start, start + length, float(mid), float(beta))(step)
    expected = published(step, Fraction(8, 255), start, start + length, mid, beta)
    assert eps == pytest.approx(float(expected), rel=1e-12, abs=1e-15)


def test_epsilon_never_falls_and_ends_exactly_at_its_maximum():
    schedule = SmoothedEpsilon(0.3, 10, 110)
    values = [schedule(step) for step in range(200)]
    assert values == sorted(values)
    assert values[:11] == [0.0] * 11
    assert values[11] > 0
    assert values[109] < 0.3
    assert values[110:] == [0.3] * 90


def test_epsilon_without_a_ramp_jumps():
    assert [SmoothedEpsilon(0.3, 2, 2)(step) for step in range(4)] == [0.0, 0.0, 0.3, 0.3]
    assert [SmoothedEpsilon(0.3, 2, 2).ramp(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]


def test_the_ramp_is_the_share_of_its_steps_that_are_done():
    assert [SmoothedEpsilon(0.3, 2, 6).ramp(step) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("arguments", [(0.1, 5, 4), (0.1, -1, 4), (0.1, 0, 4, 2.0), (0.1, 0, 4, 0.25, 0.5)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="need"):
        SmoothedEpsilon(*arguments)


def test_learning_rate_falls_at_each_milestone():
    rate = StepwiseRate(1.0, [3, 5], 0.2)
    assert [rate(step) for step in range(7)] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.04, 0.04])
