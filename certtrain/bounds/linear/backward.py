"""Bounds of linear functions of a network's values, pulled back through it one operation at a time.

Lower bounds of A·v become linear functions of the network's input, where a box gives their minimum. (Zhang et al. 2018,
arXiv 1811.00866.) Only lower bounds appear: an upper bound is a lower bound of the negative. Coefficients A have shape
(B, R, ...): R functions for each of B images; those of a convolution's neurons are kept as `Patches` for as long as
they see a part of the image only. An operation is pulled back

affine       by its transpose; autograd's vector-Jacobian product knows every one of them
elementwise  where A > 0 by the line below the function, where A < 0 by the line above it (`relaxations.py`)
a product    of two values by planes below and above it (`bilinear.py`); softmax in the same way (`softmax.py`)
a maximum    by the input that is largest at least, or by a constant; of two values, as y + ReLU(x - y)

and one that has none of these is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.batch_norm import scale_shift
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Ref, leaves, map_leaves
from certtrain.bounds.linear import bilinear, normalization, patches
from certtrain.bounds.linear.free_slopes import FREE_SLOPES
from certtrain.bounds.linear.patches import (
    Coefficients,
    Contributions,
    Convolution,
    Patches,
    added,
    constant_factor,
    constant_map,
    dense,
    dot,
    magnitude,
    through,
)
from certtrain.bounds.linear.relaxations import RELAXATIONS, LinearRelaxation, relu
from certtrain.bounds.linear.softmax import softmax
from certtrain.bounds.normalization import normalized
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.movement import cast, differentiable, identity, reshape
from certtrain.bounds.results import Record
from certtrain.bounds.shapes import flattened
from certtrain.errors import UnsupportedOperation
from certtrain.per_axis import per_axis
from certtrain.runtime.precision import plain_convolutions

Slopes = Mapping[int, Tensor]  # by call: slope of the line below, or parameter of the planes, (B, 1 or R, ...)
Lines = dict[int, LinearRelaxation]  # by call


def _affine(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    refs = leaves(call.args, Ref)
    zeros = [torch.zeros_like(boxes[ref.index].like) for ref in refs]

    def function(*values: Tensor) -> Tensor:
        remaining = iter(values)
        return differentiable(call.function)(*map_leaves(call.args, Ref, lambda _: next(remaining)))

    constant, pull_back = torch.func.vjp(function, *zeros)  # type: ignore[misc] # two, without has_aux
    parts = torch.func.vmap(pull_back, in_dims=1, out_dims=1)(a)
    return [(ref, part) for ref, part in zip(refs, parts, strict=True)], dot(a, constant)


def _reshaped(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    """Elements keep their order."""
    (ref,) = leaves(call.args, Ref)
    return [(ref, a.reshape(*a.shape[:2], *boxes[ref.index].shape[1:]))], a.new_zeros(a.shape[:2])


def _scaled(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    ref, scale, shift = call.args
    return [(ref, a * scale[:, None])], dot(a, shift.expand(boxes[call.index].shape))


def _sum(sign: int) -> Callable[..., tuple[Contributions, Tensor]]:
    """x + y or x - y, of two values or of a value and a constant."""

    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        shape = boxes[call.index].shape
        x, y, alpha = call.args
        if any(boxes[ref.index].shape != shape for ref in (x, y) if isinstance(ref, Ref)):
            return _affine(call, a, boxes)
        contributions, constant = [], a.new_zeros(a.shape[:2])
        for argument, factor in ((x, 1), (y, sign * alpha)):
            if isinstance(argument, Ref):
                contributions.append((argument, factor * a))
            else:
                constant = constant + dot(a, constant_map(factor * argument, boxes[call.index]))
        return contributions, constant

    return rule


def _scaling(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    """x y, x / y or -x with a constant y, element by element."""
    found = constant_factor(call, boxes)
    if found is None:
        return _affine(call, a, boxes)
    ref, factor = found
    return [(ref, a * factor[:, None])], a.new_zeros(a.shape[:2])


def _linear(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    x, weight, bias = call.args
    return [(x, a @ weight)], flattened(a * bias, 2).sum(2) if bias is not None else a.new_zeros(a.shape[:2])


def _conv(transpose: Callable[..., Tensor]) -> Callable[..., tuple[Contributions, Tensor]]:
    """By the convolution's transpose as a layer of its own, which has a fast gradient; an input gradient has not."""

    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        x, weight, bias, *_ = call.args
        settings = Convolution.of(call)
        if settings is None:
            return _affine(call, a, boxes)
        unread = settings.unread(boxes[x.index].shape[2:], weight.shape[2:])
        rows = a.flatten(0, 1)
        pulled = transpose(
            rows, weight, None, settings.stride, settings.padding, unread, settings.groups, settings.dilation
        )
        return [(x, pulled.unflatten(0, a.shape[:2]))], _of_channels(a, bias)

    return rule


