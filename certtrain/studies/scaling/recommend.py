"""What to buy for a given amount of compute, by laws that were fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from certtrain.config import Config
from certtrain.errors import UsageError, unknown
from certtrain.studies.scaling.cost import OperationCounter
from certtrain.studies.scaling.design import Length, Plan, Settings
from certtrain.studies.scaling.fits import Interval
from certtrain.studies.scaling.record import FittedLaws, ScalingRecord, Unfitted

MOST_WIDTH = 100_000


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


def recommend(record: ScalingRecord, protocol: str, approach: str, compute: float, eps: float) -> Recommendation:
    """The width that the laws of a protocol say for so many operations, and how long that can be trained.

    Args:
        approach: of `certtrain.studies.scaling.results.APPROACHES`, by which the laws were fitted.

    Raises:
        UsageError: no laws of that protocol, approach or radius; too little for an epoch.
    """
    if not record.is_at(eps):
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

    best, intervals = length(fitted.laws.width(compute)), fitted.resampled_laws.at(compute)
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
