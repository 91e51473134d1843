"""scaling.json: every run of a plan, and what was made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from certtrain.studies.scaling.contrasts import Contrast
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.studies.scaling.design import Plan
from certtrain.studies.scaling.fits import Foretold, Laws, Resampled
from certtrain.studies.scaling.results import Fitted, Measured
from certtrain.studies.scaling.tuned import TunedRule

RECORD = "scaling.json"


def record(
    plan: Plan,
    count: OperationCounter,
    rule: TunedRule | None,
    tuning: Sequence[Measured],
    grid: Sequence[Measured],
    fits: Sequence[Fitted],
    contrasts: Sequence[Contrast],
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
        "contrasts": [asdict(each) for each in contrasts],
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
        return {"why_not": fitted.why_not}
    exponents = resampled.exponents
    return {
        "noise": fitted.noise,
        "misfit": fitted.misfit,
        "dropped": list(laws.dropped),
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
