"""Rules for what attention consists of; docs/soundness.md, (13) to (15).

Products of two values, softmax, and averages by softmax. A box of real numbers comes from the rules of real
mathematics, taken in float64; what the deployed network's roundings, and float64's, can add is bounded relative to the
magnitudes that are combined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds import bilinear
from certtrain.bounds.attention import attend_box
from certtrain.bounds.box import Box
from certtrain.bounds.rounding.arithmetic import (
    ARITHMETICS,
    BOUND_ARITHMETIC,
    Arithmetic,
    elementwise_error,
    inflation,
    sum_error,
)
from certtrain.bounds.rounding.boxes import OutwardBox, unbounded_unless, widened
from certtrain.bounds.rounding.rules import largest_of, stored
from certtrain.bounds.shapes import per_image
from certtrain.bounds.softmax import softmax
from certtrain.errors import UnsupportedOperation

EXPONENTIAL = 8  # roundings that an exponential may be off by: four units in the last place
SUMS = 8  # of float64, that a bound of a sum of products consists of, at the most


def _own_error(terms: int) -> float:
    """Of the bound itself, computed in float64."""
    return SUMS * sum_error(ARITHMETICS["float64"], terms)


def product_of_two(function: Callable[..., Tensor], terms_of: Callable[..., int]) -> Callable[..., OutwardBox]:
    """Eq. 13."""

    def rule(a: Arithmetic, x: OutwardBox, y: OutwardBox, *settings: Any) -> OutwardBox:
        terms = terms_of(x, y, *settings)

        def product(one: Tensor, other: Tensor) -> Tensor:
            return function(one, other, *settings)

        found = bilinear.centered(product, x, y)
        box = OutwardBox.around(found.center, found.radius)
        magnitude = product(x.magnitude, y.magnitude) * inflation(terms)
        of_x, of_y = _largest(x, box), _largest(y, box)
        losses = _products_lost(a, terms, of_x, of_y)
        sums = widened(box, sum_error(a, terms) + _own_error(terms), magnitude, a, terms, losses)
        return unbounded_unless(2 * terms * torch.maximum(of_x, of_y) <= a.largest, sums)  # each may be summed alone

    return rule


def _products_lost(a: Arithmetic, terms: int, x: Tensor, y: Tensor) -> Tensor:
    """What underflows of products of two values, and of either value, cost a sum; x, y: no less than either value."""
    return 8 * a.tiny * (terms + 1) * (1 + x + y)


def _largest(x: OutwardBox, like: Box) -> Tensor:
    """The largest of each image's magnitudes, to stand beside `like`."""
    return per_image(largest_of(x.magnitude), like.like)


def softmax_rule(a: Arithmetic, x: OutwardBox, dim: int) -> tuple[OutwardBox, Tensor]:
    """Eq. 14. Also how far the sum of a row's results can be from 1."""
    unit, terms = float(a.unit), x.shape[dim]
    width = (x.upper.amax(dim, keepdim=True) - x.lower.amin(dim, keepdim=True)) * inflation(1)
    roundings = terms + 2 * EXPONENTIAL + 2 + 2 * width
    known = roundings * unit < 0.5
    error = (1 + float(a.stored)) * (1 + 2**-40) / (1 - torch.where(known, roundings, 0.0) * unit) - 1 + 2**-50
    size = torch.maximum(x.upper.abs(), x.lower.abs()).amax(dim, keepdim=True)
    own = 2 * (terms + 64) * float(BOUND_ARITHMETIC.unit) * (2 + size)
    known = known & (own < 2**-10)
    lost = 8 * (terms + 4) * a.tiny
    exact, total = softmax(x, dim), (error + own) * (1 + 2**-8)
    lower = torch.where(known, (exact.lower * (1 - total) - lost).clamp(min=0), 0.0)
    upper = torch.where(known, (exact.upper * (1 + total) + lost) * inflation(1), torch.inf)
    return OutwardBox(lower, upper), torch.where(known, error + lost, torch.inf)


def attend_rule(a: Arithmetic, p: OutwardBox, v: OutwardBox | Tensor, excess: Tensor) -> OutwardBox:
    """Eq. 15; `excess`: how far the sums of the weights can be from 1."""
    constant = isinstance(v, Tensor)
    v = stored(a, v) if isinstance(v, Tensor) else v
    terms = p.shape[-1]
    found = attend_box(p, v)
    sizes = v.magnitude
    most = sizes.amax() if constant else _largest(v, found)
    largest = sizes.amax(-2, keepdim=True)
    magnitude = (p.upper @ (sizes + largest)) * inflation(terms)
    losses = excess * largest * inflation(2) + _products_lost(a, terms, _largest(p, found), most)
    error = sum_error(a, terms) + _own_error(2 * terms)
    return widened(OutwardBox.by_ends(found), error, magnitude, a, terms, losses)


def square(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    found = bilinear.squared(x)
    most = _largest(x, found)
    losses = _products_lost(a, 1, most, most)
    return widened(OutwardBox.by_ends(found), elementwise_error(a, 1), x.magnitude.square(), a, 1, losses)


def elementwise_product(a: Arithmetic, x: OutwardBox, y: OutwardBox) -> OutwardBox:
    return square(a, x) if x is y else product_of_two(torch.mul, lambda *_: 1)(a, x, y)


def no_quotient(*args: Any) -> OutwardBox:
    raise UnsupportedOperation("the quotient of two values that both depend on the input has no sound rule")
