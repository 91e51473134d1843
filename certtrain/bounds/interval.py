"""Interval bound propagation (IBP): one forward rule per operation.

A rule takes the operation's arguments with boxes in the place of tensors and returns the box of all results.
(Gowal et al. 2018, arXiv 1810.12715.) The rules come in three families:

affine     centre through the map, radius through its absolute value
monotone   both ends through the function
reshaping  values only move or are averaged: every part of the box through the function
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.tracing import (
    RESHAPING,
    SETTLED_BY_CLEAN,
    WEIGHTED,
    Call,
    Coefficients,
    Graph,
    leaves,
    map_leaves,
    scale_shift,
)
from certtrain.errors import UnsupportedOperation

Rule = Callable[..., Box]


def affine(function: Callable[..., Tensor]) -> Rule:
    """Rule for `function(x, weight, bias, ...)`: centre W c + b, radius |W| r."""

    def rule(x: Box, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Box:
        if not isinstance(x, Box) or isinstance(weight, Box):
            raise UnsupportedOperation(f"{function.__name__} with weights that depend on the input has no rule")
        center = function(x.center, weight, bias, *args, **kwargs)
        radius = function(x.radius, weight.abs(), None, *args, **kwargs)
        return Box.around(center.to(x.center.dtype), radius.to(x.radius.dtype))  # autocast may have rounded the product

    return rule


def monotone(function: Callable[..., Tensor]) -> Rule:
    """Rule for a function that grows, or stays, with every element of its first argument."""

    def rule(x: Box, *args: Any, **kwargs: Any) -> Box:
        return Box(function(x.lower, *args, **kwargs), function(x.upper, *args, **kwargs))

    return rule


def reshaping(function: Callable[..., Tensor]) -> Rule:
    """Rule for a function that moves, repeats or averages elements; it may act on either form of a box."""

    def rule(x: Box, *args: Any, **kwargs: Any) -> Box:
        return x.map(lambda part: function(part, *args, **kwargs))

    return rule


def _leaky_relu(x: Box, negative_slope: float = 0.01) -> Box:
    if negative_slope < 0:
        raise UnsupportedOperation(f"LeakyReLU with negative_slope={negative_slope} is not monotone and has no rule")
    return monotone(F.leaky_relu)(x, negative_slope)


def _scale_shift(x: Box, scale: Tensor, shift: Tensor) -> Box:
    return Box.around(scale_shift(x.center, scale, shift), x.radius * scale.abs())


def _shifted(x: Box, center: Tensor) -> Box:
    """`x` moved, and broadcast, to a new centre."""
    return Box.around(center, x.radius.expand_as(center))


def _add(x: Any, y: Any, *, alpha: float = 1) -> Box:
    if alpha != 1:
        y = _mul(y, alpha) if isinstance(y, Box) else y * alpha
    if isinstance(x, Box) and isinstance(y, Box):
        return Box.around(x.center + y.center, x.radius + y.radius)
    return _shifted(x, x.center + y) if isinstance(x, Box) else _shifted(y, x + y.center)


def _neg(x: Box) -> Box:
    return Box.around(-x.center, x.radius)


def _sub(x: Any, y: Any, *, alpha: float = 1) -> Box:
    return _add(x, _neg(y) if isinstance(y, Box) else -y, alpha=alpha)


def _mul(x: Any, y: Any) -> Box:
    if isinstance(x, Box) and isinstance(y, Box):
        raise UnsupportedOperation("the product of two values that both depend on the input has no rule")
    box, factor = (x, y) if isinstance(x, Box) else (y, x)
    return Box.around(box.center * factor, box.radius * abs(factor))


def _div(x: Any, y: Any) -> Box:
    if isinstance(y, Box):
        raise UnsupportedOperation("division by a value that depends on the input has no rule")
    return Box.around(x.center / y, x.radius / abs(y))


MONOTONE = (F.relu, torch.sigmoid, torch.tanh, F.max_pool1d, F.max_pool2d, F.pad)

RULES: dict[Callable, Rule] = {
    **{function: affine(function) for function in WEIGHTED},
    **{function: monotone(function) for function in MONOTONE},
    **{function: reshaping(function) for function in RESHAPING},
    F.leaky_relu: _leaky_relu,
    scale_shift: _scale_shift,
    torch.add: _add,
    torch.sub: _sub,
    torch.mul: _mul,
    torch.div: _div,
    torch.neg: _neg,
    torch.cat: Box.cat,
}


class Joint(NamedTuple):
    """One value of the joint pass: what the clean input gives (if one travels along), and the box."""

    clean: Tensor | None
    box: Box


@dataclass(frozen=True)
class Record:
    """Everything one pass computed: each call in order, and the box of each value by its index (0 is the input)."""

    calls: tuple[Call, ...]
    boxes: Mapping[int, Box]
    output: int

    def detach(self) -> Record:
        """The same boxes and weights, without gradient."""
        calls = [
            replace(
                call, **{part: map_leaves(getattr(call, part), Tensor, Tensor.detach) for part in ("args", "kwargs")}
            )
            for call in self.calls
        ]
        return Record(tuple(calls), {index: box.detach() for index, box in self.boxes.items()}, self.output)


@dataclass(frozen=True)
class Bounds:
    """What one joint pass of a box, and of the clean input in it, found.

    clean: logits of the clean input (B, K), None when only a box was given
    output: box of the logits (B, K)
    relu_inputs: box before each ReLU, in the order of the network
    affine_input: box that enters the first convolution or linear layer (after the input normalisation)
    tail, tail_input: the affine operations that end the network, and the box that enters them
    record: all calls and boxes, where the pass was asked to keep them
    """

    clean: Tensor | None
    output: Box
    relu_inputs: tuple[Box, ...]
    affine_input: Box
    tail: tuple[Call, ...] = ()
    tail_input: Box | None = None
    record: Record | None = None


def _affine_joint(
    function: Callable[..., Tensor], x: Joint, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Joint:
    """The affine rule with the clean input and the centre, which meet the same weights, in one call."""
    points = function(torch.cat([x.clean, x.box.center]), weight, bias, *args, **kwargs).to(x.clean.dtype)
    radius = function(x.box.radius, weight.abs(), None, *args, **kwargs).to(x.clean.dtype)
    clean, center = points.chunk(2)
    return Joint(clean, Box.around(center, radius))


def _clean_result(call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if any(value.clean is None for value in leaves((args, kwargs), Joint)):
        return None
    points, point_kwargs = map_leaves((args, kwargs), Joint, lambda value: value.clean)
    return call.function(*points, **point_kwargs)


Observe = Callable[[Box], Any]


def _itself(box: Box) -> Box:
    return box


class JointPass:
    """Walks clean input and box through the network side by side (a `tracing.Transform`), and gathers the Bounds."""

    settled = SETTLED_BY_CLEAN

    def __init__(self, graph: Graph[Joint], record: bool = False, observe: Observe = _itself) -> None:
        self.relu_inputs: list[Any] = []
        self.affine_input: Any = None
        self.tail_input: Box | None = None
        self.tail: list[Call] = []
        self.calls: list[Call] = []
        self.boxes: dict[int, Box] = {}
        self._tail_indices = graph.tail
        self._record, self._observe = record, observe

    def apply(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Joint:
        boxes, box_kwargs = map_leaves((args, kwargs), Joint, lambda value: value.box)
        if call.function is F.relu:
            self.relu_inputs.append(self._observe(boxes[0]))
        if call.function in WEIGHTED and self.affine_input is None:
            self.affine_input = self._observe(boxes[0])
        if call.index in self._tail_indices:
            (entering,) = leaves((boxes, box_kwargs), Box)
            self.tail_input = self.tail_input or entering
            self.tail.append(call)
        shared = isinstance(args[0], Joint) and args[0].clean is not None and not leaves((args[1:], kwargs), Joint)
        if call.function in WEIGHTED and shared:
            result = _affine_joint(call.function, *args, **kwargs)
        else:
            box = RULES[call.function](*boxes, **box_kwargs)
            result = Joint(_clean_result(call, args, kwargs), box)
        if self._record:
            self.calls.append(call)
            self.boxes[call.index] = result.box
        return result

    def clean(self, value: Joint) -> Tensor | None:
        return value.clean

    def like(self, value: Joint) -> Tensor:
        return value.box.like


class CenterPass(JointPass):
    """A joint pass in which BatchNorm in training mode takes its statistics from the middle of the box."""

    def clean(self, value: Joint) -> Tensor:
        return value.box.center


def propagate(
    graph: Graph[Joint],
    box: Box,
    clean: Tensor | None,
    coefficients: Mapping[int, Coefficients] | None = None,
    record: bool = False,
    from_center: bool = False,
) -> Bounds:
    """One joint pass of `clean` and `box` through `graph`; see `BoundedModel.ibp`."""
    walk = CenterPass(graph, record) if from_center else JointPass(graph, record)
    result = graph.run(Joint(clean, box), walk, coefficients)
    return Bounds(
        result.clean,
        result.box,
        tuple(walk.relu_inputs),
        walk.affine_input or box,
        tuple(walk.tail),
        walk.tail_input or result.box,
        Record(tuple(walk.calls), {0: box, **walk.boxes}, graph.output) if record else None,
    )
