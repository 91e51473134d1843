"""CROWN-IBP and CROWN: margins by backward passes, on IBP's boxes or on boxes that backward passes have tightened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Ref, leaves, map_leaves
from certtrain.bounds.interval import RULES
from certtrain.bounds.linear.backward import Lines, Slopes, lower_bounds
from certtrain.bounds.linear.patches import Patches
from certtrain.bounds.linear.relaxations import RELAXATIONS
from certtrain.bounds.margins import check_labels, wrong_classes
from certtrain.bounds.operations.record import OPERATIONS, PiecewiseLinear, at_settings
from certtrain.bounds.results import Bounds, Record
from certtrain.bounds.shapes import flattened, shaped


def backward_margins(
    record: Record, labels: Tensor, slopes: Slopes | None = None, lines: Lines | None = None
) -> Tensor:
    """Margins (B, K), 0 in column y, by one backward pass on the record's boxes, of a row for each wrong class."""
    output = record.boxes[record.output]
    classes = output.shape[1]
    check_labels(labels, output.shape[0], classes)
    wrong = wrong_classes(labels, classes)
    eye = torch.eye(classes, dtype=output.like.dtype, device=output.like.device)
    lower = lower_bounds(record, record.output, eye[labels][:, None] - eye[wrong], slopes, lines)
    return lower.new_zeros(len(labels), classes).scatter(1, wrong, lower)


def crown_margins(bounds: Bounds, labels: Tensor, slopes: Slopes | None = None, lines: Lines | None = None) -> Tensor:
    """`backward_margins` on the boxes that `bounds` recorded. (CROWN-IBP if those are IBP's.)"""
    return backward_margins(bounds.recorded, labels, slopes, lines)


def tightened(record: Record, rows_at_once: int, intersect: bool = True) -> Record:
    """The record with the boxes that enter nonlinear operations recomputed by backward passes, first to last (CROWN).

    Args:
        rows_at_once: bound on R in a backward pass, for memory.
        intersect: keep the cheaper box where it is tighter, and ask only about neurons it leaves unstable; otherwise
            every neuron's box is the backward pass's own.
    """
    tightening = Tightening(record, rows_at_once, intersect)
    for _ in tightening.steps():
        pass
    return tightening.record


class Tightening:
    """`tightened`, one value after another: between two of them the record is whole, and images may leave."""

    def __init__(self, record: Record, rows_at_once: int, intersect: bool = True) -> None:
        self.record, self._rows, self._intersect = record, rows_at_once, intersect
        self._tight: set[int] = {0}
        self._lines: Lines = {}  # of the values before the one that is next

    def steps(self) -> Iterator[None]:
        """A step for each value that enters nonlinear operations: its box, and by intervals those that follow."""
        for position in range(len(self.record.calls)):
            call = self.record.calls[position]
            for index in [] if call.affine else [ref.index for ref in leaves(call.args, Ref)]:
                if index not in self._tight:
                    before = replace(self.record, calls=self.record.calls[:position])
                    box = _tightened_box(before, index, call, self._rows, self._intersect, self._lines)
                    self._tight.add(index)
                    self._follow(index, box)
                    yield
            if call.function in RELAXATIONS:
                self._tight.add(call.index)  # the image of a tight box: a backward pass through the lines is no tighter

    def take(self, images: Tensor, record: Record) -> None:
        """Go on with these images (L,) alone, of which `record` is as cheap as that which this began with."""
        self.record, self._lines = replace(record, boxes=self.record.take(images).boxes), {}

    def _follow(self, index: int, box: Box) -> None:
        boxes = {**self.record.boxes, index: box}
        for call in () if self.record.covers_rounding else self.record.calls:  # these rules do not
            if call.index > index and call.index not in self._tight:
                boxes[call.index] = RULES[call.function](*map_leaves(call.args, Ref, lambda ref: boxes[ref.index]))
        self.record = replace(self.record, boxes=boxes)


def _tightened_box(record: Record, index: int, call: Call, rows_at_once: int, intersect: bool, lines: Lines) -> Box:
    """The box of the value at `index`; each image has rows for the neurons that its own box leaves undecided."""
    box = record.boxes[index]
    lower, upper = flattened(box.lower, 1).clone(), flattened(box.upper, 1).clone()
    needed = flattened(_undecided(box, call), 1) if intersect else torch.ones_like(lower, dtype=torch.bool)
    most = int(needed.sum(1).max()) if len(needed) else 0
    chosen = needed.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    for neurons in chosen.split(max(1, rows_at_once // 2), 1) if most else ():
        low, negative_high = _both_ends(record, index, neurons, lines).chunk(2, 1)
        low, high = _outward(low, -torch.inf), _outward(-negative_high, torch.inf)
        if intersect:
            low, high = torch.fmax(low, lower.gather(1, neurons)), torch.fmin(high, upper.gather(1, neurons))
        lower, upper = lower.scatter(1, neurons, low), upper.scatter(1, neurons, high)
    return Box(lower.view(box.shape), upper.view(box.shape))


def _outward(end: Tensor, infinity: float) -> Tensor:
    """`end`, or where it is not finite, of which nothing is known, `infinity`."""
    return torch.where(end.isfinite(), end, infinity)


def _both_ends(record: Record, index: int, neurons: Tensor, lines: Lines) -> Tensor:
    """Lower bounds (B, 2 R) of the value's elements at `neurons` (B, R), and of their negatives."""
    value = record.boxes[index].like
    producer = record.calls[-1] if record.calls and record.calls[-1].index == index else None
    if value.dim() == 4:
        units = Patches.one_hot(neurons, value.shape[1:], value)
        return lower_bounds(record, index, units.with_negative(), lines=lines)
    if producer is not None and producer.function is F.linear and value.dim() == 2:
        x, weight, bias = producer.args  # its rows, instead of a product with rows of the identity
        rows = weight[neurons]
        constant = torch.zeros_like(rows[:, :, 0]) if bias is None else bias[neurons]
        lost = 0.0 if record.slack is None else record.slack[index].gather(1, neurons).repeat(1, 2)
        found = lower_bounds(record, x.index, torch.cat([rows, -rows], 1), lines=lines)
        return torch.cat([constant, -constant], 1) - lost + found
    identity = shaped(F.one_hot(neurons, value[0].numel()).to(value), value.shape[1:])
    return lower_bounds(record, index, torch.cat([identity, -identity], 1), lines=lines)


def _undecided(box: Box, call: Call) -> Tensor:
    """Where a tighter box may give tighter lines: a piecewise linear function is what it is but around its kinks."""
    curve = OPERATIONS[call.function].curve if call.function in OPERATIONS else None
    if not isinstance(curve, PiecewiseLinear):
        return box.upper > box.lower
    settings = call.args[1:]
    inside = [(kink > box.lower) & (kink < box.upper) for kink in at_settings(curve.kinks, *settings)]
    return reduce(torch.logical_or, inside, torch.zeros_like(box.lower, dtype=torch.bool))
