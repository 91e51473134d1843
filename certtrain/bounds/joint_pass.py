"""Interval bounds of a network: a box, and the clean input in it, walk through it side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN, Coefficients
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Graph, leaves, map_leaves
from certtrain.bounds.interval import RULES
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.operations.record import OPERATIONS
from certtrain.bounds.results import Bounds, Record
from certtrain.errors import UnsupportedOperation


class Joint(NamedTuple):
    """One value of the joint pass: what the clean input gives (if one travels along), and the box."""

    clean: Tensor | None
    box: Box


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
        self._tail_indices = graph.affine_tail
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
