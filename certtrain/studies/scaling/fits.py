"""Optimum and error as functions of compute, with intervals: pure functions of measured points.

As in Porian et al. 2024 (arXiv 2406.19146), which resolves where Kaplan et al. 2020 (2001.08361) and Hoffmann et al.
2022 (2203.15556) disagree: at each budget the error is interpolated over sizes in log-log, the optimum is where that is
least, and power laws are fitted to the optima.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import minimize_scalar

from certtrain.errors import UsageError

FEWEST_SIZES = 3  # at a budget, of which one is inside
FEWEST_BUDGETS = 2  # for a power law
FEWEST_FOR_FLOOR = 4  # for a power law above a floor, which has three parameters
GRID = 401  # places where an interpolated curve is looked at

Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A network of a width (in any unit of size), trained for so many epochs at the cost `compute`.

    error: the mean over seeds; noise: the standard deviation of that mean; budget: which curve it belongs to.
    """

    budget: float
    compute: float
    width: float
    epochs: float
    error: float
    noise: float = 0.0


@dataclass(frozen=True)
class Optimum:
    """The best width at a budget. at_edge: it is the smallest or largest that was tried, and so may lie beyond."""

    budget: float
    compute: float
    width: float
    epochs: float
    error: float
    at_edge: bool


@dataclass(frozen=True)
class PowerLaw:
    """coefficient · x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: Any) -> Any:
        """Of a number or an array."""
        return self.coefficient * x**self.exponent


@dataclass(frozen=True)
class SaturatingLaw:
    """A floor, and a falling power law above it."""

    floor: float
    above: PowerLaw

    def __call__(self, x: Any) -> Any:
        return self.floor + self.above(x)


@dataclass(frozen=True)
class Laws:
    """Optimal width and epochs, and the error they lead to, as functions of compute.

    range: least and most compute of what was fitted to. optima: of single budgets, where the laws come from these;
    dropped: what was not fitted to, and why.
    """

    width: PowerLaw
    epochs: PowerLaw
    error: SaturatingLaw
    range: Interval
    optima: tuple[Optimum, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def exponents(self) -> Mapping[str, float]:
        return {
            "width": self.width.exponent,
            "epochs": self.epochs.exponent,
            "error": self.error.above.exponent,
        }

    def to_row(self) -> list[float]:
        """Enough to evaluate them anywhere, in six digits: what `from_row` reads."""
        error = self.error
        laws = (self.width, self.epochs)
        numbers = [number for law in laws for number in (law.coefficient, law.exponent)]
        numbers += [error.floor, error.above.coefficient, error.above.exponent]
        return [float(f"{number:.6g}") for number in numbers]

    @classmethod
    def from_row(cls, row: Sequence[float], range: Interval) -> Laws:
        width, width_exponent, epochs, epochs_exponent, floor, error, error_exponent = row
        return cls(
            PowerLaw(width, width_exponent),
            PowerLaw(epochs, epochs_exponent),
            SaturatingLaw(floor, PowerLaw(error, error_exponent)),
            range,
        )


def isoflop_optimum(points: Sequence[Point]) -> Optimum:
    """The optimum of one budget: the least error of the curve through the points, Akima's, in log-log.

    Raises:
        UsageError: fewer than FEWEST_SIZES widths, or two points of one.
    """
    points = sorted(points, key=lambda point: point.width)
    widths = [point.width for point in points]
    if len(points) < FEWEST_SIZES or len(set(widths)) < len(widths):
        raise UsageError(f"a budget needs {FEWEST_SIZES} different widths or more to have an optimum, not {widths}")
    compute = math.exp(sum(math.log(point.compute) for point in points) / len(points))
    best = min(range(len(points)), key=lambda index: points[index].error)
    if best in (0, len(points) - 1):
        edge = points[best]
        return Optimum(edge.budget, edge.compute, edge.width, edge.epochs, edge.error, at_edge=True)
    log_width = np.log(widths)
    curve = Akima1DInterpolator(log_width, np.log([max(point.error, 1e-12) for point in points]))
    places = np.linspace(log_width[best - 1], log_width[best + 1], GRID)
    values = curve(places)
    place, error = float(places[values.argmin()]), float(np.exp(values.min()))
    epochs = math.exp(np.interp(place, log_width, np.log([point.epochs for point in points])))
    return Optimum(points[best].budget, compute, math.exp(place), epochs, error, at_edge=False)


def power_law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """Least squares in log-log; a constant where there is one x."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if np.ptp(log_x) == 0:
        return PowerLaw(float(np.exp(log_y.mean())), 0.0)
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def saturating_law(x: Sequence[float], y: Sequence[float]) -> SaturatingLaw:
    """Least squares of log y; without a floor where y does not fall, or for fewer than FEWEST_FOR_FLOOR points.

    For each floor below the least y the power law above it is a straight line in log-log; the floor is searched for.
    """
    plain = power_law(x, y)
    if len(x) < FEWEST_FOR_FLOOR or plain.exponent >= 0:
        return SaturatingLaw(0.0, plain)
    places, values = np.asarray(x, float), np.asarray(y, float)
    least = float(values.min())

    def law(share: float) -> SaturatingLaw:
        return SaturatingLaw(share * least, power_law(places, values - share * least))

    def residual(share: float) -> float:
        return float(np.square(np.log(law(share)(places)) - np.log(values)).sum())

    return law(float(minimize_scalar(residual, bounds=(0.0, 1 - 1e-6), method="bounded").x))


