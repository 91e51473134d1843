"""The formula that points were made of is found again, and its optimum is where a search along the budget finds it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from certtrain.errors import UsageError
from certtrain.studies.scaling.fits import Point, bootstrap, fit_optima
from certtrain.studies.scaling.joint import fit_jointly
from tests.studies.scaling.test_fits import COST, FLOOR, error_of, grid, optimal


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
        low, high = bootstrap(points, 40, seed, fit_jointly).exponents["width"]
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


@pytest.mark.parametrize("points", [[], grid(budgets=1, widths=[2, 4, 8]), grid(budgets=8, widths=[2, 4])])
def test_too_few_runs(points):
    with pytest.raises(UsageError, match="are needed"):
        fit_jointly(points)


def test_one_point_more():
    one = Point(1.0, 1.0, 1.0, 1.0, 0.5)
    with pytest.raises(UsageError, match="1 runs of 1 widths"):
        fit_jointly([one])
