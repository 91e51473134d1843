"""Linear relaxations of elementwise functions: a line below and a line above, on each element's interval.

(Leaky) ReLU's are written down; any other's follow from what its record says of its curve:

piecewise linear   f(x) - s x is least and greatest at an end or a kink, which gives the best lines of any slope s
convex             a tangent below, the chord above; concave, the other way round
s-shaped           a tangent that touches on one side of 0, or the chord
smooth             as piecewise linear, over a grid, and a little further off: see `smooth`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.interval import clipped
from certtrain.bounds.operations.record import (
    OPERATIONS,
    Concave,
    Convex,
    Operation,
    PiecewiseLinear,
    Smooth,
    SShaped,
    at_settings,
)

TINY = 1e-30
NARROW = 1e-6  # width of an interval, relative to 1 + |x|, over which a chord's slope would be made of rounding errors
LEAST_WIDTH = 1e-6  # the same, wherever it lies, of functions that bend near 0 alone: s-shaped ones, exp up to 1
GRID = 32  # points to which a smooth function is looked at


class LinearRelaxation(NamedTuple):
    """lower_slope·x + lower_offset <= f(x) <= upper_slope·x + upper_offset on a box; tensors of the box's shape.

    An offset that is None is 0, and is not multiplied with anything.
    """

    lower_slope: Tensor
    lower_offset: Tensor | None
    upper_slope: Tensor
    upper_offset: Tensor | None

    def below(self, x: Tensor) -> Tensor:
        """The lower line at x."""
        return self.lower_slope * x + (0.0 if self.lower_offset is None else self.lower_offset)

    def above(self, x: Tensor) -> Tensor:
        """The upper line at x."""
        return self.upper_slope * x + (0.0 if self.upper_offset is None else self.upper_offset)

    def of_negative(self) -> LinearRelaxation:
        """Lines of -f."""
        lower, upper = (None if end is None else -end for end in (self.upper_offset, self.lower_offset))
        return LinearRelaxation(-self.upper_slope, lower, -self.lower_slope, upper)


def leaky_relu(x: Box, negative_slope: float) -> LinearRelaxation:
    """On one side the chord; on the other a line through 0, with slope 1 where upper > -lower, else `negative_slope`.

    The chord lies above, or below where the function is concave (a slope over 1).
    """
    below, above = x.lower.clamp(max=0), x.upper.clamp(min=0)
    chord = (above - negative_slope * below) / (above - below).clamp(min=TINY)
    slope = torch.where(x.lower >= 0, 1.0, torch.where(x.upper <= 0, negative_slope, chord))
    unstable = unstable_relus(x)
    steeper = torch.where(x.upper > -x.lower, torch.ones_like(slope), negative_slope)
    through_zero = torch.where(unstable, steeper, slope)
    offset = torch.where(unstable, above - slope * above, 0.0)
    if negative_slope > 1:
        return LinearRelaxation(slope, offset, through_zero, None)
    return LinearRelaxation(through_zero, None, slope, offset)


def relu(x: Box) -> LinearRelaxation:
    return leaky_relu(x, 0.0)


def unstable_relus(x: Box) -> Tensor:
    return (x.lower < 0) & (x.upper > 0)


Function = Callable[..., Tensor]
Relaxation = Callable[..., LinearRelaxation]


def _derivative(function: Function) -> Function:
    """By autograd; differentiable in turn."""

    def derivative(x: Tensor, *settings: Any) -> Tensor:
        value, pull_back = torch.func.vjp(lambda point: function(point, *settings), x)  # type: ignore[misc] # two, without has_aux
        return pull_back(torch.ones_like(value))[0]

    return derivative


def chord_slope(width: Tensor, rise: Tensor, otherwise: Tensor | float, least_width: Tensor | float) -> Tensor:
    """rise / width, or `otherwise`, which must do as well, over intervals that are (nearly) points.

    least_width: up to which they are, where rounding would make the quotient: `narrow` or LEAST_WIDTH.
    """
    wide = width > least_width
    return torch.where(wide, rise / torch.where(wide, width, 1.0), otherwise)


def narrow(x: Tensor) -> Tensor:
    """Up to which width an interval at x is (nearly) a point."""
    return NARROW * (1 + x.abs())


def _chord(function: Function, derivative: Function, low: Tensor, high: Tensor, *settings: Any) -> Tensor:
    """Its slope; of an interval that is (nearly) a point the derivative there, a constant, as any slope would do."""
    width, middle = high - low, (low + high) / 2
    rise = function(high, *settings) - function(low, *settings)
    return chord_slope(width, rise, derivative(middle.detach(), *settings).detach(), narrow(middle))


def _best(
    slopes: Sequence[Tensor], points: Sequence[Tensor], values: Sequence[Tensor], errors: Sequence[Any]
) -> LinearRelaxation:
    """The lines of the given slopes that enclose the graph, the tightest: those with the best value in the middle.

    Between neighbouring points f(x) - s x leaves the range of its two values by no more than the error given for them.
    (The value of a line in the middle of an interval, times its width, is the area below it.)
    """
    middle = (points[0] + points[-1]) / 2
    lines = []
    for slope in slopes:
        rests = [value - slope * point for point, value in zip(points, values, strict=True)]
        low, high = rests[0], rests[0]
        for rest, before, error in zip(rests[1:], rests, errors, strict=False):
            low = torch.minimum(low, torch.minimum(before, rest) - error)
            high = torch.maximum(high, torch.maximum(before, rest) + error)
        lines.append((slope, low, high))
    lower_slope, lower, upper = lines[0]
    upper_slope = lower_slope
    for slope, low, high in lines[1:]:
        below = slope * middle + low > lower_slope * middle + lower
        above = slope * middle + high < upper_slope * middle + upper
        lower_slope, lower = torch.where(below, slope, lower_slope), torch.where(below, low, lower)
        upper_slope, upper = torch.where(above, slope, upper_slope), torch.where(above, high, upper)
    return LinearRelaxation(lower_slope, lower, upper_slope, upper)


def piecewise_linear(function: Function, kinks: Any) -> Relaxation:
    """Lines with the slope of the chord or of one of the pieces, whichever are tightest."""
    derivative = _derivative(function)

    def lines(x: Box, *settings: Any) -> LinearRelaxation:
        points = clipped(x, at_settings(kinks, *settings))
        values = [function(point, *settings) for point in points]
        chord = _chord(function, derivative, points[0], points[-1], *settings)
        pieces = []
        for low, high in pairwise(points):
            rise = function(high, *settings) - function(low, *settings)
            pieces.append(chord_slope(high - low, rise, chord, narrow(low)))
        return _best([chord, *pieces], points, values, [0.0] * len(pieces))

    return lines


def smooth(function: Function, curve: Smooth) -> Relaxation:
    """Lines with the slope of the chord, or of the tangent at an end, whichever are tightest.

    Let p < q be neighbours in a grid that contains the kinks, so that f is twice continuously differentiable between
    them, with |f''| <= M there, and let c be its chord from p to q. For x in between, f(x) - c(x) = f''(ξ)/2·(x-p)(x-q)
    for some ξ (the error of linear interpolation), so |f(x) - c(x)| <= M (q-p)²/8. Then f(x) - s x, for any slope s,
    is within that of c(x) - s x, a linear function whose extremes are its values at p and q. The least of those over
    all neighbours, minus M (q-p)²/8, and the greatest, plus it, are the offsets of lines that enclose f.

    The grid is even in asinh(x), so that wide boxes are looked at closely where functions of this kind bend: near 0.
    """
    derivative = _derivative(function)

    def lines(x: Box, *settings: Any) -> LinearRelaxation:
        knots = clipped(x, at_settings(curve.kinks, *settings))
        points = [knots[0]]
        for low, high in pairwise(knots):
            points += _between(low, high, -(-GRID // (len(knots) - 1)))
        values = [function(point, *settings) for point in points]
        errors = [_curvature(curve, low, high, *settings) * (high - low).square() / 8 for low, high in pairwise(points)]
        chord = _chord(function, derivative, x.lower, x.upper, *settings)
        tangents = [derivative(x.lower, *settings), derivative(x.upper, *settings)]
        return _best([chord, *tangents], points, values, errors)

    return lines


def _between(low: Tensor, high: Tensor, count: int) -> list[Tensor]:
    """`count` points after `low`, the last of them `high`."""
    start, end = torch.asinh(low), torch.asinh(high)
    inner = [torch.sinh(start + (end - start) * (i / count)).clamp(low, high) for i in range(1, count)]
    return [*inner, high]


def _curvature(curve: Smooth, low: Tensor, high: Tensor, *settings: Any) -> Any:
    if not callable(curve.curvature):
        return curve.curvature
    apart = torch.where((low < 0) & (high > 0), 0.0, 1.0)
    near, far = torch.minimum(low.abs(), high.abs()) * apart, torch.maximum(low.abs(), high.abs())
    return curve.curvature(near, far, *settings)


def convex(function: Function, derivative: Function) -> Relaxation:
    """Below the tangent in the middle, of which no other has more area below it; above the chord."""

    def lines(x: Box, *settings: Any) -> LinearRelaxation:
        middle = (x.lower + x.upper) / 2
        tangent = derivative(middle, *settings)
        chord = _chord(function, derivative, x.lower, x.upper, *settings)
        ends = [function(end, *settings) - chord * end for end in (x.lower, x.upper)]
        return LinearRelaxation(tangent, function(middle, *settings) - tangent * middle, chord, torch.maximum(*ends))

    return lines


def concave(function: Function, derivative: Function) -> Relaxation:
    negative = convex(lambda *args: -function(*args), lambda *args: -derivative(*args))

    return lambda x, *settings: negative(x, *settings).of_negative()


def s_shaped(function: Function, derivative: Function) -> Relaxation:
    """Lines for an increasing function, convex left of 0 and concave right of it, with f(x) = 2 f(0) - f(-x)."""
    curvature = _derivative(derivative)

    def following(d: Tensor, upper: Tensor) -> Tensor:
        """`d`, at which the tangent meets the function at `upper`, with the gradient that this gives it.

        f(d) + f'(d) (u - d) = f(u), so that d' = (f'(u) - f'(d)) / (f''(d) (u - d)), which goes from -1/2 at 0 to 0.
        """
        if not torch.is_grad_enabled():
            return d
        at = upper.detach()
        rise, bend = derivative(at) - derivative(d), curvature(d) * (at - d)
        rate = torch.where(bend > TINY, rise / torch.where(bend > TINY, bend, 1.0), 0.0).clamp(-0.5, 0.0)
        return d + rate * torch.where(at.isfinite(), upper - at, 0.0)

    def below(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of a tangent at some d <= 0 that is still below at `upper`; of the chord if none is."""

        def tangent_is_below(d: Tensor) -> Tensor:
            return function(d) + derivative(d) * (upper - d) <= function(upper)

        # The tangent's value at `upper` grows with d; `near` is the largest d, from below, at which it is low enough.
        near, far = lower.detach().clamp(max=0), upper.detach().clamp(max=0)
        for _ in range(40):
            middle = (near + far) / 2
            low_enough = tangent_is_below(middle)
            near, far = torch.where(low_enough, middle, near), torch.where(low_enough, far, middle)
        touching = torch.where(upper <= 0, (lower + upper) / 2, following(near, upper))
        width, rise = upper - lower, function(upper) - function(lower)
        least = torch.minimum(derivative(lower), derivative(upper))  # of all slopes in between, so that it does as well
        chord = chord_slope(width, rise, least, LEAST_WIDTH)
        tangent = (lower < 0) & tangent_is_below(touching)
        slope = torch.where(tangent, derivative(touching), chord)
        point = torch.where(tangent, touching, lower)
        return slope, function(point) - slope * point

    def lines(x: Box) -> LinearRelaxation:
        lower_slope, lower_offset = below(x.lower, x.upper)
        upper_slope, mirrored_offset = below(-x.upper, -x.lower)
        return LinearRelaxation(
            lower_slope, lower_offset, upper_slope, 2 * function(torch.zeros_like(x.lower)) - mirrored_offset
        )

    return lines


def relaxation_from_traits(operation: Operation) -> Relaxation | None:
    """The relaxation that an operation's curve gives; None where nothing is known of that."""
    function, curve = operation.function, operation.curve
    if isinstance(curve, PiecewiseLinear):
        return piecewise_linear(function, curve.kinks)
    if isinstance(curve, Smooth):
        return smooth(function, curve)
    if curve is None:
        return None
    rules = {Convex: convex, Concave: concave, SShaped: s_shaped}
    lines = rules[type(curve)](function, curve.derivative or _derivative(function))
    return from_least(lines, curve.least) if isinstance(curve, Convex) and curve.least > -math.inf else lines


def from_least(relaxation: Relaxation, least: float) -> Relaxation:
    """Lines on the part of the box from `least` on, in which all values lie."""
    return lambda x, *settings: relaxation(Box(x.lower.clamp(min=least), x.upper.clamp(min=least)), *settings)


RELAXATIONS: dict[Callable, Relaxation] = {
    **{
        function: relaxation
        for function, operation in OPERATIONS.items()
        if (relaxation := relaxation_from_traits(operation)) is not None
    },
    F.relu: relu,
    F.leaky_relu: leaky_relu,
}
