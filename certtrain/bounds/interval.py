"""Interval bound propagation (IBP): one forward rule per operation.

A rule takes the operation's arguments with boxes in the place of tensors and returns the box of all results.
(Gowal et al. 2018, arXiv 1810.12715.) The rules come in four families:

affine     W x + b: centre through the map, radius through its absolute value
bilinear   products of two boxes, at their corners or by centre and radius (`bilinear.py`)
monotone   both ends through the function; where it turns, the points at which it does as well
reshaping  values only move or are averaged: every part of the box through the function

The last two follow from an operation's traits. (`operations/record.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds import bilinear, softmax
from certtrain.bounds.attention import attend, attend_box, masked, masked_box
from certtrain.bounds.batch_norm import scale_shift
from certtrain.bounds.box import Box
from certtrain.bounds.normalization import deviation, deviation_box, normalized, normalized_box
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.joining import cat
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.operations.record import OPERATIONS, Operation, PiecewiseLinear, at_settings
from certtrain.errors import UnsupportedOperation

Rule = Callable[..., Box]


def weighted(function: Callable[..., Tensor]) -> Rule:
    """Rule for `function(x, weight, bias, ...)`: centre W c + b, radius |W| r."""

    def rule(x: Box, weight: Tensor, bias: Tensor | None = None, *settings: Any) -> Box:
        center = function(x.center, weight, bias, *settings)
        radius = function(x.radius, weight.abs(), None, *settings)
        return Box.around(center.to(x.center.dtype), radius.to(x.radius.dtype))  # autocast may have rounded the product

    return rule


def product(function: Callable[..., Tensor], of_boxes: Rule) -> Rule:
    """Rule for a product of a box and a constant, in either order, or, by `of_boxes`, of two boxes."""

    def rule(x: Any, y: Any, *settings: Any) -> Box:
        if isinstance(x, Box) and isinstance(y, Box):
            return of_boxes(x, y, *settings)
        center = function(*[v.center if isinstance(v, Box) else v for v in (x, y)], *settings)
        radius = function(*[v.radius if isinstance(v, Box) else abs(v) for v in (x, y)], *settings)
        return Box.around(center, radius)

    return rule


def monotone(function: Callable[..., Tensor]) -> Rule:
    """Rule for a function that grows, or stays, with every element of its first argument."""

    def rule(x: Box, *settings: Any) -> Box:
        return Box(function(x.lower, *settings), function(x.upper, *settings))

    return rule


def decreasing(function: Callable[..., Tensor]) -> Rule:
    """Rule for an elementwise function that falls, or stays."""

    def rule(x: Box, *settings: Any) -> Box:
        return Box(function(x.upper, *settings), function(x.lower, *settings))

    return rule


def with_minimum(function: Callable[..., Tensor], minimum: float | Callable[..., float]) -> Rule:
    """Rule for an elementwise function that falls up to one x and grows from there: exact."""

    def rule(x: Box, *settings: Any) -> Box:
        least = torch.as_tensor(at_settings(minimum, *settings), dtype=x.like.dtype, device=x.like.device)
        nearest = least.clamp(x.lower, x.upper)
        ends = function(x.lower, *settings), function(x.upper, *settings)
        return Box(function(nearest, *settings), torch.maximum(*ends))

    return rule


def piecewise_linear(function: Callable[..., Tensor], kinks: Any) -> Rule:
    """Rule for an elementwise function whose extremes are at the ends or at kinks in between: exact."""

    def rule(x: Box, *settings: Any) -> Box:
        values = [function(point, *settings) for point in clipped(x, at_settings(kinks, *settings))]
        return Box(reduce(torch.minimum, values), reduce(torch.maximum, values))

    return rule


def clipped(x: Box, kinks: Sequence[Any]) -> list[Tensor]:
    """The ends of each interval and the kinks between them, in order; a kink outside it is moved to the nearer end."""
    lower, upper = x.lower, x.upper
    points = [torch.as_tensor(kink, dtype=lower.dtype, device=lower.device) for kink in kinks]
    return [lower, *[point.expand_as(lower).clamp(lower, upper) for point in points], upper]


def positive_only(name: str, rule: Rule) -> Rule:
    """`rule`, which holds for boxes above 0, with an error for any other."""

    def checked(x: Box, *settings: Any) -> Box:
        if not bool((x.lower > 0).all()):
            raise UnsupportedOperation(f"{name} has a rule for values above 0 only, and a box here reaches further")
        return rule(x, *settings)

    return checked


def reshaping(function: Callable[..., Tensor]) -> Rule:
    """Rule for a function that moves, repeats or averages elements; it may act on either form of a box."""

    def rule(x: Box, *settings: Any) -> Box:
        return x.map(lambda part: function(part, *settings))

    return rule


def _scale_shift(x: Box, scale: Tensor, shift: Tensor) -> Box:
    return Box.around(scale_shift(x.center, scale, shift), x.radius * scale.abs())


def _shifted(x: Box, center: Tensor) -> Box:
    """`x` moved, and broadcast, to a new centre."""
    return Box.around(center, x.radius.expand_as(center))


def _add(x: Any, y: Any, alpha: float = 1) -> Box:
    if alpha != 1:
        y = _scaled(y, alpha)
    if isinstance(x, Box) and isinstance(y, Box):
        return Box.around(x.center + y.center, x.radius + y.radius)
    return _shifted(x, x.center + y) if isinstance(x, Box) else _shifted(y, x + y.center)


def _scaled(y: Any, factor: float) -> Any:
    return Box.around(y.center * factor, y.radius * abs(factor)) if isinstance(y, Box) else y * factor


def _neg(x: Box) -> Box:
    return Box.around(-x.center, x.radius)


def _div(x: Any, y: Any) -> Box:
    if isinstance(y, Box):
        return bilinear.quotient(x if isinstance(x, Box) else _point(x, y), y)
    return Box.around(x.center / y, x.radius / abs(y))


def _point(value: Any, like: Box) -> Box:
    point = torch.as_tensor(value, dtype=like.like.dtype, device=like.like.device)
    return Box(point, point)


def rule_from_traits(operation: Operation) -> Rule | None:
    """The rule that an operation's traits give, None where they say too little."""
    function, rule = operation.function, None
    if operation.increasing:
        rule = monotone(function)
    elif operation.decreasing:
        rule = decreasing(function)
    elif operation.minimum is not None:
        rule = with_minimum(function, operation.minimum)
    elif isinstance(operation.curve, PiecewiseLinear):
        rule = piecewise_linear(function, operation.curve.kinks)
    elif operation.reshaping or operation.averaging:
        rule = reshaping(function)
    return positive_only(operation.name, rule) if rule is not None and operation.positive else rule


