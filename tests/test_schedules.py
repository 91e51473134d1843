from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from certtrain.schedules import Cooldown, Cosine, Infinite, InverseRoot, LearningRate, Linear, Shape, SmoothedEpsilon


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


@given(
    initial=st.sampled_from([Fraction(2, 255), Fraction(16, 255)]), length=st.integers(8, 400), step=st.integers(0, 500)
)
def test_epsilon_from_where_an_earlier_run_ended(initial, length, step):
    """The published formula of the way that is left, up or down."""
    eps = SmoothedEpsilon(8 / 255, 20, 20 + length, initial=float(initial))(step)
    way = Fraction(8, 255) - initial
    share = published(step, Fraction(1), 20, 20 + length, Fraction(1, 4), 4)
    assert eps == pytest.approx(float(initial + way * share), rel=1e-12)


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
    rate = LearningRate(1.0, [3, 5], 0.2)
    assert [rate(step) for step in range(7)] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.04, 0.04])


SHAPES: dict[Shape, list[float]] = {
    Linear(4): [1, 0.75, 0.5, 0.25, 0, 0],
    Linear(4, final=0.2): [1, 0.8, 0.6, 0.4, 0.2, 0.2],
    Cosine(4): [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0],
    Cosine(2, final=0.1): [1, 0.55, 0.1, 0.1],
    InverseRoot(2): [1, 1, 1, math.sqrt(2 / 3), math.sqrt(0.5), math.sqrt(0.4)],
    Cooldown(6, 2): [1, 1, 1, 1, 1, 0.5, 0],
    Cooldown(3, 0): [1, 1, 1],
    Infinite(8, 2, 0.4, 2, 0.5): [1, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.2],
}


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_shapes_of_the_learning_rate(shape):
    assert [shape(step) for step in range(len(SHAPES[shape]))] == pytest.approx(SHAPES[shape], abs=1e-15)


@given(steps=st.integers(20, 100), longer=st.integers(0, 100))
def test_an_infinite_rate_does_not_know_how_long_the_run_is_until_its_end(steps, longer):
    short, long = (Infinite(length, 7, 0.3, 10) for length in (steps, steps + longer))
    assert [short(step) for step in range(steps - 10)] == [long(step) for step in range(steps - 10)]
    assert short(steps) == long(steps + longer) == 0
    assert all(long(step) == 0.3 for step in range(7, steps + longer - 10))


def test_a_rate_may_be_warmed_up_again_from_a_share_of_itself():
    rate = LearningRate(2.0, [3], 0.1, warmup_steps=4, warmup_start=0.2)
    assert [rate(step) for step in range(6)] == pytest.approx([0.8, 1.2, 1.6, 0.2, 0.2, 0.2])


@given(
    shape=st.sampled_from([Linear(50, 0.1), Cosine(50), InverseRoot(7), Cooldown(50, 10)]),
    warmup=st.integers(0, 30),
    step=st.integers(0, 200),
)
def test_a_rate_grows_through_warmup_then_falls_and_is_the_product_of_its_parts(shape, warmup, step):
    rate = LearningRate(2.0, [40], 0.5, warmup, shape)
    now, later = rate(step), rate(step + 1)
    assert (now <= later) if step + 1 < warmup and step + 1 != 40 else (now >= later or step + 1 <= warmup)
    fallen = 0.5 if step >= 40 else 1.0
    expected = 2.0 * fallen * ((step + 1) / warmup if step < warmup else shape(step - warmup))
    assert now == pytest.approx(expected, rel=1e-12)
    assert warmup == 0 or LearningRate(2.0, warmup_steps=warmup)(warmup - 1) == 2.0


@pytest.mark.parametrize("shape", [Linear(0, 0.1), Cosine(0, 0.1), Infinite(100, 0, 0.1, 0)])
def test_a_way_of_no_steps_is_at_its_end(shape):
    assert shape(0) == pytest.approx(0.1)
