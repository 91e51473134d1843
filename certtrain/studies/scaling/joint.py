"""One formula for the errors of all runs, of which the optimum follows; no budget needs its best width inside the grid.

error = floor + A · width^-α + B · epochs^-β, as in the third approach of Hoffmann et al. 2022 (arXiv 2203.15556), and
compute = k · width^γ · epochs. At the least error for so much compute

    width  = (α A / (γ β B) · (compute / k)^β)^(1 / (α + γ β))
    epochs = compute / (k · width^γ)
    error  = floor + (1 + α / (γ β)) · A · width^-α

which are power laws of compute, the last one above the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize, nnls

from certtrain.errors import UsageError
from certtrain.studies.scaling.fits import Approach, Laws, Point, PowerLaw, SaturatingLaw, power_law

PARAMETERS = 5
FEWEST_POINTS = PARAMETERS + 1
FEWEST_VALUES = 3  # of width, and of epochs, to tell an exponent from a floor
EXPONENTS = 0.02, 4.0  # where they are searched for
FLAT = 1e-3  # of the least error: what changes less over all runs is no trend
STARTS = 8  # of each exponent, at equal ratios

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Formula:
    """The error of a network of a width that is trained for so many epochs. by_width, by_epochs: A and -α, B and -β."""

    floor: float
    by_width: PowerLaw
    by_epochs: PowerLaw

    def __call__(self, width: Any, epochs: Any) -> Any:
        """Of numbers or arrays."""
        return self.floor + self.by_width(width) + self.by_epochs(epochs)


def fit_formula(points: Sequence[Point]) -> Formula:
    """By least squares of the errors' relative deviations.

    For given exponents the formula is linear, its coefficients not negative; the exponents are searched for, from the
    best of a grid (variable projection).

    Raises:
        UsageError: too few points, widths or epochs.
    """
    width, epochs, error = _columns(points)
    values = min(len(set(width)), len(set(epochs)))
    if len(points) < FEWEST_POINTS or values < FEWEST_VALUES:
        raise UsageError(
            f"{len(points)} runs of {len(set(width))} widths and {len(set(epochs))} lengths: {FEWEST_POINTS} runs of "
            f"{FEWEST_VALUES} widths and {FEWEST_VALUES} lengths are needed"
        )

    def linear(exponents: Floats) -> tuple[Floats, float]:
        """Floor, A and B for exponents, and what deviation they leave."""
        by_width, by_epochs = np.exp(exponents)
        columns = np.stack([np.ones_like(error), width**-by_width, epochs**-by_epochs], axis=1)
        coefficients, left = nnls(columns / error[:, None], np.ones_like(error))
        return coefficients, float(left)

    low, high = np.log(EXPONENTS)
    grid = np.stack(np.meshgrid(*2 * [np.linspace(low, high, STARTS)]), axis=-1).reshape(-1, 2)
    start = min(grid, key=lambda exponents: linear(exponents)[1])
    best = minimize(lambda exponents: linear(exponents)[1], start, method="Nelder-Mead", bounds=2 * [(low, high)]).x
    (floor, of_width, of_epochs), _ = linear(best)
    alpha, beta = map(float, np.exp(best))
    return Formula(float(floor), PowerLaw(float(of_width), -alpha), PowerLaw(float(of_epochs), -beta))


def fit_jointly(points: Sequence[Point]) -> Laws:
    """The laws that follow from one formula for all points.

    Raises:
        UsageError: too few points, widths or epochs; or the errors do not fall with width, or not with epochs, and
            then there is no optimum.
    """
    formula = fit_formula(points)
    width, epochs, error = _columns(points)
    for name, falls in {"width": formula.by_width(width), "length": formula.by_epochs(epochs)}.items():
        if np.ptp(falls) <= FLAT * error.min():
            raise UsageError(f"the errors do not fall with the {name} of a run: there is no optimum")
    compute = np.array([point.compute for point in points])
    return _laws(formula, power_law(width, compute / epochs), compute)


def _laws(formula: Formula, cost: PowerLaw, compute: Floats) -> Laws:
    """See the module; cost: of an epoch, by width."""
    of_width, of_epochs = formula.by_width.coefficient, formula.by_epochs.coefficient
    alpha, beta, gamma = -formula.by_width.exponent, -formula.by_epochs.exponent, cost.exponent
    total = alpha + gamma * beta
    ratio = alpha * of_width / (gamma * beta * of_epochs)
    width = PowerLaw(float((ratio * cost.coefficient**-beta) ** (1 / total)), beta / total)
    epochs = PowerLaw(1 / cost(width.coefficient), 1 - gamma * width.exponent)
    above = (1 + alpha / (gamma * beta)) * formula.by_width(width.coefficient)
    error = SaturatingLaw(formula.floor, PowerLaw(float(above), -alpha * width.exponent))
    return Laws(width, epochs, error, (float(compute.min()), float(compute.max())))


def misfit(points: Sequence[Point]) -> float:
    """The standard deviation of points from the formula that their noise leaves unexplained; 0 where it explains all.

    That with which the sum of squared deviations, each over its variance, is what it should be on average: the number
    of points less that of parameters (Mandel and Paule 1970, Analytical Chemistry 42, 1194).

    Raises:
        UsageError: as `fit_formula`.
    """
    formula, (width, epochs, error) = fit_formula(points), _columns(points)
    squares, variances = np.square(error - formula(width, epochs)), np.square([point.noise for point in points])
    freedom = len(points) - PARAMETERS
    most = float(squares.sum()) / freedom

    def excess(variance: float) -> float:
        return float((squares / (variances + variance)).sum()) - freedom

    least = 1e-12 * most
    if most == 0 or excess(least) <= 0:
        return 0.0
    return float(brentq(excess, least, most * (1 + 1e-9))) ** 0.5


def _columns(points: Sequence[Point]) -> Floats:
    """Widths, epochs and errors, of shape (3, points)."""
    return np.array([(point.width, point.epochs, point.error) for point in points], float).T.reshape(3, -1)


JOINT = Approach(fit_jointly, misfit)
