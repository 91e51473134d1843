"""The formula that points were made of is found again, and its optimum is where a search along the budget finds it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import curve_fit

from certtrain.errors import UsageError
from certtrain.studies.scaling.fits import Point, bootstrap, fit_optima
from certtrain.studies.scaling.joint import JOINT, fit_formula, fit_jointly, misfit
from tests.studies.scaling.test_fits import COST, FLOOR, OF_EPOCHS, OF_WIDTH, error_of, grid, optimal


@pytest.mark.parametrize(("by_width", "by_epochs"), [(0.6, 0.4), (0.3, 0.5), (1.2, 0.8)])
def test_the_formula_comes_back_from_few_points(by_width, by_epochs):
    points = grid(budgets=3, first=1e10, widths=[2, 4, 8, 16], by_width=by_width, by_epochs=by_epochs)
    laws = fit_jointly(points)
    total = by_width + 2 * by_epochs
    assert laws.error.floor == pytest.approx(FLOOR, abs=0.01)
    assert laws.width.exponent == pytest.approx(by_epochs / total, rel=0.03)
    assert laws.epochs.exponent == pytest.approx(1 - 2 * by_epochs / total, rel=0.03)
    assert laws.error.above.exponent == pytest.approx(-by_width * by_epochs / total, rel=0.03)
    for compute in (1e9, 1e12, 1e15):
        widths = np.geomspace(0.1, 1e4, 200_001)
        errors = error_of(widths, compute / (COST * widths**2), by_width, by_epochs)
        best = widths[errors.argmin()]
        assert laws.width(compute) == pytest.approx(best, rel=0.2)
        assert laws.epochs(compute) * COST * laws.width(compute) ** 2 == pytest.approx(compute)
        assert laws.error(compute) == pytest.approx(errors.min(), abs=0.01)


def test_optima_outside_the_grid_are_found():
    """Where the optima of single budgets lie at its edge."""
    points = grid(first=1e10, widths=[1, 2, 4])
    with pytest.raises(UsageError, match="lies at the edge"):
        fit_optima(points)
    laws = fit_jointly(points)
    assert laws.width(1e12) == pytest.approx(optimal(1e12), rel=0.05)
    assert laws.range == (1e10, 2**7 * 1e10)


def test_from_noise_the_exponents_come_back_within_their_intervals():
    truth, hits = 0.4 / (0.6 + 0.8), 0
    for seed in range(3):
        points = grid(noise=0.004, seed=seed, first=1e12, widths=[8, 16, 32, 64, 128])
        low, high = bootstrap(points, 40, seed, JOINT).exponents["width"]
        hits += low <= truth <= high
        assert high - low < 0.3
    assert hits >= 2


def test_the_unit_of_compute_and_the_order_of_points_do_not_matter():
    points = grid(budgets=4, first=1e10, noise=0.002)
    laws = fit_jointly(points)
    scaled = fit_jointly([replace(point, compute=point.compute * 1e6) for point in reversed(points)])
    for name in ("width", "epochs", "error"):
        assert getattr(scaled, name)(1e18) == pytest.approx(getattr(laws, name)(1e12), rel=1e-3)


@pytest.mark.parametrize("rise", [0.0, 0.001])
@pytest.mark.parametrize("flat", ["width", "length"])
def test_errors_that_do_not_fall_have_no_optimum(flat, rise):
    """With width, or with length, they stay as they are or rise."""

    def error(point):
        falls, other = (point.epochs, point.width) if flat == "width" else (point.width, point.epochs)
        return 0.3 + 0.2 * falls**-0.5 + rise * np.log(other)

    points = [replace(point, error=error(point)) for point in grid(budgets=4, first=1e10)]
    with pytest.raises(UsageError, match=f"do not fall with the {flat}"):
        fit_jointly(points)


@pytest.mark.parametrize("of", [fit_formula, fit_jointly, misfit])
@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "0 runs of 0 widths and 0 lengths"),
        ([Point(1.0, 1.0, 1.0, 1.0, 0.5)], "1 runs of 1 widths and 1 lengths"),
        (grid(budgets=1, widths=[2, 4, 8]), "3 runs of 3 widths and 3 lengths"),
        (grid(budgets=8, widths=[2, 4]), "16 runs of 2 widths"),
    ],
)
def test_too_few_runs(of, points, said):
    with pytest.raises(UsageError, match=f"{said}.* are needed"):
        of(points)


def unexplained(noise, deviation, seed):
    """Points that say `noise`, and deviate by another deviation."""
    random = np.random.default_rng(seed)
    exact = grid(budgets=5, first=1e11, widths=[4, 8, 16, 32, 64])
    return [
        replace(point, noise=each, error=point.error + random.normal(0, deviation))
        for point, each in zip(exact, np.broadcast_to(noise, len(exact)), strict=True)
    ]


def deviations(points):
    """From the formula, fitted by scipy's least squares of the same relative deviations, from where the truth is."""
    width, epochs, error = np.array([(point.width, point.epochs, point.error) for point in points]).T

    def formula(_, floor, of_width, alpha, of_epochs, beta):
        return floor + of_width * width**-alpha + of_epochs * epochs**-beta

    found, _ = curve_fit(formula, width, error, p0=[FLOOR, OF_WIDTH, 0.6, OF_EPOCHS, 0.4], sigma=error)
    return error - formula(None, *found)


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_noise_the_misfit_is_what_the_residual_variance_has_more(seed):
    points = unexplained(0.002, 0.006, seed)
    variance = np.square(deviations(points)).sum() / (len(points) - 5)
    assert misfit(points) == pytest.approx((variance - 0.002**2) ** 0.5, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_of_unequal_noise_the_deviations_have_the_variance_they_should(seed):
    points = unexplained(np.geomspace(0.0005, 0.01, 25), 0.008, seed)
    variances = np.square([point.noise for point in points]) + misfit(points) ** 2
    assert (np.square(deviations(points)) / variances).sum() == pytest.approx(len(points) - 5, rel=0.02)


def test_what_noise_explains_is_no_misfit():
    assert misfit(unexplained(0.02, 0.01, seed=0)) == 0
    assert misfit(unexplained(0.0, 0.0, seed=0)) < 1e-4


@pytest.mark.slow
def test_an_interval_counts_the_misfit():
    """Where the noise that is said is far too small, the truth is in the intervals all the same."""
    truth, hits = 0.4 / (0.6 + 0.8), 0
    for seed in range(4):
        points = unexplained(1e-5, 0.004, seed)
        low, high = bootstrap(points, 40, seed, JOINT).exponents["width"]
        without = bootstrap(points, 40, seed, replace(JOINT, misfit=lambda points: 0.0)).exponents["width"]
        hits += low <= truth <= high
        assert not without[0] <= truth <= without[1]
    assert hits >= 3