def fit_optima(points: Sequence[Point]) -> Laws:
    """The laws through the optima of points at several budgets.

    Raises:
        UsageError: fewer than FEWEST_BUDGETS budgets have an optimum inside their grid; says which lie at the edge.
    """
    optima = tuple(isoflop_optimum(curve) for curve in curves(points).values())
    inside = [optimum for optimum in optima if not optimum.at_edge]
    if len(inside) < FEWEST_BUDGETS:
        edges = ", ".join(f"{each.budget:.3g} FLOP (width {each.width:g})" for each in optima if each.at_edge)
        raise UsageError(
            f"{len(inside)} budgets have an optimum inside the grid, {FEWEST_BUDGETS} are needed"
            + (f"; at {edges} the optimum lies at the edge: add widths beyond" if edges else ": add budgets")
        )
    compute = [optimum.compute for optimum in inside]
    return Laws(
        power_law(compute, [optimum.width for optimum in inside]),
        power_law(compute, [optimum.epochs for optimum in inside]),
        saturating_law(compute, [optimum.error for optimum in inside]),
        (min(compute), max(compute)),
        optima,
        tuple(_dropped(points, optima)),
    )


def _dropped(points: Sequence[Point], optima: Sequence[Optimum]) -> Iterator[str]:
    for optimum in optima:
        if optimum.at_edge:
            yield f"{optimum.budget:.3g} FLOP: the optimum lies at the edge of the grid, width {optimum.width:g}"
    for budget in sorted({point.budget for point in points} - curves(points).keys()):
        yield f"{budget:.3g} FLOP: fewer than {FEWEST_SIZES} widths"


def curves(points: Sequence[Point]) -> dict[float, list[Point]]:
    """The points of each budget that has enough of them."""
    by_budget: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.budget, point.width)):
        by_budget.setdefault(point.budget, []).append(point)
    return {budget: curve for budget, curve in by_budget.items() if len(curve) >= FEWEST_SIZES}


@dataclass(frozen=True)
class Resampled:
    """Fits to points that were measured again, by chance: laws, those that could be fitted, of `drawn` tries."""

    laws: tuple[Laws, ...]
    drawn: int

    def interval(self, values: Sequence[float]) -> Interval | None:
        """In which 95% of one value for each of the laws lie, as many below it as above; None where there are none."""
        if not len(values):
            return None
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    def at(self, compute: float) -> Mapping[str, Interval | None]:
        """Of width, epochs and error at so much compute."""
        return {
            "width": self.interval([laws.width(compute) for laws in self.laws]),
            "epochs": self.interval([laws.epochs(compute) for laws in self.laws]),
            "error": self.interval([laws.error(compute) for laws in self.laws]),
        }

    @property
    def exponents(self) -> Mapping[str, Interval | None]:
        names = ("width", "epochs", "error")
        return {name: self.interval([laws.exponents[name] for laws in self.laws]) for name in names}


@dataclass(frozen=True)
class Approach:
    """How laws are fitted to points, and what deviation of a point, beyond its noise, the fit leaves unexplained."""

    fit: Callable[[Sequence[Point]], Laws]
    misfit: Callable[[Sequence[Point]], float] = lambda points: 0.0


ISOFLOP = Approach(fit_optima)  # its curves go through the points


def bootstrap(points: Sequence[Point], resamples: int = 1000, seed: int = 0, approach: Approach = ISOFLOP) -> Resampled:
    """Fit again to points whose errors have moved by their noise and the misfit (parametric bootstrap).

    A resample that has no laws, as where too many optima lie at the edge, is left out; how many those are is part of
    the answer.
    """
    random, misfit = np.random.default_rng(seed), approach.misfit(points)
    fitted = []
    for _ in range(resamples):
        moved = random.normal([point.error for point in points], [math.hypot(point.noise, misfit) for point in points])
        again = [
            replace(point, error=float(np.clip(error, 1e-9, 1.0))) for point, error in zip(points, moved, strict=True)
        ]
        try:
            fitted.append(approach.fit(again))
        except UsageError:
            continue
    return Resampled(tuple(fitted), resamples)


class Forecast(NamedTuple):
    """Of one quantity of an optimum: as measured, the value that laws foretell, and the interval of that."""

    measured: float
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Foretold:
    """The optimum of a budget, and what laws of the smaller budgets alone say of it, with their intervals."""

    optimum: Optimum
    laws: Laws
    intervals: Mapping[str, Interval | None]

    def forecast(self, name: str) -> Forecast:
        """Of "width", "epochs" or "error"."""
        value = float(getattr(self.laws, name)(self.optimum.compute))
        return Forecast(getattr(self.optimum, name), value, self.intervals[name])


def foretold(points: Sequence[Point], resamples: int = 1000, approach: Approach = ISOFLOP) -> list[Foretold]:
    """For each optimum inside its grid that laws can be fitted below: whether they would have foretold it."""
    tests = []
    for budget, curve in curves(points).items():
        optimum, below = isoflop_optimum(curve), [point for point in points if point.budget < budget]
        if optimum.at_edge:
            continue
        try:
            laws = approach.fit(below)
        except UsageError:
            continue
        tests.append(Foretold(optimum, laws, bootstrap(below, resamples, approach=approach).at(optimum.compute)))
    return tests
