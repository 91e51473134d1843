"""A network as a straight line of steps, and the walk through it.

A step is a call of one of the canonical functions of `operations`. What flows (a tensor, a box, both at once) is the
walk's `Transform`'s business: the same line of steps serves clean inputs, boxes and floating-point boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from certtrain.bounds.batch_norm import BatchSum, Coefficients, Settle, scale_shift
from certtrain.bounds.operations.record import Operation, Shape
from certtrain.errors import UnsupportedOperation

V = TypeVar("V")


@dataclass(frozen=True)
class Ref:
    """Stands, among a step's arguments, for the value of the step at `index`."""

    index: int


@dataclass(frozen=True)
class Call:
    """`function(*args)`, everything known but the values that depend on the input, which are `Ref`s.

    `affine`: in those values taken together, so that a box's radius, and a backward pass, may treat it as a matrix.
    """

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    where: str
    affine: bool


@dataclass(frozen=True)
class Step:
    """One recorded step, before parameters and shapes are looked up.

    Args:
        function: canonical, or (of what does not depend on the network's input) any.
        args: after them come those of `arguments`, read off the module at every call, so that the newest
            parameters are used.
        where: what it is and where in the network, for messages.
        operation: its traits; None where the value does not depend on the network's input (a shape, a buffer's root).
        affine: see `Call`.
        module: whose parameters `arguments` reads.
        last_uses: steps whose values no later step reads.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    where: str
    operation: Operation | None = None
    affine: bool = False
    arguments: Callable[[], tuple[Any, ...]] = tuple
    kwargs: Mapping[str, Any] | None = None  # of a function that is not canonical
    module: nn.Module | None = None
    last_uses: tuple[int, ...] = ()

    @property
    def tracked(self) -> bool:
        """Does the value depend on the network's input?"""
        return self.operation is not None

    @cached_property
    def read(self) -> set[int]:
        """The steps whose values it reads."""
        return {ref.index for ref in leaves((self.args, dict(self.kwargs or {})), Ref)}


