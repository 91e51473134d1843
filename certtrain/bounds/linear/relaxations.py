"""Linear relaxations of elementwise functions: a line below and a line above, on each element's interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box

TINY = 1e-30


class LinearRelaxation(NamedTuple):
    """lower_slope·x + lower_offset <= f(x) <= upper_slope·x + upper_offset on a box; tensors of the box's shape."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


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
    zero, offset = torch.zeros_like(slope), torch.where(unstable, above - slope * above, 0.0)
    if negative_slope > 1:
        return LinearRelaxation(slope, offset, through_zero, zero)
    return LinearRelaxation(through_zero, zero, slope, offset)


def relu(x: Box) -> LinearRelaxation:
    return leaky_relu(x, 0.0)


def unstable_relus(x: Box) -> Tensor:
    return (x.lower < 0) & (x.upper > 0)


def _s_shaped(
    function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
) -> Callable[[Box], LinearRelaxation]:
    """Lines for an increasing function, convex left of 0 and concave right of it, with f(x) = 2 f(0) - f(-x)."""

    def below(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of a tangent at some d <= 0 that is still below at `upper`; of the chord if none is."""

        def tangent_is_below(d: Tensor) -> Tensor:
            return function(d) + derivative(d) * (upper - d) <= function(upper)

        # The tangent's value at `upper` grows with d; `near` is the largest d, from below, at which it is low enough.
        near, far = lower.clamp(max=0), upper.clamp(max=0)
        for _ in range(40):
            middle = (near + far) / 2
            low_enough = tangent_is_below(middle)
            near, far = torch.where(low_enough, middle, near), torch.where(low_enough, far, middle)
        touching = torch.where(upper <= 0, (lower + upper) / 2, near).detach()
        width = upper - lower
        chord = torch.where(
            width > 1e-6,
            (function(upper) - function(lower)) / width.clamp(min=1e-6),
            torch.minimum(derivative(lower), derivative(upper)),
        )
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


def _sigmoid_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _tanh_derivative(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


RELAXATIONS: dict[Callable, Callable[..., LinearRelaxation]] = {
    F.relu: relu,
    F.leaky_relu: leaky_relu,
    torch.sigmoid: _s_shaped(torch.sigmoid, _sigmoid_derivative),
    torch.tanh: _s_shaped(torch.tanh, _tanh_derivative),
}
