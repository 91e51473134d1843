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

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from certtrain.errors import UsageError
from certtrain.studies.scaling.fits import Laws, Point, PowerLaw, SaturatingLaw, power_law

FEWEST_POINTS = 6  # for five parameters
FEWEST_VALUES = 3  # of width, and of epochs, to tell an exponent from a floor
EXPONENTS = 0.02, 4.0  # where they are searched for
FLAT = 1e-3  # of the least error: what changes less over all runs is no trend
STARTS = 8  # of each exponent, at equal ratios

Floats = NDArray[np.float64]


def fit_jointly(points: Sequence[Point]) -> Laws:
    """The laws that follow from one formula for all points: least squares of the errors' relative deviations.

    For given exponents the formula is linear, its coefficients not negative; the exponents are searched for, from the
    best of a grid (variable projection).

    Raises:
        UsageError: too few points, widths or epochs; or the errors do not fall with width, or not with epochs, and
            then there is no optimum.
    """
    width, epochs, error, compute = np.array(
        [(point.width, point.epochs, point.error, point.compute) for point in points], float
    ).T.reshape(4, -1)
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
    for name, falls in {"width": of_width * width**-alpha, "length": of_epochs * epochs**-beta}.items():
        if np.ptp(falls) <= FLAT * error.min():
            raise UsageError(f"the errors do not fall with the {name} of a run: there is no optimum")
    cost = power_law(width, compute / epochs)
    return _laws(float(floor), PowerLaw(of_width, alpha), PowerLaw(of_epochs, beta), cost, compute)


def _laws(floor: float, by_width: PowerLaw, by_epochs: PowerLaw, cost: PowerLaw, compute: Floats) -> Laws:
    """See the module.

    Args:
        by_width, by_epochs: A and α, B and β: the exponents are those of 1 / width and 1 / epochs.
        cost: of an epoch, by width.
    """
    alpha, beta, gamma = by_width.exponent, by_epochs.exponent, cost.exponent
    total = alpha + gamma * beta
    ratio = alpha * by_width.coefficient / (gamma * beta * by_epochs.coefficient)
    width = PowerLaw(float((ratio * cost.coefficient**-beta) ** (1 / total)), beta / total)
    epochs = PowerLaw(1 / cost(width.coefficient), 1 - gamma * width.exponent)
    above = (1 + alpha / (gamma * beta)) * by_width.coefficient * width.coefficient**-alpha
    error = SaturatingLaw(floor, PowerLaw(float(above), -alpha * width.exponent))
    return Laws(width, epochs, error, (float(compute.min()), float(compute.max())))