def _conv_transpose(convolve: Callable[..., Tensor]) -> Callable[..., tuple[Contributions, Tensor]]:
    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        x, weight, bias, stride, padding, _, groups, dilation = call.args
        pulled = convolve(a.flatten(0, 1), weight, None, stride, padding, dilation, groups)
        for axis, size in enumerate(boxes[x.index].shape[2:], 2):  # beyond them lies output padding, of zeros alone
            pulled = pulled.narrow(axis, 0, size)
        return [(x, pulled.unflatten(0, a.shape[:2]))], _of_channels(a, bias)

    return rule


def _of_channels(a: Tensor, bias: Tensor | None) -> Tensor:
    """(B, R): what a number for each channel adds."""
    return a.new_zeros(a.shape[:2]) if bias is None else a.flatten(3).sum(3) @ bias


def _max_pool(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    """Below: the input whose lower bound is largest. Above: that one where it exceeds all others, else a constant."""
    ref, kernel_size, stride, padding, dilation, ceil_mode = call.args
    arguments = [kernel_size, stride or kernel_size, padding, dilation]
    lower, upper = boxes[ref.index].lower, boxes[ref.index].upper
    if call.function is F.max_pool1d:
        lower, upper, a = lower[:, :, None], upper[:, :, None], a[..., None, :]
        arguments = [(neutral, *per_axis(value, 1)) for value, neutral in zip(arguments, (1, 1, 0, 1), strict=True)]
    kernel, stride, padding, dilation = arguments
    largest, chosen = F.max_pool2d(lower, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    exceeds = torch.zeros_like(largest, dtype=torch.bool)
    if not ceil_mode:
        exceeds = largest >= _largest_other(upper.detach(), chosen, kernel, stride, padding, dilation)
    follows = exceeds[:, None] | (a > 0)
    target = a.new_zeros(*a.shape[:3], lower.shape[2:].numel())
    indices = chosen.flatten(2)[:, None].expand(-1, a.shape[1], -1, -1)
    pulled = target.scatter_add(3, indices, torch.where(follows, a, 0.0).flatten(3))
    ceiling = F.max_pool2d(upper, kernel, stride, padding, dilation, ceil_mode)
    constant = dot(torch.where(follows, 0.0, a), ceiling)
    return [(ref, pulled.view(*a.shape[:2], *boxes[ref.index].shape[1:]))], constant


def _maximum(sign: int) -> Callable[..., tuple[Contributions, Tensor]]:
    """max(x, y) = y + ReLU(x - y), min(x, y) = y - ReLU(y - x), of two values or of a value and a constant."""

    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        x, y = (boxes[value.index] if isinstance(value, Ref) else Box(value, value) for value in call.args)
        above, below = (x, y) if sign > 0 else (y, x)
        lines = relu(Box(above.lower - below.upper, above.upper - below.lower))
        found, constant = through(lines, sign * a)
        pulled = sign * dense(found)
        contributions: Contributions = []
        for value, part in zip(call.args, (pulled, a - pulled), strict=True):
            if isinstance(value, Ref):
                contributions.append((value, part.sum_to_size(*a.shape[:2], *boxes[value.index].shape[1:])))
            else:
                constant = constant + dot(part, value.expand(a.shape[0:1] + a.shape[2:]))
        return contributions, constant

    return rule


def _pooled(pool: Callable[..., Any]) -> Callable[..., tuple[Contributions, Tensor]]:
    """Below: the input whose lower bound is largest. Above: a constant."""

    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        ref, *settings = call.args
        box = boxes[ref.index]
        _, chosen = pool(box.lower, *settings)
        ceiling = call.function(box.upper, *settings)
        target = a.new_zeros(*a.shape[:3], box.shape[2:].numel())
        indices = chosen.flatten(2)[:, None].expand(-1, a.shape[1], -1, -1)
        pulled = target.scatter_add(3, indices, a.clamp(min=0).flatten(3))
        return [(ref, pulled.view(*a.shape[:2], *box.shape[1:]))], dot(a.clamp(max=0), ceiling)

    return rule


def _extreme(sign: int) -> Callable[..., tuple[Contributions, Tensor]]:
    """The largest, or smallest, along axes. On one side the input that is so at least (at most), else a constant."""

    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        ref, dim, keepdim = call.args
        box = boxes[ref.index]
        axes = sorted(axis % len(box.shape) for axis in (dim if isinstance(dim, tuple | list) else (dim,)))
        kept = [axis for axis in range(len(box.shape)) if axis not in axes]
        guaranteed = (box.lower if sign > 0 else -box.upper).permute(*kept, *axes).flatten(len(kept))
        chosen = F.one_hot(guaranteed.argmax(-1), guaranteed.shape[-1]).to(a.dtype)
        chosen = chosen.unflatten(-1, [box.shape[axis] for axis in axes])
        chosen = chosen.permute(*[(kept + axes).index(axis) for axis in range(len(box.shape))])
        for axis in [] if keepdim else axes:
            a = a.unsqueeze(axis + 1)
        follows, rest = (a.clamp(min=0), a.clamp(max=0)) if sign > 0 else (a.clamp(max=0), a.clamp(min=0))
        limit = box.upper.amax(axes, True) if sign > 0 else box.lower.amin(axes, True)
        return [(ref, follows * chosen[:, None])], dot(rest, limit)

    return rule


def _largest_other(upper: Tensor, chosen: Tensor, *pooling: Any) -> Tensor:
    """The largest upper bound in each window, the chosen input left out; windows may overlap."""
    kernel, stride, padding, dilation = (per_axis(value, 2) for value in pooling)

    def windows(x: Tensor) -> Tensor:
        return F.unfold(x, kernel, dilation, padding, stride).view(*x.shape[:2], -1, *chosen.shape[2:])

    numbers = torch.arange(1, 1 + upper.shape[2:].numel(), device=upper.device, dtype=torch.float64)
    numbers = windows(numbers.view(1, 1, *upper.shape[2:]))  # 0 where a window reaches into the padding
    left_out = (numbers == 0) | (numbers == 1 + chosen[:, :, None])
    return windows(upper).masked_fill(left_out, -torch.inf).amax(2)


Rule = Callable[[Call, Tensor, Mapping[int, Box]], tuple[Contributions, Tensor]]

KEEP_ORDER = (
    identity,
    cast,
    torch.flatten,
    reshape,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.detach,  # whose vector-Jacobian product is 0
    Tensor.unflatten,
)

SCALINGS = (torch.mul, torch.div, torch.neg)  # where one factor is a constant

RULES: dict[Callable, Rule] = {
    **{function: _reshaped for function in KEEP_ORDER},
    scale_shift: _scaled,
    add: _sum(1),
    sub: _sum(-1),
    **{function: _scaling for function in SCALINGS},
    F.linear: _linear,
    F.conv1d: _conv(F.conv_transpose1d),
    F.conv2d: _conv(F.conv_transpose2d),
    F.conv3d: _conv(F.conv_transpose3d),
    F.conv_transpose1d: _conv_transpose(F.conv1d),
    F.conv_transpose2d: _conv_transpose(F.conv2d),
    F.max_pool1d: _max_pool,
    F.max_pool2d: _max_pool,
    F.max_pool3d: _pooled(partial(F.max_pool3d, return_indices=True)),
    F.adaptive_max_pool1d: _pooled(partial(F.adaptive_max_pool1d, return_indices=True)),
    F.adaptive_max_pool2d: _pooled(partial(F.adaptive_max_pool2d, return_indices=True)),
    torch.amax: _extreme(1),
    torch.amin: _extreme(-1),
    torch.maximum: _maximum(1),
    torch.minimum: _maximum(-1),
    **{function: softmax for function in (torch.softmax, torch.log_softmax)},
}
"""Of operations whose transpose, or relaxation as a whole, is written down; any other affine call has `_affine`."""


PARAMETRIZED: dict[Callable, bilinear.Rule] = {**bilinear.PRODUCTS, normalized: normalization.normalized}
"""Of operations of two values, whose planes have a free parameter."""


@dataclass(frozen=True)
class LinearBounds:
    """Lower bounds of R functions for each of B images that are linear in the input.

    coefficients: (B, R, ...) of the input, None for zero; constant: (B, R); box: of the input; covers_rounding: do the
    bounds, and so must their minimum?
    """

    coefficients: Coefficients | None
    constant: Tensor
    box: Box
    covers_rounding: bool

    def least(self) -> Tensor:
        """(B, R): over the whole box."""
        if self.coefficients is None:
            return self.constant
        center, radius = self.box.center, self.box.radius
        if (
            self.covers_rounding
        ):  # of two sums of n terms: no more than n + 1 roundings in each, and four before and after
            radius = radius + 2.0**-52 * (center[0].numel() + 8) * (center.abs() + radius)
        return self.constant + dot(self.coefficients, center) - dot(magnitude(self.coefficients), radius)

    def minimizers(self) -> Tensor:
        """(B, R, ...): corners of the box where the bounds are least."""
        lower, upper = self.box.lower[:, None], self.box.upper[:, None]
        if self.coefficients is None:
            return lower.expand(*self.constant.shape, *lower.shape[2:])
        return torch.where(dense(self.coefficients) > 0, lower, upper)


def lower_bounds(
    record: Record, index: int, a: Coefficients, slopes: Slopes | None = None, lines: Lines | None = None
) -> Tensor:
    """Lower bounds (B, R) of the functions `a` (B, R, ...) of the value at `index`, over the input box."""
    return linear_bounds(record, {index: a}, slopes, lines).least()


def linear_bounds(
    record: Record,
    functions: Mapping[int, Coefficients],
    slopes: Slopes | None = None,
    lines: Lines | None = None,
    observe: Callable[[Call, Coefficients], None] | None = None,
) -> LinearBounds:
    """Bounds below of sums of linear functions of the network's values.

    Args:
        functions: by value, coefficients (B, R, ...), dense or `Patches`.
        slopes: by call, the slope of the line below where that is free (`FREE_SLOPES`), or the parameter of a product's
            planes.
        lines: relaxations known from earlier passes over the same boxes; it is added to.
        observe: sees the coefficients of the value of every call with a relaxation.

    Where the record has slack the bounds are those of every value that the network can compute, less what this pass may
    have lost itself. (docs/soundness.md)
    """
    lines = {} if lines is None else lines
    if not record.covers_rounding:
        return _pulled_back(record, functions, slopes, lines, observe)
    with plain_convolutions():  # the slack is that of sums
        return _pulled_back(record, functions, slopes, lines, observe)


def _pulled_back(
    record: Record,
    functions: Mapping[int, Coefficients],
    slopes: Slopes | None,
    lines: Lines,
    observe: Callable[[Call, Coefficients], None] | None,
) -> LinearBounds:
    pending = dict(functions)
    total: Tensor | float = 0.0
    for call in reversed(record.calls):
        coefficients = pending.pop(call.index, None)
        if coefficients is None:
            continue
        if observe is not None and call.function in RELAXATIONS:
            observe(call, coefficients)
        if call.function in RELAXATIONS and call.index not in lines:
            lines[call.index] = _relaxation(call, record)
        line, slope = lines.get(call.index), (slopes or {}).get(call.index)
        contributions, constant = _pulled(call, coefficients, record.boxes, line, slope)
        total = total + constant
        if record.slack is not None:
            total = total - dot(magnitude(coefficients), record.slack[call.index])
        for ref, part in contributions:
            pending[ref.index] = added(pending[ref.index], part) if ref.index in pending else part
    coefficients = pending.get(0)
    if not isinstance(total, Tensor):  # functions of the input itself
        total = flattened(dense(next(iter(functions.values()))), 2).sum(2) * 0
    return LinearBounds(coefficients, total, record.boxes[0], record.covers_rounding)


def _relaxation(call: Call, record: Record) -> LinearRelaxation:
    (ref,) = leaves(call.args, Ref)
    return RELAXATIONS[call.function](record.boxes[ref.index], *call.args[1:])


def _pulled(
    call: Call, a: Coefficients, boxes: Mapping[int, Box], line: LinearRelaxation | None, slope: Tensor | None
) -> tuple[Contributions, Tensor]:
    """What `a`, of the call's value, is of the values before it, and the constants (B, R)."""
    if line is not None:
        return _elementwise(call, a, boxes, line, slope)
    if not call.affine and call.function in PARAMETRIZED:
        return PARAMETRIZED[call.function](call, dense(a), boxes, slope)
    if isinstance(a, Patches):
        rule = patches.RULES.get(call.function)
        found = None if rule is None else rule(call, a, boxes)
        return _pulled(call, a.dense(), boxes, line, slope) if found is None else found
    if call.function in RULES:
        return RULES[call.function](call, a, boxes)
    if call.affine:
        return _affine(call, a, boxes)
    raise UnsupportedOperation(f"{call.where} has no linear relaxation; methods that support it: ibp")


def _elementwise(
    call: Call, a: Coefficients, boxes: Mapping[int, Box], line: LinearRelaxation, slope: Tensor | None
) -> tuple[Contributions, Tensor]:
    (ref,) = leaves(call.args, Ref)
    if slope is None:
        pulled, constant = through(line, a)
        return [(ref, pulled)], constant
    free = FREE_SLOPES[call.function](boxes[ref.index], *call.args[1:])
    slope = slope.clamp(free.low[:, None], free.high[:, None])
    a = dense(a)
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    constant = dot(negative, line.upper_offset)
    if (offset := free.offset(slope)) is not None:
        constant = constant + flattened(positive * offset, 2).sum(2)
    return [(ref, positive * slope + negative * line.upper_slope[:, None])], constant
