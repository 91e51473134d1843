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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from certtrain.bounds import bilinear, softmax
from certtrain.bounds.attention import attend, attend_box, masked, masked_box
from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN, Coefficients, scale_shift
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Graph, leaves, map_leaves
from certtrain.bounds.normalization import deviation, deviation_box, normalized, normalized_box
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.joining import cat
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.operations.record import OPERATIONS, Operation, PiecewiseLinear, at_settings
from certtrain.errors import UnsupportedOperation, UsageError

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


class Joint(NamedTuple):
    """One value of the joint pass: what the clean input gives (if one travels along), and the box."""

    clean: Tensor | None
    box: Box


@dataclass(frozen=True)
class Record:
    """Everything one pass computed: each call in order, and the box of each value by its index (0 is the input).

    slack: of a pass that covers rounding (`rounding.backward`), by call what a coefficient of 1 of each element of its
    value can lose to rounding, in the deployed network and in a backward pass; None of a pass in real mathematics.
    """

    calls: tuple[Call, ...]
    boxes: Mapping[int, Box]
    output: int
    slack: Mapping[int, Tensor] | None = None

    @property
    def covers_rounding(self) -> bool:
        """See `Bounds`."""
        return self.slack is not None

    def take(self, images: Tensor) -> Record:
        """Of these images alone, any of them several times; what the calls hold is not looked at."""
        boxes = {index: box.take(images) for index, box in self.boxes.items()}
        slack = None if self.slack is None else {index: part[images] for index, part in self.slack.items()}
        return replace(self, boxes=boxes, slack=slack)

    def detach(self) -> Record:
        """The same boxes and weights, without gradient."""
        calls = [replace(call, args=map_leaves(call.args, Tensor, Tensor.detach)) for call in self.calls]
        return replace(self, calls=tuple(calls), boxes={index: box.detach() for index, box in self.boxes.items()})


@dataclass(frozen=True)
class Bounds:
    """What one joint pass of a box, and of the clean input in it, found.

    clean: logits of the clean input (B, K), None when only a box was given
    output: box of the logits (B, K)
    relu_inputs: box before each ReLU, or activation of its kind (`Operation.rectifies`), in the order of the network
    affine_input: box that enters the first convolution or linear layer (after the input normalisation)
    tail, tail_input: the affine operations that end the network, and the box that enters them; the output's where
        there are none
    record: all calls and boxes, where the pass was asked to keep them
    covers_rounding: is this what the network computes in floating point (`rounding`), not real mathematics?
    """

    clean: Tensor | None
    output: Box
    relu_inputs: tuple[Box, ...]
    affine_input: Box
    tail: tuple[Call, ...]
    tail_input: Box
    record: Record | None = None
    covers_rounding: bool = False

    @property
    def recorded(self) -> Record:
        """`record`, of a pass that was asked for it."""
        if self.record is None:
            raise UsageError("this pass was not recorded, which backward passes need: ask ibp(..., record=True)")
        return self.record

    def require_real(self) -> None:
        """Raises UsageError for a pass that covers rounding, whose margins are others."""
        if self.covers_rounding:
            raise UsageError("these bounds cover rounding: ask margins(box, labels, arithmetic=...) for their margins")


def _weighted_joint(
    function: Callable[..., Tensor], x: Joint, weight: Tensor, bias: Tensor | None = None, *settings: Any
) -> Joint:
    """The weighted rule with the clean input and the centre, which meet the same weights, in one call."""
    assert x.clean is not None
    points = function(torch.cat([x.clean, x.box.center]), weight, bias, *settings).to(x.clean.dtype)
    radius = function(x.box.radius, weight.abs(), None, *settings).to(x.clean.dtype)
    clean, center = points.chunk(2)
    return Joint(clean, Box.around(center, radius))


def _clean_result(call: Call, args: tuple[Any, ...]) -> Tensor | None:
    if any(value.clean is None for value in leaves(args, Joint)):
        return None
    return call.function(*map_leaves(args, Joint, lambda value: value.clean))


def _of_dtype(dtype: torch.dtype, value: Joint) -> Joint:
    """Products that autocast rounded, in the type that everything between them has."""
    clean = None if value.clean is None else value.clean.to(dtype)
    return Joint(clean, value.box if value.box.like.dtype is dtype else value.box.map(lambda part: part.to(dtype)))


def shrunk(box: Box, entering: Box, share: float) -> Box:
    """The box behind a ReLU with the upper ends of its unstable neurons multiplied by `share`; it bounds nothing.

    (Müller et al. 2023, arXiv 2210.04871, section 4; which end is multiplied, and that stable neurons stay, is the
    convention of CTBench's code.)
    """
    unstable = (entering.lower < 0) & (entering.upper > 0)
    smaller = torch.maximum(box.lower, share * box.upper)
    return Box(box.lower, torch.where(unstable, smaller, box.upper))


def is_layer(call: Call) -> bool:
    """Is it a convolution or linear layer, if only by a product with one constant, however it is written?"""
    return call.function in WEIGHTED or (call.affine and call.function in (torch.matmul, einsum))


Observe = Callable[[Box], Any]


def _itself(box: Box) -> Box:
    return box


class JointPass:
    """Walks clean input and box through the network side by side (a `graph.Transform`), and gathers the Bounds."""

    settled = SETTLED_BY_CLEAN

    def __init__(
        self, graph: Graph[Joint], record: bool = False, observe: Observe = _itself, shrink: float | None = None
    ) -> None:
        self.relu_inputs: list[Any] = []
        self.affine_input: Any = None
        self.tail_input: Box | None = None
        self.tail: list[Call] = []
        self.calls: list[Call] = []
        self.boxes: dict[int, Box] = {}
        self._tail_indices = graph.tail
        self._record, self._observe, self._shrink = record, observe, shrink

    def apply(self, call: Call, args: tuple[Any, ...]) -> Joint:
        boxes = map_leaves(args, Joint, lambda value: value.box)
        operation = OPERATIONS.get(call.function)
        rectifies = operation is not None and operation.rectifies
        if rectifies:
            self.relu_inputs.append(self._observe(boxes[0]))
        if is_layer(call) and self.affine_input is None:
            self.affine_input = self._observe(leaves(boxes, Box)[0])
        if call.index in self._tail_indices:
            (entering,) = {id(box): box for box in leaves(boxes, Box)}.values()
            self.tail_input = self.tail_input or entering
            self.tail.append(call)
        if call.function in WEIGHTED and args[0].clean is not None:
            result = _weighted_joint(call.function, *args)
        else:
            try:
                box = RULES[call.function](*boxes)
            except UnsupportedOperation as error:
                raise UnsupportedOperation(f"{call.where}: {error}") from error
            if rectifies and self._shrink is not None:
                box = shrunk(box, boxes[0], self._shrink)
            result = _of_dtype(leaves(args, Joint)[0].box.like.dtype, Joint(_clean_result(call, args), box))
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
    shrink: float | None = None,
) -> Bounds:
    """One joint pass of `clean` and `box` through `graph`; see `BoundedModel.ibp`."""
    walk = (CenterPass if from_center else JointPass)(graph, record, shrink=shrink)
    result = graph.run(Joint(clean, box), walk, coefficients)
    return Bounds(
        clean=result.clean,
        output=result.box,
        relu_inputs=tuple(walk.relu_inputs),
        affine_input=walk.affine_input or box,
        tail=tuple(walk.tail),
        tail_input=walk.tail_input or result.box,
        record=Record(tuple(walk.calls), {0: box, **walk.boxes}, graph.output) if record else None,
    )
