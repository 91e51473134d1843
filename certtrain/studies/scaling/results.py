"""What the runs of a plan came to: the rule that was tuned, the points, the laws, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from certtrain.errors import CheckpointError, UsageError
from certtrain.runtime.files import parse_json
from certtrain.studies.progress import is_finished
from certtrain.studies.scaling.cost import Counter
from certtrain.studies.scaling.design import Plan, Planned, Settings, require_comparable
from certtrain.studies.scaling.fits import (
    FEWEST_SIZES,
    Fit,
    Foretold,
    Laws,
    Point,
    PowerLaw,
    Resampled,
    bootstrap,
    curves,
    fit_optima,
    foretold,
    power_law,
)
from certtrain.studies.scaling.joint import fit_jointly

RECORD = "scaling.json"
APPROACHES: Mapping[str, Fit] = {"isoflop": fit_optima, "joint": fit_jointly}


@dataclass(frozen=True)
class Measured:
    """A cell, and the errors of its finished runs on `images` validation images, by seed."""

    cell: Planned
    by_seed: Mapping[int, float]
    images: int

    @property
    def errors(self) -> tuple[float, ...]:
        return tuple(self.by_seed.values())

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


def measured(cells: Sequence[Planned], seeds: Sequence[int], folder: Path) -> list[Measured]:
    """The cells of which runs are finished, be it of one seed: a grid is of use before its last seed is trained.

    Raises:
        CheckpointError: a summary is corrupt.
    """
    found = []
    for cell in cells:
        runs = {seed: folder / run.name for seed in seeds for run in cell.runs([seed])}
        summaries = {seed: _summary(run / "summary.json") for seed, run in runs.items() if is_finished(run)}
        if summaries:
            errors = {seed: summary["verified_error"] for seed, summary in summaries.items()}
            found.append(Measured(cell, errors, next(iter(summaries.values()))["images"]))
    return found


def finished_runs(results: Sequence[Measured]) -> int:
    return sum(len(result.by_seed) for result in results)


def _summary(file: Path) -> dict[str, Any]:
    try:
        summary = parse_json(file.read_text(encoding="utf-8"))
        if not (0 <= summary["verified_error"] <= 1 and summary["images"] > 0 and summary["split"] == "validation"):
            raise ValueError("no errors on validation images")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is missing or corrupt ({error})") from error
    return summary


# --- tuning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TunedRule:
    """Power laws of the width through what was best at each of the widths that were tried.

    lr, batch_size, one_minus_beta2: the laws; batch_sizes, beta2s: those tried, of which the nearest is taken; best: by
    width.
    """

    lr: PowerLaw
    batch_size: PowerLaw
    one_minus_beta2: PowerLaw
    batch_sizes: tuple[int, ...]
    beta2s: tuple[float, ...]
    best: Mapping[int, Settings]

    def __call__(self, width: int) -> Settings:
        batch_size, rest = self.batch_size(width), self.one_minus_beta2(width)
        return Settings(
            float(f"{self.lr(width):.3g}"),
            min(self.batch_sizes, key=lambda size: abs(math.log(size / batch_size))),
            min(self.beta2s, key=lambda beta2: abs(math.log((1 - beta2) / rest))),
        )


def tuned_rule(results: Sequence[Measured]) -> TunedRule:
    """The rule of `TuningSection`, from its runs."""
    best: dict[int, Measured] = {}
    for result in results:
        width = result.cell.width
        if width not in best or result.error < best[width].error:
            best[width] = result
    widths = sorted(best)
    chosen = {width: _tried(best[width]) for width in widths}
    tried = [_tried(result) for result in results]
    return TunedRule(
        power_law(widths, [chosen[width].lr for width in widths]),
        power_law(widths, [chosen[width].batch_size for width in widths]),
        power_law(widths, [1 - chosen[width].beta2 for width in widths]),
        tuple(sorted({settings.batch_size for settings in tried})),
        tuple(sorted({settings.beta2 for settings in tried})),
        chosen,
    )


def _tried(result: Measured) -> Settings:
    assert result.cell.tried is not None
    return result.cell.tried


# --- laws -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A protocol's points, and laws where they could be fitted by an approach; `why_not` otherwise.

    foretold: the test of the laws, by optima that were not fitted to.
    """

    protocol: str
    approach: str
    points: Sequence[Point]
    noise: str
    laws: Laws | None
    resampled: Resampled | None
    foretold: Sequence[Foretold] = ()
    why_not: str = ""

    @property
    def dropped(self) -> list[str]:
        """What was not fitted to, and why; jointly all is."""
        if self.approach != "isoflop":
            return []
        optima = () if self.laws is None else self.laws.optima
        edges = [
            f"{optimum.budget:.3g} FLOP: the optimum lies at the edge of the grid, width {optimum.width:g}"
            for optimum in optima
            if optimum.at_edge
        ]
        budgets = {point.budget for point in self.points} - curves(self.points).keys()
        return edges + [f"{budget:.3g} FLOP: fewer than {FEWEST_SIZES} widths" for budget in sorted(budgets)]


