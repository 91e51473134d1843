"""Laws that are known are found again, from points with noise; what lies at the edge is said."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certtrain.errors import UsageError
from certtrain.studies.scaling.fits import (
    Laws,
    Point,
    PowerLaw,
    SaturatingLaw,
    bootstrap,
    fit_optima,
    foretold,
    isoflop_optimum,
    power_law,
    saturating_law,
)

WIDTHS = [2 * 2 ** (k / 2) for k in range(13)]  # 2 to 128
COST = 1e6  # of an epoch, times the width squared
FLOOR, OF_WIDTH, OF_EPOCHS = 0.4, 1.0, 0.8


def error_of(width, epochs, by_width=0.6, by_epochs=0.4):
    """A loss as Hoffmann et al. have it: a floor, what the width leaves, and what the length leaves."""
    return FLOOR + OF_WIDTH * width**-by_width + OF_EPOCHS * epochs**-by_epochs


def grid(budgets=8, first=1e9, noise=0.0, seed=0, widths=WIDTHS, **exponents):
    random, points = np.random.default_rng(seed), []
    for budget in (first * 2**k for k in range(budgets)):
        for width in widths:
            epochs = budget / (COST * width**2)
            error = error_of(width, epochs, **exponents) * (1 + random.normal(0, noise) if noise else 1)
            points.append(Point(budget, budget, width, epochs, error, noise * error))
    return points


def optimal(compute, by_width=0.6, by_epochs=0.4):
    """d/dw of OF_WIDTH w^-a + OF_EPOCHS (C / (COST w²))^-b is 0 here, in closed form."""
    a, b = by_width, by_epochs
    return (OF_WIDTH * a / (2 * b * OF_EPOCHS) * (compute / COST) ** b) ** (1 / (a + 2 * b))


@settings(max_examples=25)
@given(a=st.floats(0.4, 0.9), b=st.floats(0.3, 0.7))
def test_known_exponents_come_back(a, b):
    points = grid(first=1e10, widths=[0.25 * 2 ** (k / 2) for k in range(24)], by_width=a, by_epochs=b)
    laws = fit_optima(points)
    assert laws.width.exponent == pytest.approx(b / (a + 2 * b), abs=0.005)
    assert laws.epochs.exponent == pytest.approx(1 - 2 * b / (a + 2 * b), abs=0.01)
    for compute in (1e11, 1e13):
        assert laws.width(compute) == pytest.approx(optimal(compute, a, b), rel=0.05)
    assert laws.error.floor == pytest.approx(FLOOR, abs=0.01)
    assert laws.error.above.exponent == pytest.approx(-a * b / (a + 2 * b), rel=0.05)


def test_known_exponents_come_back_from_noise_within_their_intervals():
    noise, truth = 0.004, 0.4 / (0.6 + 0.8)
    hits = 0
    for seed in range(3):
        points = grid(noise=noise, seed=seed, first=1e10)
        found, again = fit_optima(points), bootstrap(points, 40, seed)
        low, high = again.exponents["width"]
        hits += low <= truth <= high
        assert found.width.exponent == pytest.approx(truth, abs=0.12)
        assert len(again.laws) > 30
        assert low < found.width.exponent < high
        least, most = again.at(1e14)["error"]
        assert least < most
        assert least - 0.02 < error_of(optimal(1e14), 1e14 / (COST * optimal(1e14) ** 2)) < most + 0.02
    assert hits >= 2


def test_without_noise_the_bootstrap_is_a_point():
    points = grid(first=1e10)
    again, laws = bootstrap(points, 3), fit_optima(points)
    for name, law in (("width", laws.width), ("epochs", laws.epochs), ("error", laws.error)):
        assert again.at(1e13)[name] == pytest.approx((law(1e13), law(1e13)), rel=1e-12)


def test_an_optimum_at_the_edge_is_said_and_not_fitted_to():
    points = grid(first=1e10)
    whole = fit_optima(points)
    cut = [point for point in points if point.budget > 1e10 or point.width < 5]  # the optimum there is 10
    laws = fit_optima(cut)
    assert [optimum.at_edge for optimum in laws.optima] == [True] + [False] * 7
    assert laws.optima[0].width == 4
    assert laws.dropped == ("1e+10 FLOP: the optimum lies at the edge of the grid, width 4",)
    narrow = [point for point in points if point.budget > 1e10 or point.width < 3]
    assert fit_optima(narrow).dropped == ("1e+10 FLOP: fewer than 3 widths",)
    assert laws.range == pytest.approx((2e10, max(point.budget for point in points)))
    inside = [optimum for optimum in whole.optima if optimum.budget > 1e10]
    assert laws.width == power_law([o.compute for o in inside], [o.width for o in inside])
    few = [point for point in points if point.width < 5]
    with pytest.raises(UsageError, match=r"^0 budgets have an optimum inside .*, 2 are needed; .*at the edge") as e:
        fit_optima(few)
    assert "(width 4)" in str(e.value)


def test_the_optimum_of_a_parabola():
    """In log-log three points of a parabola, and two more by symmetry about log 8."""
    widths = [2.0, 4.0, 8.0, 16.0, 32.0]
    points = [Point(1.0, 1.0, w, 100 / w, 0.5 * math.exp(0.1 * math.log(w / 8) ** 2)) for w in widths]
    found = isoflop_optimum(points)
    assert (found.width, found.error, found.epochs) == pytest.approx((8, 0.5, 12.5), rel=1e-3)


@pytest.mark.parametrize("widths", [[4.0, 8.0], [4.0, 8.0, 8.0]])
def test_too_few_widths_have_no_optimum(widths):
    with pytest.raises(UsageError, match="3 different widths or more"):
        isoflop_optimum([Point(1, 1, width, 1, 0.5) for width in widths])


@given(coefficient=st.floats(1e-9, 1e9), exponent=st.floats(-2, 2))
def test_power_laws(coefficient, exponent):
    x = [1.0, 10.0, 1e3, 1e6]
    law = power_law(x, [coefficient * each**exponent for each in x])
    assert (law.coefficient, law.exponent) == pytest.approx((coefficient, exponent), rel=1e-6, abs=1e-9)
    assert law(1e4) == pytest.approx(coefficient * 1e4**exponent, rel=1e-6)


def test_one_place_tells_no_exponent():
    assert power_law([5.0, 5.0], [2.0, 8.0]) == PowerLaw(pytest.approx(4.0), 0.0)


@settings(max_examples=25)
@given(floor=st.floats(0, 0.6), exponent=st.floats(-0.8, -0.1))
def test_a_law_above_a_floor(floor, exponent):
    x = [1e12 * 2**k for k in range(9)]
    law = saturating_law(x, [floor + 0.3 * (each / 1e12) ** exponent for each in x])
    assert law(1e16) == pytest.approx(floor + 0.3 * 1e4**exponent, abs=0.01)
    assert law.floor == pytest.approx(floor, abs=0.01)


def test_what_does_not_fall_has_no_floor():
    law = saturating_law([1, 2, 4, 8, 16], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert law.floor == 0
    assert law.above.exponent > 0


def test_noise_of_one_point_moves_the_fit():
    points = grid(first=1e10)
    noisy = [replace(point, noise=0.01) if point.width == WIDTHS[5] else point for point in points]
    low, high = bootstrap(noisy, 40).exponents["width"]
    assert low < high


def test_budgets_are_foretold_from_those_below_alone():
    """Of an exact law they are; an error at a budget moves what is foretold above it, and not there or below."""
    points = grid(first=1e10)
    found = foretold(points, resamples=3)
    budgets = sorted({point.budget for point in points})
    assert [each.optimum.budget for each in found] == budgets[2:]
    for each in found[2:]:  # with a floor, that is
        error, value, interval = each.forecast("error")
        assert value == pytest.approx(error, rel=0.01)
        assert interval == pytest.approx((value, value), rel=1e-12)
    moved = [replace(point, error=point.error * 1.1) if point.budget == budgets[4] else point for point in points]
    for each, other in zip(found, foretold(moved, resamples=3), strict=True):
        same = other.forecast("error").value == each.forecast("error").value
        assert same == (each.optimum.budget <= budgets[4])


def test_an_optimum_at_the_edge_is_not_foretold():
    points = grid(first=1e10)
    last = max(point.budget for point in points)
    cut = [point for point in points if point.budget < last or point.width < 5]
    assert last not in [each.optimum.budget for each in foretold(cut, resamples=3)]


def test_a_row_of_laws_says_the_same_in_six_digits():
    laws = Laws(PowerLaw(1 / 3, 0.2), PowerLaw(2e-7, 0.7), SaturatingLaw(0.1, PowerLaw(50.0, -0.05)), (1e12, 1e15))
    row = laws.to_row()
    assert row == [0.333333, 0.2, 2e-7, 0.7, 0.1, 50.0, -0.05]
    read = Laws.from_row(row, laws.range)
    assert read == replace(laws, width=PowerLaw(0.333333, 0.2))
