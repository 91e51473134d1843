"""What to buy for a given amount of compute, by laws that were fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from certtrain.config import Config
from certtrain.errors import CheckpointError, UsageError, unknown
from certtrain.runtime.files import parse_json
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.studies.scaling.design import Length, Plan, ScalingFile, Settings
from certtrain.studies.scaling.fits import Interval, Laws, PowerLaw, Resampled, SaturatingLaw
from certtrain.studies.scaling.record import RECORD
from certtrain.studies.scaling.tuned import TunedRule

MOST_WIDTH = 100_000
Positive = Annotated[FiniteFloat, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True)


class Law(_Record):
    coefficient: Positive
    exponent: FiniteFloat

    @property
    def law(self) -> PowerLaw:
        return PowerLaw(self.coefficient, self.exponent)


class ErrorLaw(Law):
    floor: Annotated[float, Field(ge=0, le=1)]


class FittedLaws(_Record):
    """Of one protocol, by one approach; `range`: the compute of what they were fitted to."""

    width: Law
    epochs: Law
    error: ErrorLaw
    resampled: list[Annotated[list[FiniteFloat], Field(min_length=7, max_length=7)]] = Field(max_length=100_000)
    range: Annotated[list[Positive], Field(min_length=2, max_length=2)]

    @property
    def laws(self) -> Laws:
        error = SaturatingLaw(self.error.floor, self.error.law)
        return Laws(self.width.law, self.epochs.law, error, (self.range[0], self.range[1]))

    @property
    def again(self) -> Resampled:
        measured = self.range[0], self.range[1]
        rows = [
            Laws(PowerLaw(a, b), PowerLaw(c, d), SaturatingLaw(e, PowerLaw(f, g)), measured)
            for a, b, c, d, e, f, g in self.resampled
        ]
        return Resampled(tuple(rows), len(rows))


class Unfitted(_Record):
    why_not: str


class Best(_Record):
    lr: Positive
    batch_size: int = Field(ge=1)
    beta2: Annotated[float, Field(gt=0, lt=1)]


class Rule(_Record):
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


class Tuning(_Record):
    rule: Rule


class Data(_Record):
    images: int = Field(ge=1)
    image_shape: list[Annotated[int, Field(ge=1, le=4096)]] = Field(min_length=3, max_length=3)
    classes: int = Field(ge=2)


class ScalingRecord(_Record):
    """Of scaling.json, what a recommendation needs."""

    plan: ScalingFile
    base: Config
    eps: float
    data: Data
    tuning: Tuning | None
    fits: dict[str, dict[str, FittedLaws | Unfitted]]  # by protocol and approach


@dataclass(frozen=True)
class Recommendation:
    """A width, epochs, and the rest of a configuration for so much compute; intervals of 95 %.

    error: verified error that is foretold; range: the compute of what was measured.
    """

    compute: float
    width: int
    epochs: int
    settings: Settings
    config: Config
    error: float
    width_interval: Interval | None
    epochs_interval: tuple[int, int] | None
    error_interval: Interval | None
    range: Interval

    @property
    def doublings_beyond(self) -> float:
        """How far outside of what was measured, in doublings of compute; 0 within."""
        low, high = self.range
        return max(0.0, math.log2(self.compute / high), math.log2(low / self.compute))


def read_record(source: Path) -> ScalingRecord:
    """scaling.json, or that in the folder `source`.

    Raises:
        UsageError: there is none.
        CheckpointError: it is corrupt.
    """
    file = source / RECORD if source.is_dir() else source
    if not file.is_file():
        raise UsageError(f"there is no {file}: `certtrain scale PLAN.yaml` fits a law, --law names where it is")
    try:
        return ScalingRecord.model_validate(parse_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem else error
        raise CheckpointError(f"{file} is missing or corrupt ({str(reason)[:160]})") from error


def recommend(record: ScalingRecord, protocol: str, approach: str, compute: float, eps: float) -> Recommendation:
    """The width that the laws of a protocol say for so many operations, and how long that can be trained.

    Args:
        approach: of `certtrain.studies.scaling.results.APPROACHES`, by which the laws were fitted.

    Raises:
        UsageError: no laws of that protocol, approach or radius; too little for an epoch.
    """
    if not math.isclose(eps, record.eps, rel_tol=1e-6):
        raise UsageError(f"--eps: the law was fitted at {record.eps:.6g}, not at {eps:.6g}: run a plan at that radius")
    if protocol not in record.fits:
        raise unknown("protocol", protocol, record.fits)
    if approach not in record.fits[protocol]:
        raise unknown("approach", approach, record.fits[protocol])
    fitted = record.fits[protocol][approach]
    if isinstance(fitted, Unfitted):
        others = [name for name, each in record.fits[protocol].items() if isinstance(each, FittedLaws)]
        instead = f"; there are those of --approach {others[0]}" if others else ""
        raise UsageError(f"protocol {protocol} has no laws by {approach}: {fitted.why_not}{instead}")
    section = record.plan.protocols[protocol]
    rule = record.tuning.rule.rule if record.tuning is not None and section.tuned else None
    channels, height, width = record.data.image_shape
    count = OperationCounter(record.data.images, (channels, height, width), record.data.classes)
    plan = Plan(record.plan, record.base, Path())

    def length(width: float) -> Length:
        whole = min(MOST_WIDTH, max(1, round(width)))
        return Length(plan, whole, section, None if rule is None else rule(whole), count)

    best, intervals = length(fitted.laws.width(compute)), fitted.again.at(compute)
    epochs = best.epochs(compute)
    if epochs < best.shortest:
        raise UsageError(
            f"--budget: {compute:.4g} FLOP are not enough for width {best.width}, which the law says: "
            f"{best.shortest} epochs cost {best.compute(best.shortest):.4g}"
        )
    config = best.config(epochs)
    betas = config.optimizer.arguments.get("betas", [0.9, 0.999])
    widths = intervals["width"]
    return Recommendation(
        best.compute(epochs),
        best.width,
        epochs,
        Settings(config.optimizer.lr, config.training.batch_size, betas[1]),
        config,
        fitted.laws.error(compute),
        widths,
        None if widths is None else (length(widths[1]).epochs(compute), length(widths[0]).epochs(compute)),
        intervals["error"],
        (fitted.range[0], fitted.range[1]),
    )