def fit(plan: Plan, results: Sequence[Measured], protocol: str) -> list[Fitted]:
    """Fit the laws of one protocol to its finished cells, by each approach.

    Raises:
        UsageError: the cells differ in more than a law allows.
    """
    cells = [result for result in results if result.cell.protocol == protocol]
    require_comparable(plan, {result.cell.name: result.cell.config for result in cells})
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
    resamples = plan.file.resamples
    return [_fit(protocol, approach, points, noise, resamples) for approach in APPROACHES]


def _fit(protocol: str, approach: str, points: Sequence[Point], noise: str, resamples: int) -> Fitted:
    by = APPROACHES[approach]
    try:
        laws = by(points)
    except UsageError as error:
        return Fitted(protocol, approach, points, noise, None, None, why_not=str(error))
    again, tests = bootstrap(points, resamples, fit=by), foretold(points, resamples, fit=by)
    return Fitted(protocol, approach, points, noise, laws, again, tests)


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


# --- JSON -------------------------------------------------------------------------------------------------------------


def record(
    plan: Plan,
    count: Counter,
    rule: TunedRule | None,
    tuning: Sequence[Measured],
    grid: Sequence[Measured],
    fits: Sequence[Fitted],
    left_out: Sequence[str],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Of scaling.json: every run, and what was made of them."""
    hidden: Any = {"data": {"root", "path"}, "model": {"path"}}  # where this machine keeps things
    return {
        "versions": dict(versions),
        "plan": plan.file.model_dump(mode="json", exclude={"overrides": {"data.root", "data.path"}}),
        "eps": plan.base.epsilon.max,
        "data": {"images": count.images, "image_shape": list(count.image_shape), "classes": count.classes},
        "base": plan.base.model_dump(mode="json", exclude=hidden),
        "tuning": None if rule is None else {"rule": asdict(rule), "runs": [_row(result) for result in tuning]},
        "runs": [_row(result) for result in grid],
        "left_out": list(left_out),
        "fits": {
            protocol: {each.approach: _fitted(each, plan.file.forecast) for each in fits if each.protocol == protocol}
            for protocol in dict.fromkeys(each.protocol for each in fits)
        },
    }


def _row(result: Measured) -> dict[str, Any]:
    cell, config = result.cell, result.cell.config
    return {
        "protocol": cell.protocol,
        "budget": cell.budget,
        "compute": cell.compute,
        "width": cell.width,
        "epochs": config.training.epochs,
        "warmup_epochs": config.epsilon.warmup_epochs,
        "lr": config.optimizer.lr,
        "batch_size": config.training.batch_size,
        "betas": config.optimizer.arguments.get("betas"),
        "seeds": list(result.by_seed),
        "verified_error": list(result.errors),
        "images": result.images,
    }


def _fitted(fitted: Fitted, forecast: float) -> dict[str, Any]:
    laws, resampled = fitted.laws, fitted.resampled
    if laws is None or resampled is None:
        return {"why_not": fitted.why_not, "dropped": fitted.dropped}
    exponents = resampled.exponents
    return {
        "noise": fitted.noise,
        "dropped": fitted.dropped,
        "optima": [asdict(optimum) for optimum in laws.optima],
        "width": {**asdict(laws.width), "exponent_interval": exponents["width"]},
        "epochs": {**asdict(laws.epochs), "exponent_interval": exponents["epochs"]},
        "error": {"floor": laws.error.floor, **asdict(laws.error.above), "exponent_interval": exponents["error"]},
        "resamples": {"drawn": resampled.drawn, "fitted": len(resampled.laws)},
        "resampled": [_laws_row(each) for each in resampled.laws],
        "range": list(laws.range),
        "forecast": {"compute": forecast, **predicted(laws, resampled, forecast)},
        "foretold": [_foretold_row(each) for each in fitted.foretold],
    }


def _foretold_row(each: Foretold) -> dict[str, Any]:
    rows = {name: dict(zip(("measured", "value", "interval"), each[name], strict=True)) for name in each.intervals}
    return {"budget": each.optimum.budget, "compute": each.optimum.compute, **rows}


def _laws_row(laws: Laws) -> list[float]:
    """Enough of a resample to evaluate it anywhere."""
    above = laws.error.above
    width, epochs = laws.width, laws.epochs
    numbers = (width.coefficient, width.exponent, epochs.coefficient, epochs.exponent)
    return [float(f"{value:.6g}") for value in (*numbers, laws.error.floor, above.coefficient, above.exponent)]


def predicted(laws: Laws, resampled: Resampled, compute: float) -> dict[str, Any]:
    """Width, epochs and verified error at so much compute, with intervals."""
    intervals = resampled.at(compute)
    values = {"width": laws.width(compute), "epochs": laws.epochs(compute), "error": laws.error(compute)}
    return {name: {"value": value, "interval": intervals[name]} for name, value in values.items()}
