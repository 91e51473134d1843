"""Backward passes that cover rounding: what a network computes in floating point is what it should, and an error.

A computed value is v = f(x) + e, x the computed values before it and |e| <= E: a linear function a·v of it loses no
more than |a|·E beside what real mathematics says. E is what the rules of `rounding` add to a box for rounding. The
backward pass itself is computed in float64, and loses what its roundings make of the magnitudes they meet. Both are the
record's `slack`. (docs/soundness.md, eq. 11 and 12.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.batch_norm import scale_shift
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Graph, Ref, leaves, map_leaves
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.joining import cat
from certtrain.bounds.operations.movement import cast
from certtrain.bounds.operations.pooling import resize
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.operations.record import OPERATIONS
from certtrain.bounds.results import Bounds, Record
from certtrain.bounds.rounding.arithmetic import (
    BOUND_ARITHMETIC,
    SPARE_ROUNDINGS,
    Arithmetic,
    arithmetic_named,
    compound,
    rounded_up,
)
from certtrain.bounds.rounding.boxes import OutwardBox
from certtrain.bounds.rounding.propagation import SoundPass, run_sound_pass
from certtrain.bounds.rounding.rules import batch_norm_scaling
from certtrain.bounds.rounding.table import COMPARING, EXACT
from certtrain.bounds.shapes import per_channel
from certtrain.errors import UnsupportedOperation

PULLED_BACK_BY_TRANSPOSE = {
    *WEIGHTED,
    *EXACT,
    *(function for function, operation in OPERATIONS.items() if operation.averaging and function is not resize),
    *(F.batch_norm, F.pad),
    *(add, sub, cast, cat, einsum, torch.matmul, torch.mul, torch.div, torch.neg),
}
"""What linear bounds that cover rounding go back through by its transpose. Not resizing: its place may be rounded."""


def _line(steepest: float = 1.0) -> Callable[..., Tensor]:
    return lambda result, x, *settings: result + 3 * steepest * x


def _planes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda result, *values: result + 8 * function(*values)


RELAXATION_MAGNITUDES: dict[Callable, Callable[..., Tensor]] = {
    **{
        function: _line()
        for function in (F.relu, F.leaky_relu, F.relu6, torch.clamp, F.hardtanh, F.hardsigmoid, torch.abs)
    },
    F.hardswish: _line(1.5),
    F.prelu: lambda result, x, weight: result + 3 * x * per_channel(weight, x.dim()).abs().clamp(min=1),
    **{function: lambda result, x, y: result + 3 * (abs(x) + abs(y)) for function in (torch.maximum, torch.minimum)},
    **{function: lambda result, *_: result for function in COMPARING if function not in (F.relu, F.relu6)},
    **{function: _planes(function) for function in (torch.mul, torch.matmul, einsum)},
    torch.square: lambda result, x: result + 8 * x.square(),
}
"""What they go back through by a relaxation: what a coefficient of 1 meets there, at the most, offsets and all.

Of magnitudes (B, ...): of the result, and of the values in the places of the arguments. (docs/soundness.md, eq. 12)
"""


class _Middle(OutwardBox):
    """The centre of a box, with the magnitude of all of it: what a rule makes of its radius is rounding alone."""

    __slots__ = ("_magnitude",)
    _magnitude: Tensor

    @classmethod
    def of(cls, box: OutwardBox) -> _Middle:
        middle = cls.around(box.center, torch.zeros_like(box.center))
        middle._magnitude = box.magnitude
        return middle

    @property
    def magnitude(self) -> Tensor:
        return self._magnitude


class _RecordingPass(SoundPass):
    """A walk that keeps every call, box, and error E."""

    def __init__(self, arithmetic: Arithmetic, graph: Graph[OutwardBox]) -> None:
        super().__init__(arithmetic, graph)
        self.calls: list[Call] = []
        self.boxes: dict[int, OutwardBox] = {}
        self.errors: dict[int, Tensor] = {}

    def keep(self, call: Call, args: tuple[Any, ...], result: OutwardBox) -> None:
        if call.function not in (PULLED_BACK_BY_TRANSPOSE if call.affine else RELAXATION_MAGNITUDES):
            raise UnsupportedOperation(
                f"{call.where} has no linear relaxation that covers rounding; methods that support it: ibp"
            )
        found = self.result(call, map_leaves(args, OutwardBox, _Middle.of))
        self.errors[call.index] = (found[0] if call.function is F.batch_norm else found).radius
        self.boxes[call.index] = result
        refs = iter(leaves(call.args, Ref))
        known = replace(call, args=map_leaves(args, OutwardBox, lambda _: next(refs)))
        self.calls.append(_as_scaling(known, result) if call.function is F.batch_norm else known)


def _as_scaling(call: Call, box: OutwardBox) -> Call:
    x, mean, variance, weight, bias, _, _, eps = call.args
    scaling = (per_channel(each, box.like.dim()) for each in batch_norm_scaling(mean, variance, weight, bias, eps))
    return Call(call.index, scale_shift, (x, *scaling), call.where, affine=True)


@torch.no_grad()
def propagate_recorded(graph: Graph[OutwardBox], box: Box, arithmetic: str) -> Bounds:
    """`propagation.propagate`, with a record whose backward passes cover rounding as well.

    Raises:
        UnsupportedOperation: as `propagate`; or an operation that no linear bounds go back through soundly.
    """
    a = arithmetic_named(arithmetic)
    walk = _RecordingPass(a, graph)
    bounds = run_sound_pass(walk, box)
    assert walk.entering is not None
    record = Record(tuple(walk.calls), {0: walk.entering, **walk.boxes}, graph.output)
    return replace(bounds, record=replace(record, slack=_slack(record, walk.errors, a)))


def _slack(record: Record, errors: dict[int, Tensor], a: Arithmetic) -> dict[int, Tensor]:
    """Eq. 12: E, and what float64 loses in going back.

    No sum of a backward pass has more than `terms` terms. One through W·x + b is off by γ·|a|·(|W| m + |b|), γ of so
    many roundings and m the magnitude of x; and E, at least `unit` times the same magnitude, holds that γ/unit times.
    What relaxations lose, as they are computed and as they are met, is no more than 2γ of `RELAXATION_MAGNITUDES`.
    """
    terms = sum(box.shape[1:].numel() for box in record.boxes.values()) + len(record.calls) + SPARE_ROUNDINGS
    growth = compound(BOUND_ARITHMETIC.unit, 2 * terms)
    gamma = Fraction(1) if growth is None else growth - 1
    factors = rounded_up((1 + gamma) * (1 + gamma / a.unit)), rounded_up(2 * gamma)
    sizes = {index: torch.maximum(box.lower.abs(), box.upper.abs()) for index, box in record.boxes.items()}
    slack = {}
    for call in record.calls:
        met = sizes[call.index]
        if not call.affine:
            met = RELAXATION_MAGNITUDES[call.function](met, *map_leaves(call.args, Ref, lambda ref: sizes[ref.index]))
        slack[call.index] = factors[0] * errors[call.index].expand(met.shape) + factors[1] * met
    return slack
