"""scaling.json: every run of a plan, and what was made of them; written, and what a recommendation needs read again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from certtrain.config import Config
from certtrain.errors import UsageError
from certtrain.runs.files import SCALING
from certtrain.runs.records import Record
from certtrain.runtime.files import read_json
from certtrain.studies.scaling.contrasts import Contrast
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.studies.scaling.design import Plan, ScalingFile
from certtrain.studies.scaling.fits import Foretold, Interval, Laws, PowerLaw, Resampled, SaturatingLaw
from certtrain.studies.scaling.results import Fitted, Measured
from certtrain.studies.scaling.tuned import TunedRule

Positive = Annotated[FiniteFloat, Field(gt=0)]


# --- written ----------------------------------------------------------------------------------------------------------


def record(
    *,
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
        "eps": plan.base.judged_radius,
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
        "resampled": [laws.to_row() for laws in resampled.laws],
        "range": list(laws.range),
        "forecast": {"compute": forecast, **predicted(laws, resampled, forecast)},
        "foretold": [_foretold_row(each) for each in fitted.foretold],
    }


def _foretold_row(each: Foretold) -> dict[str, Any]:
    rows = {name: each.forecast(name)._asdict() for name in each.intervals}
    return {"budget": each.optimum.budget, "compute": each.optimum.compute, **rows}


def predicted(laws: Laws, resampled: Resampled, compute: float) -> dict[str, Any]:
    """Width, epochs and verified error at so much compute, with intervals."""
    intervals = resampled.at(compute)
    values = {"width": laws.width(compute), "epochs": laws.epochs(compute), "error": laws.error(compute)}
    return {name: {"value": value, "interval": intervals[name]} for name, value in values.items()}


# --- read -------------------------------------------------------------------------------------------------------------


class Law(Record):
    coefficient: Positive
    exponent: FiniteFloat

    @property
    def law(self) -> PowerLaw:
        return PowerLaw(self.coefficient, self.exponent)


class ErrorLaw(Law):
    floor: Annotated[float, Field(ge=0, le=1)]


class FittedLaws(Record):
    """Of one protocol, by one approach; `range`: the compute of what they were fitted to."""

    width: Law
    epochs: Law
    error: ErrorLaw
    resampled: list[Annotated[list[FiniteFloat], Field(min_length=7, max_length=7)]] = Field(max_length=100_000)
    range: Annotated[list[Positive], Field(min_length=2, max_length=2)]

    @property
    def compute_range(self) -> Interval:
        return self.range[0], self.range[1]

    @property
    def laws(self) -> Laws:
        error = SaturatingLaw(self.error.floor, self.error.law)
        return Laws(self.width.law, self.epochs.law, error, self.compute_range)

    @property
    def resampled_laws(self) -> Resampled:
        rows = tuple(Laws.from_row(row, self.compute_range) for row in self.resampled)
        return Resampled(rows, len(rows))


class Unfitted(Record):
    why_not: str


class Best(Record):
    lr: Positive
    batch_size: int = Field(ge=1)
    beta2: Annotated[float, Field(gt=0, lt=1)]


class TuningRule(Record):
    lr: Law
    batch_size: Law
    one_minus_beta2: Law
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    beta2s: list[Annotated[float, Field(gt=0, lt=1)]] = Field(min_length=1)
    best: dict[str, Best]

    @property
    def rule(self) -> TunedRule:
        laws = self.lr.law, self.batch_size.law, self.one_minus_beta2.law
        return TunedRule(*laws, tuple(self.batch_sizes), tuple(self.beta2s), {})


class Tuning(Record):
    rule: TuningRule


class Data(Record):
    images: int = Field(ge=1)
    image_shape: list[Annotated[int, Field(ge=1, le=4096)]] = Field(min_length=3, max_length=3)
    classes: int = Field(ge=2)


class ScalingRecord(Record):
    """Of scaling.json, what a recommendation needs."""

    plan: ScalingFile
    base: Config
    eps: float  # at which the errors are
    data: Data
    tuning: Tuning | None
    fits: dict[str, dict[str, FittedLaws | Unfitted]]  # by protocol and approach

    def is_at(self, eps: float) -> bool:
        """Whether its laws were fitted at that radius."""
        return math.isclose(eps, self.eps, rel_tol=1e-6)


def read_record(source: Path) -> ScalingRecord:
    """scaling.json, or that in the folder `source`.

    Raises:
        UsageError: there is none.
        CheckpointError: it is corrupt.
    """
    file = source / SCALING if source.is_dir() else source
    if not file.is_file():
        raise UsageError(f"there is no {file}: `certtrain scale PLAN.yaml` fits a law, --law names where it is")
    return read_json(file, ScalingRecord.model_validate)
