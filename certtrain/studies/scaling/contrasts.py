"""Whether two protocols lead to different laws: each is fitted to the cells that both have, with the seeds of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from certtrain.errors import UsageError
from certtrain.studies.scaling.fits import Approach, Interval, Laws, Point, Resampled, bootstrap
from certtrain.studies.scaling.results import APPROACHES, Measured, points_of


@dataclass(frozen=True)
class Exponent:
    """Of a law by either protocol, and the second less the first, with the 95 % interval of that difference."""

    values: tuple[float, float]
    difference: float
    interval: Interval | None


@dataclass(frozen=True)
class Contrast:
    """Exponents of "width", "epochs" and "error" by two protocols, from as many `cells` of each; or `why_not`."""

    protocols: tuple[str, str]
    approach: str
    cells: int
    exponents: Mapping[str, Exponent]
    why_not: str = ""


def contrasts(results: Sequence[Measured], resamples: int) -> list[Contrast]:
    """Each two protocols, by each approach. What is too little to fit a law to says so in `why_not`."""
    protocols = dict.fromkeys(result.cell.protocol for result in results)
    return [contrast for pair in combinations(protocols, 2) for contrast in _contrast(results, pair, resamples)]


def _contrast(results: Sequence[Measured], protocols: tuple[str, str], resamples: int) -> Iterator[Contrast]:
    first, second = common(results, *protocols)
    points, _ = points_of([*first, *second])  # the noise is that of both together
    sides = points[: len(first)], points[len(first) :]
    for name, approach in APPROACHES.items():
        try:
            exponents = _exponents(sides, approach, resamples)
        except UsageError as error:
            yield Contrast(protocols, name, len(first), {}, str(error))
        else:
            yield Contrast(protocols, name, len(first), exponents)


def common(results: Sequence[Measured], *protocols: str) -> tuple[list[Measured], ...]:
    """Of each protocol the cells that all have, by budget and width, with the seeds that all have."""
    cells = [
        {(result.cell.budget, result.cell.width): result for result in results if result.cell.protocol == protocol}
        for protocol in protocols
    ]
    by_protocol: tuple[list[Measured], ...] = tuple([] for _ in protocols)
    for place in sorted(set.intersection(*map(set, cells))):
        alike = [of_protocol[place] for of_protocol in cells]
        seeds = [seed for seed in alike[0].by_seed if all(seed in result.by_seed for result in alike)]
        if seeds:
            for side, result in zip(by_protocol, alike, strict=True):
                side.append(replace(result, by_seed={seed: result.by_seed[seed] for seed in seeds}))
    return by_protocol


def _exponents(sides: Sequence[Sequence[Point]], approach: Approach, resamples: int) -> dict[str, Exponent]:
    laws = [approach.fit(points) for points in sides]
    # Equal seeds would move the errors of both alike; as they are independent, the interval is none too narrow.
    again = [bootstrap(points, resamples, seed, approach) for seed, points in enumerate(sides)]
    return {name: _exponent(name, laws, again) for name in laws[0].exponents}


def _exponent(name: str, laws: Sequence[Laws], again: Sequence[Resampled]) -> Exponent:
    first, second = (each.exponents[name] for each in laws)
    moved = [b.exponents[name] - a.exponents[name] for a, b in zip(*(each.laws for each in again), strict=False)]
    return Exponent((first, second), second - first, again[0].interval(moved))
