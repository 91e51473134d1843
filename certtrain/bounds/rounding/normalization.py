"""Rules for what normalization by an image's own statistics consists of; docs/soundness.md, (16).

Deviations from a mean, and their division by the root of a mean square. Errors are bounded as in `attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certtrain.bounds import bilinear
from certtrain.bounds.normalization import Dims, count_of, deviation_box, inverse_root, normalized_box
from certtrain.bounds.rounding.arithmetic import (
    ARITHMETICS,
    COEFFICIENT_ROUNDINGS,
    LARGEST_FACTOR,
    Arithmetic,
    elementwise_error,
    inflation,
    sum_error,
)
from certtrain.bounds.rounding.boxes import OutwardBox, widened
from certtrain.errors import UnsupportedOperation

VARIANCE_ROUNDINGS = 32  # of a variance beside four for each of its terms


def deviation_rule(a: Arithmetic, x: OutwardBox, dims: Dims) -> OutwardBox:
    found, terms = deviation_box(x, dims), count_of(x.like, dims)
    box = OutwardBox.around(found.center, found.radius.clamp(min=0) * inflation(terms))
    return widened(box, sum_error(a, terms + 2), _with_mean(x, dims), a, terms)


def _with_mean(x: OutwardBox, dims: Dims) -> Tensor:
    """The magnitudes that a deviation combines."""
    return (x.magnitude + x.magnitude.mean(dims, keepdim=True)) * inflation(count_of(x.like, dims))


def inverse_root_rule(a: Arithmetic, mean_square: OutwardBox, eps: float) -> OutwardBox:
    _require_epsilon(eps)
    ends = OutwardBox(inverse_root(mean_square.upper, eps), inverse_root(mean_square.lower, eps))
    return widened(ends, elementwise_error(a, COEFFICIENT_ROUNDINGS), ends.upper, a)


def _require_epsilon(eps: float) -> None:
    if not 2**-40 <= eps <= 1:
        raise UnsupportedOperation(f"a normalization with eps={eps} has no sound rule: it must be from 2^-40 to 1")


def normalized_rule(
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
    box = OutwardBox.by_ends(found)
    size = box.magnitude
    of_deviation = sum_error(a, terms + 2) * _with_mean(x, dims) * least.rsqrt() * (1 + relative)
    losses = (size * relative + of_deviation) * inflation(terms) * (1 + 2**-30)
    few = elementwise_error(a, COEFFICIENT_ROUNDINGS) + sum_error(ARITHMETICS["float64"], terms + 64)
    result = widened(box, few, size, a, terms, losses)
    fits = _with_mean(x, dims).amax(dims, keepdim=True) <= LARGEST_FACTOR  # of squares, and of what flushes
    return OutwardBox.around(result.center, torch.where((relative < 0.5) & fits, result.radius, torch.inf))
