"""Planes below and above normalised values z_k = d_k / √(mean(d²) + ε), from those of two kinds the better ones.

As a product of d_k and the factor r, by `bilinear.planes`: these follow how the factor falls with every d_j, and are
the better ones where the box is narrow. Where it is wide, so that r is nearly free, lines in d_k alone: for a fixed sum
R of the other squares d / √((d² + R)/n + ε) grows with d, is convex left of 0 and concave right of it, and over the box
it is least with the least R left of 0 and with the greatest right of it. A line of any slope s below that curve touches
it at an end, at 0, or where the convex part has slope s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from certtrain.bounds.bilinear import squared
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call
from certtrain.bounds.linear.bilinear import planes
from certtrain.bounds.linear.patches import Contributions, dense, through
from certtrain.bounds.linear.relaxations import LEAST_WIDTH, TINY, LinearRelaxation, chord_slope
from certtrain.bounds.normalization import count_of, sum_of_others


def normalized(call: Call, a: Tensor, boxes: Mapping[int, Box], t: Tensor | None) -> tuple[Contributions, Tensor]:
    d, factor, _, dims, eps, *_ = call.args
    lines = _lines(boxes[d.index], dims, eps)
    below, above = _middles(boxes[d.index], boxes[factor.index], dims, eps)
    center = boxes[d.index].center
    is_product_below = below > lines.below(center)
    is_product_above = above < lines.above(center)
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    follows = torch.where(is_product_below[:, None], positive, 0.0) + torch.where(
        is_product_above[:, None], negative, 0.0
    )
    of_d, of_factor, constant = planes(torch.mul, follows, boxes[d.index], boxes[factor.index], t)
    by_lines, rest = through(lines, a - follows)
    return [(d, of_d + dense(by_lines)), (factor, of_factor)], constant + rest


def _middles(d: Box, factor: Box, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """What the planes of the product are in the middle of the box, once the factor is bounded by d in its turn."""
    squares = squared(d)
    low, high = (part.mean(dims, keepdim=True) for part in (squares.lower, squares.upper))
    small, large = ((end + eps).rsqrt() for end in (high, low))
    slope = (small - large) / (high - low).clamp(min=TINY)
    most = large + slope * (d.center.square().mean(dims, keepdim=True) - low)  # by the chord, tangents of the squares
    middle = (low + high) / 2
    tangent = (middle + eps).rsqrt()
    chords = (d.center.square() + d.radius.square()).mean(dims, keepdim=True)
    least = tangent - 0.5 * tangent**3 * (chords - middle)
    error = d.radius * factor.radius
    below = d.center * torch.where(d.center > 0, least, most) - error
    above = d.center * torch.where(d.center > 0, most, least) + error
    return below, above


def _lines(d: Box, dims: tuple[int, ...], eps: float) -> LinearRelaxation:
    squares, count = squared(d), count_of(d.like, dims)
    least, most = (sum_of_others(part, dims) / count + eps for part in (squares.lower, squares.upper))
    lower_slope, lower_offset = _below(d.lower, d.upper, least, most, count)
    upper_slope, upper_offset = _below(-d.upper, -d.lower, least, most, count)
    return LinearRelaxation(lower_slope, lower_offset, upper_slope, -upper_offset)


def _below(low: Tensor, high: Tensor, least: Tensor, most: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slope and offset of a line below d / √(d²/n + R), R = `least` left of 0 and `most` right of it."""

    def curve(d: Tensor) -> Tensor:
        return d * (d.square() / count + torch.where(d >= 0, most, least)).rsqrt()

    width = high - low
    steep = least * (low.clamp(max=0).square() / count + least).rsqrt() ** 3
    slope = chord_slope(width, curve(high) - curve(low), steep, LEAST_WIDTH).clamp(min=TINY)
    left = high.clamp(max=0)
    touching = -(count * ((least / slope) ** (2 / 3) - least)).clamp(min=TINY).sqrt()
    points = [
        low,
        high,
        torch.zeros_like(low).clamp(low, high),
        touching.detach().clamp(low.clamp(max=0), left).clamp(low, high),
    ]
    offset = torch.stack([curve(point) - slope * point for point in points]).amin(0)
    return slope, offset