def _extremum(function: Callable[..., Tensor]) -> Rule:
    """Of two boxes, or of a box and a constant: of both ends."""

    def rule(x: Any, y: Any) -> Box:
        return Box(function(_lower(x), _lower(y)), function(_upper(x), _upper(y)))

    return rule


def _lower(value: Any) -> Tensor:
    return value.lower if isinstance(value, Box) else value


def _upper(value: Any) -> Tensor:
    return value.upper if isinstance(value, Box) else value


RULES: dict[Callable, Rule] = {
    **{
        function: rule
        for function, operation in OPERATIONS.items()
        if (rule := rule_from_traits(operation)) is not None
    },
    **{function: _extremum(function) for function in (torch.maximum, torch.minimum)},
    **{function: weighted(function) for function in WEIGHTED},
    torch.mul: product(torch.mul, bilinear.product),
    torch.matmul: product(torch.matmul, bilinear.matrix_product),
    einsum: product(einsum, bilinear.einsum_product),
    scale_shift: _scale_shift,
    add: _add,
    sub: lambda x, y, alpha=1: _add(x, y, -alpha),
    torch.div: _div,
    torch.neg: _neg,
    cat: Box.cat,
    torch.softmax: softmax.softmax,
    torch.log_softmax: softmax.log_softmax,
    masked: masked_box,
    attend: attend_box,
    deviation: deviation_box,
    normalized: normalized_box,
}
