"""Rules for what attention and normalization consist of; docs/soundness.md, (13) to (16).

Products of two values, softmax, averages by softmax, deviations from a mean and their division by the root of a mean
square. A box of real numbers comes from the rules of real mathematics, taken in float64; what the deployed network's
roundings, and float64's, can add is bounded relative to the magnitudes that are combined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds import bilinear
from certtrain.bounds.attention import attend, attend_box
from certtrain.bounds.box import Box
from certtrain.bounds.normalization import (
    Dims,
    count_of,
    deviation,
    deviation_box,
    inverse_root,
    normalized,
    normalized_box,
)
from certtrain.bounds.operations.products import einsum
from certtrain.bounds.rounding.arithmetic import (
    ARITHMETICS,
    BOUND_ARITHMETIC,
    COEFFICIENT_ROUNDINGS,
    Arithmetic,
    elementwise_error,
    inflation,
    sum_error,
)
from certtrain.bounds.rounding.boxes import OutwardBox, widened
from certtrain.bounds.rounding.rules import RULES, einsum_terms, largest_of, matmul_terms, stored
from certtrain.bounds.shapes import per_image
from certtrain.bounds.softmax import softmax
from certtrain.errors import UnsupportedOperation

EXPONENTIAL = 8  # roundings that an exponential may be off by: four units in the last place
SUMS = 8  # of float64, that a bound of a sum of products consists of, at the most
VARIANCE_ROUNDINGS = 32  # of a variance beside four for each of its terms


def _own_error(terms: int) -> float:
    """Of the bound itself, computed in float64."""
    return SUMS * sum_error(ARITHMETICS["float64"], terms)


def _product_of_two(function: Callable[..., Tensor], terms_of: Callable[..., int]) -> Callable[..., OutwardBox]:
    """Eq. 13."""

    def rule(a: Arithmetic, x: OutwardBox, y: OutwardBox, *settings: Any) -> OutwardBox:
        terms = terms_of(x, y, *settings)

        def product(one: Tensor, other: Tensor) -> Tensor:
            return function(one, other, *settings)

        found = bilinear.centered(product, x, y)
        box = OutwardBox.around(found.center, found.radius)
        magnitude = product(x.magnitude, y.magnitude) * inflation(terms)
        losses = _products_lost(a, terms, _largest(x, box), _largest(y, box))
        return widened(box, sum_error(a, terms) + _own_error(terms), magnitude, a, terms, losses)

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
    return widened(OutwardBox(found.lower, found.upper), error, magnitude, a, terms, losses)


def _square(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    found = bilinear.squared(x)
    most = _largest(x, found)
    losses = _products_lost(a, 1, most, most)
    return widened(OutwardBox(found.lower, found.upper), elementwise_error(a, 1), x.magnitude.square(), a, 1, losses)


def _deviation(a: Arithmetic, x: OutwardBox, dims: Dims) -> OutwardBox:
    found, terms = deviation_box(x, dims), count_of(x.like, dims)
    box = OutwardBox.around(found.center, found.radius.clamp(min=0) * inflation(terms))
    return widened(box, sum_error(a, terms + 2), _with_mean(x, dims), a, terms)


def _with_mean(x: OutwardBox, dims: Dims) -> Tensor:
    """The magnitudes that a deviation combines."""
    return (x.magnitude + x.magnitude.mean(dims, keepdim=True)) * inflation(count_of(x.like, dims))


def _inverse_root(a: Arithmetic, mean_square: OutwardBox, eps: float) -> OutwardBox:
    _require_epsilon(eps)
    ends = OutwardBox(inverse_root(mean_square.upper, eps), inverse_root(mean_square.lower, eps))
    return widened(ends, elementwise_error(a, COEFFICIENT_ROUNDINGS), ends.upper, a)


def _require_epsilon(eps: float) -> None:
    if not 2**-40 <= eps <= 1:
        raise UnsupportedOperation(f"a normalization with eps={eps} has no sound rule: it must be from 2^-40 to 1")


def _normalized(
    a: Arithmetic,
    d: OutwardBox,
    factor: OutwardBox,
    x: OutwardBox,
    dims: Dims,
    eps: float,
    by_squares: bool = False,
) -> OutwardBox:
    """Eq. 16."""
    _require_epsilon(eps)
    terms = count_of(x.like, dims)
    error = sum_error(a, 4 * terms + VARIANCE_ROUNDINGS)
    least = (bilinear.squared(d).lower.mean(dims, keepdim=True) + eps) * (1 - 2**-30)
    mean_size = x.magnitude.mean(dims, keepdim=True) * inflation(terms)
    relative = error * (1 + mean_size * least.rsqrt()) + (error * mean_size).square() / least
    if by_squares:
        relative = error * (1 + x.magnitude.square().mean(dims, keepdim=True) * inflation(terms) / least)
    found = normalized_box(d, factor, x, dims, eps)
    box = OutwardBox(found.lower, found.upper)
    size = box.magnitude
    of_deviation = sum_error(a, terms + 2) * _with_mean(x, dims) * least.rsqrt() * (1 + relative)
    losses = (size * relative + of_deviation) * inflation(terms) * (1 + 2**-30)
    few = elementwise_error(a, COEFFICIENT_ROUNDINGS) + sum_error(ARITHMETICS["float64"], terms + 64)
    result = widened(box, few, size, a, terms, losses)
    fits = 8 * terms * _with_mean(x, dims).square().amax(dims, keepdim=True) <= a.largest  # whose squares are summed
    return OutwardBox.around(result.center, torch.where((relative < 0.5) & fits, result.radius, torch.inf))


def _unless_two_values(rule: Callable[..., OutwardBox], of_two: Callable[..., OutwardBox]) -> Callable[..., OutwardBox]:
    def either(a: Arithmetic, x: Any, y: Any, *settings: Any) -> OutwardBox:
        return (of_two if isinstance(x, OutwardBox) and isinstance(y, OutwardBox) else rule)(a, x, y, *settings)

    return either


def _elementwise_product(a: Arithmetic, x: OutwardBox, y: OutwardBox) -> OutwardBox:
    return _square(a, x) if x is y else _product_of_two(torch.mul, lambda *_: 1)(a, x, y)


def _no_quotient(*args: Any) -> OutwardBox:
    raise UnsupportedOperation("the quotient of two values that both depend on the input has no sound rule")


TWO_VALUES: dict[Callable[..., Any], Callable[..., OutwardBox]] = {
    torch.mul: _elementwise_product,
    torch.matmul: _product_of_two(torch.matmul, matmul_terms),
    einsum: _product_of_two(einsum, einsum_terms),
    torch.div: _no_quotient,
}
RULES |= {function: _unless_two_values(RULES[function], of_two) for function, of_two in TWO_VALUES.items()}
RULES |= {
    torch.softmax: softmax_rule,
    attend: attend_rule,
    torch.square: _square,
    deviation: _deviation,
    inverse_root: _inverse_root,
    normalized: _normalized,
}
