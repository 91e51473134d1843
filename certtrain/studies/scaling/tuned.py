"""The rule by which learning rate, batch size and β2 follow the width, from the runs that were tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from certtrain.errors import UsageError
from certtrain.studies.scaling.design import Settings
from certtrain.studies.scaling.fits import PowerLaw, power_law
from certtrain.studies.scaling.results import Measured


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
    """The rule of `TuningSection`, from its runs.

    Raises:
        UsageError: none of a width proves an image, as where all have diverged.
    """
    best: dict[int, Measured] = {}
    for result in results:
        width = result.cell.width
        if width not in best or result.error < best[width].error:
            best[width] = result
    widths = sorted(best)
    for width in widths:
        if best[width].error >= 1:
            raise UsageError(f"tuning: no run of width {width} proves an image: change lr, batch_size or budget there")
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