def map_leaves(structure: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`structure`, nested tuples, lists, dicts and slices, with every instance of `kind` in it replaced."""
    if isinstance(structure, kind):
        return function(structure)
    if isinstance(structure, torch.Size):  # of numbers, and with methods of its own
        return structure
    if isinstance(structure, tuple):
        return tuple([map_leaves(item, kind, function) for item in structure])
    if isinstance(structure, list):
        return [map_leaves(item, kind, function) for item in structure]
    if isinstance(structure, dict):
        return {key: map_leaves(item, kind, function) for key, item in structure.items()}
    if isinstance(structure, slice):
        ends = (structure.start, structure.stop, structure.step)
        return slice(*[map_leaves(item, kind, function) for item in ends])
    return structure


def leaves(structure: Any, kind: type) -> list[Any]:
    """Every instance of `kind` in nested tuples, lists, dicts and slices, in order."""
    found: list[Any] = []
    map_leaves(structure, kind, found.append)
    return found


class Transform(Protocol[V]):
    """How a walk through the network computes values of type V: tensors, boxes, or both at once.

    `settled` are the operations that `clean` turns into plain scalings before they are applied: SETTLED_BY_CLEAN, or
    those of them that the transform has no rule of its own for.
    """

    @property
    def settled(self) -> Mapping[Callable, Settle]: ...

    def apply(self, call: Call, args: tuple[Any, ...]) -> V: ...
    def clean(self, value: V) -> Tensor | None: ...
    def like(self, value: V) -> Tensor: ...


@dataclass(frozen=True)
class Cut:
    """A network in two: everything up to the value at `at`, and the tail, which depends on nothing else of it.

    behind: the tail's steps in order, and among them those before `at` that compute constants for it.
    """

    at: int
    behind: tuple[int, ...]


@dataclass(frozen=True)
class Graph(Generic[V]):
    """The steps of a network in order; step 0 is its input, the one at `output` its result.

    Args:
        affine_tail: the affine steps that end the network, one after the other.
        cuts: by how many activations are behind them. (`cuts.cuts`)
        batch_sum: adds up BatchNorm's sums, where the inputs are only a part of the batch.
        final_softmax: a softmax or log-softmax that the network applies to the output, over the classes; left out here.
    """

    steps: tuple[Step, ...]
    output: int
    affine_tail: frozenset[int]
    cuts: Mapping[int, Cut]
    batch_sum: BatchSum | None = None
    final_softmax: Callable[..., Tensor] | None = None

    def run(self, value: V, transform: Transform[V], coefficients: Mapping[int, Coefficients] | None = None) -> V:
        """Walk through the network from `value`; intermediate values are freed after their last use.

        `coefficients` (by step) overrides the BatchNorms' own, see `BoundedModel.clean_pass`.
        """
        values: dict[int, Any] = {0: value}
        self.advance(values, range(1, len(self.steps)), transform, coefficients or {})
        return values[self.output]

    def advance(
        self,
        values: dict[int, Any],
        indices: Iterable[int],
        transform: Transform[V],
        coefficients: Mapping[int, Coefficients],
    ) -> None:
        """A part of the walk: the steps at `indices`, which read `values` and put their results there.

        Raises:
            UnsupportedOperation: an argument that the operation's rules do not cover, or a result whose first axis is
                not the images.
        """
        for index in indices:
            step = self.steps[index]
            if step.tracked:
                call = self._call(index, step, values, transform, coefficients)
                entering = map_leaves(call.args, Ref, lambda ref: values[ref.index])
                values[index] = transform.apply(call, entering)
                _require_images_first(call, transform.like(values[index]), transform, values)
            else:
                args, kwargs = map_leaves(
                    (step.args, dict(step.kwargs or {})), Ref, lambda ref: self._like(ref, values, transform)
                )
                values[index] = step.function(*args, *step.arguments(), **kwargs)
            for dead in step.last_uses:
                del values[dead]

    def _constant(self, ref: Ref, values: Mapping[int, Any]) -> Any:
        return ref if self.steps[ref.index].tracked else values[ref.index]

    def _like(self, ref: Ref, values: Mapping[int, Any], transform: Transform[V]) -> Any:
        value = values[ref.index]
        return transform.like(value) if self.steps[ref.index].tracked else value

    def _call(
        self,
        index: int,
        step: Step,
        values: Mapping[int, Any],
        transform: Transform[V],
        coefficients: Mapping[int, Coefficients],
    ) -> Call:
        """The step with its constants looked up and brought to the values' type, its preconditions checked."""
        args = map_leaves(step.args, Ref, lambda ref: self._constant(ref, values))
        if index in coefficients:
            return Call(index, scale_shift, (args[0], *coefficients[index]), step.where, affine=True)
        operation = step.operation
        assert operation is not None
        args = (*args, *step.arguments())
        like = transform.like(values[leaves(args, Ref)[0].index])
        operands = args[: operation.operands]
        args = (
            *map_leaves(operands, Tensor, lambda constant: _as_operand(constant, like)),
            *args[operation.operands :],
        )
        try:
            operation.require(*map_leaves(args, Ref, lambda ref: Shape(transform.like(values[ref.index]).shape)))
        except UnsupportedOperation as error:
            raise UnsupportedOperation(f"{step.where}: {error}") from error
        settle = transform.settled.get(step.function)
        if settle is None:
            return Call(index, step.function, args, step.where, step.affine)
        clean = transform.clean(values[args[0].index])
        function, args = settle(args[0], clean, like.dim(), self.batch_sum, *args[1:])
        return Call(index, function, args, step.where, affine=True)


def _as_operand(constant: Tensor, like: Tensor) -> Tensor:
    """A constant as PyTorch's type promotion would have it beside a floating-point value; integers do not wrap."""
    if constant.is_complex():
        raise UnsupportedOperation("complex numbers have no rule")
    return constant if constant.dtype == like.dtype else constant.to(like.dtype)


def _require_images_first(call: Call, result: Tensor, transform: Transform, values: Mapping[int, Any]) -> None:
    """The first axis of every value is the images': bounds of one must not depend on another."""
    images = transform.like(values[leaves(call.args, Ref)[0].index]).shape[0]
    if result.dim() == 0 or result.shape[0] != images:
        shape = tuple(result.shape)
        raise UnsupportedOperation(
            f"{call.where} moves or mixes the batch axis: {images} images become shape {shape}; bounds need every "
            "value to keep the images along its first axis"
        )


def with_last_uses(steps: list[Step], output: int) -> tuple[Step, ...]:
    """The steps, each told which values nobody reads after it."""
    last_use = {index: i for i, step in enumerate(steps) for index in step.read}
    last_use.pop(output, None)
    return tuple(
        replace(step, last_uses=tuple(index for index, last in last_use.items() if last == i))
        for i, step in enumerate(steps)
    )
