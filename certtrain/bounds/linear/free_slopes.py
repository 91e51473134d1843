"""Where the slope of the line below an elementwise function may be chosen: what alpha-CROWN optimises.

For a function f that is straight between kinks, f(x) - s·x is least at an end of its interval or at a kink, so every
slope s has a best line below f. Those that can serve at all are the slopes of f's convex envelope on the interval: the
line of any other is nowhere above that of the nearer end of this range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.interval import clipped
from certtrain.bounds.linear.relaxations import chord_slope, narrow, piecewise_linear
from certtrain.bounds.operations.record import OPERATIONS, Operation, PiecewiseLinear, at_settings


class FreeSlopes(NamedTuple):
    """slope·x + offset(slope) <= f(x) on a box, for every slope from low to high.

    low, high: of the box's shape (B, ...); equal where one line is best whatever the rest of the network does.
    points, values: where f(x) - slope·x can be least, and f there, each (B, ...); none where all lines go through 0.
    """

    low: Tensor
    high: Tensor
    points: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()

    def offset(self, slope: Tensor) -> Tensor | None:
        """(B, R, ...) for slopes (B, R, ...), differentiable; None where it is 0."""
        least: Tensor | None = None
        for point, value in zip(self.points, self.values, strict=True):
            rest = value[:, None] - slope * point[:, None]
            least = rest if least is None else torch.minimum(least, rest)
        return least


Rule = Callable[..., FreeSlopes]  # of a box and the operation's settings


def leaky_relu(x: Box, negative_slope: float) -> FreeSlopes:
    """All through 0. (Xu et al. 2021, arXiv 2011.13824.)"""
    if negative_slope > 1:  # concave: the chord
        chord = _below_leaky_relu(x, negative_slope)
        return chord._replace(high=chord.low)
    active, inactive = x.lower >= 0, (x.lower < 0) & (x.upper <= 0)
    one = torch.ones_like(x.lower)
    return FreeSlopes(torch.where(active, one, negative_slope), torch.where(inactive, negative_slope, one))


def relu(x: Box) -> FreeSlopes:
    return leaky_relu(x, 0.0)


def below_piecewise_linear(function: Callable[..., Tensor], kinks: Any) -> Rule:
    """The envelope's first slope is that of the lowest chord from the interval's lower end, its last one that of the
    highest chord to its upper end.
    """
    relaxation = piecewise_linear(function, kinks)

    def rule(x: Box, *settings: Any) -> FreeSlopes:
        points = clipped(x, at_settings(kinks, *settings))
        values = [function(point, *settings) for point in points]
        graph = list(zip(points, values, strict=True))
        only = relaxation(x, *settings).lower_slope  # where the interval is too narrow for chords
        low, high = torch.full_like(only, torch.inf), torch.full_like(only, -torch.inf)
        for point, value in graph[1:]:
            low = torch.minimum(low, _slope(graph[0], (point, value), torch.inf))
        for point, value in graph[:-1]:
            high = torch.maximum(high, _slope((point, value), graph[-1], -torch.inf))
        return FreeSlopes(low.where(low < torch.inf, only), high.where(high > -torch.inf, only), points, values)

    return rule


def _slope(start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], otherwise: float) -> Tensor:
    """Of the chord from one point of the graph to another; `otherwise` where they are (nearly) the same."""
    return chord_slope(end[0] - start[0], end[1] - start[1], otherwise, narrow(start[0]))


def free_slopes_from_traits(operation: Operation) -> Rule | None:
    """The rule that an operation's curve gives; None where it is not piecewise linear."""
    curve = operation.curve
    return below_piecewise_linear(operation.function, curve.kinks) if isinstance(curve, PiecewiseLinear) else None


_below_leaky_relu = below_piecewise_linear(F.leaky_relu, (0.0,))

FREE_SLOPES: dict[Callable, Rule] = {
    **{
        function: rule
        for function, operation in OPERATIONS.items()
        if (rule := free_slopes_from_traits(operation)) is not None
    },
    F.relu: relu,
    F.leaky_relu: leaky_relu,
}
"""By function: where its relaxation leaves the slope of the line below free."""
