"""What the runs of a plan came to: the errors of its cells, and the laws that were fitted to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from certtrain.errors import UsageError
from certtrain.runs.files import SUMMARY, is_finished
from certtrain.runtime.files import read_json
from certtrain.studies.progress import has_diverged
from certtrain.studies.scaling.design import Plan, Planned, require_comparable
from certtrain.studies.scaling.fits import ISOFLOP, Approach, Foretold, Laws, Point, Resampled, bootstrap, foretold
from certtrain.studies.scaling.joint import JOINT

APPROACHES: Mapping[str, Approach] = {"isoflop": ISOFLOP, "joint": JOINT}


@dataclass(frozen=True)
class Measured:
    """A cell, and the errors of its finished runs on `images` validation images, by seed; 0 where all have diverged."""

    cell: Planned
    by_seed: Mapping[int, float]
    images: int

    @property
    def errors(self) -> tuple[float, ...]:
        return tuple(self.by_seed.values())

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


def measured(cells: Sequence[Planned], seeds: Sequence[int], folder: Path, diverged: bool = False) -> list[Measured]:
    """The cells of which runs are finished, be it of one seed: a grid is of use before its last seed is trained.

    Args:
        diverged: whether runs that have diverged count, as ones that prove no image.

    Raises:
        CheckpointError: a summary is corrupt, or its errors are at another radius than the plan's.
    """
    results = []
    for cell in cells:
        runs = {seed: folder / run.name for seed in seeds for run in cell.runs([seed])}
        checked = partial(_of_validation_images, eps=cell.config.judged_radius)
        summaries = {seed: read_json(run / SUMMARY, checked) for seed, run in runs.items() if is_finished(run)}
        errors = {seed: summary["verified_error"] for seed, summary in summaries.items()}
        if diverged:
            errors |= {seed: 1.0 for seed, run in runs.items() if has_diverged(run)}
        if errors:
            images = next((summary["images"] for summary in summaries.values()), 0)
            results.append(Measured(cell, dict(sorted(errors.items())), images))
    return results


def finished_runs(results: Sequence[Measured]) -> int:
    return sum(len(result.by_seed) for result in results)


def _of_validation_images(summary: dict[str, Any], eps: float) -> dict[str, Any]:
    if not (0 <= summary["verified_error"] <= 1 and summary["images"] > 0 and summary["split"] == "validation"):
        raise ValueError("no errors on validation images")
    if summary["eps"] != eps:
        raise ValueError(f"its errors are at {summary['eps']}, the plan's at {eps}")
    return summary


@dataclass(frozen=True)
class Fitted:
    """A protocol's points, and laws where they could be fitted by an approach; `why_not` otherwise.

    noise: of the points, in words; misfit: what deviation the approach adds to it, 0 where there are no laws.
    foretold: the test of the laws, by optima that were not fitted to.
    """

    protocol: str
    approach: str
    points: Sequence[Point]
    noise: str
    laws: Laws | None
    resampled: Resampled | None
    misfit: float = 0.0
    foretold: Sequence[Foretold] = ()
    why_not: str = ""


def fit(plan: Plan, results: Sequence[Measured], protocol: str) -> list[Fitted]:
    """Fit the laws of one protocol to its finished cells, by each approach.

    Raises:
        UsageError: the cells differ in more than a law allows.
    """
    cells = [result for result in results if result.cell.protocol == protocol]
    require_comparable(plan, {result.cell.name: result.cell.config for result in cells})
    points, noise = points_of(cells)
    resamples = plan.file.resamples
    return [_fit(protocol, approach, points, noise, resamples) for approach in APPROACHES]


def points_of(cells: Sequence[Measured]) -> tuple[list[Point], str]:
    """What laws are fitted to, and where its noise comes from."""
    deviation, noise = _noise(cells)
    points = [
        Point(
            result.cell.budget,
            result.cell.compute,
            result.cell.width,
            result.cell.config.training.epochs,
            result.error,
            deviation(result),
        )
        for result in cells
    ]
    return points, noise


def _fit(protocol: str, approach: str, points: Sequence[Point], noise: str, resamples: int) -> Fitted:
    by = APPROACHES[approach]
    try:
        laws = by.fit(points)
    except UsageError as error:
        return Fitted(protocol, approach, points, noise, None, None, why_not=str(error))
    again, tests = bootstrap(points, resamples, approach=by), foretold(points, resamples, approach=by)
    return Fitted(protocol, approach, points, noise, laws, again, by.misfit(points), tests)


def _noise(cells: Sequence[Measured]) -> tuple[Any, str]:
    """The standard deviation of a cell's mean error: by its seeds, pooled over all cells; by the images alone else."""
    squares = [sum((error - cell.error) ** 2 for error in cell.errors) for cell in cells]
    freedom = sum(len(cell.errors) - 1 for cell in cells)
    if freedom > 0:
        pooled = math.sqrt(sum(squares) / freedom)
        return lambda cell: pooled / math.sqrt(len(cell.errors)), f"of seeds, pooled over cells: {pooled:.3g}"
    return (
        lambda cell: math.sqrt(cell.error * (1 - cell.error) / cell.images),
        "of the validation images alone, as there is one seed: intervals are too narrow by what seeds differ",
    )
