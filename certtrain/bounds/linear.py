"""Backward linear relaxations: CROWN-IBP, CROWN, alpha-CROWN, and the fused cross-entropy.

Lower bounds of linear functions of a network's values, A·v, are pulled back through the network one operation at a
time until they are linear in the input, where a box gives their minimum. (Zhang et al. 2018, arXiv 1811.00866.)
Only lower bounds appear: an upper bound is a lower bound of the negative. Coefficients A have shape (B, R, ...): R
functions for each of B images. The rules come in three families:

affine       by its transpose; autograd's vector-Jacobian product knows every one of them
elementwise  where A > 0 by a line below the function, where A < 0 by a line above it
max pooling  by the input that is largest at least, or by a constant
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.interval import MONOTONE, RULES, Bounds, Record
from certtrain.bounds.margins import merged_margins
from certtrain.bounds.tracing import AFFINE, Call, Ref, leaves, map_leaves, scale_shift
from certtrain.errors import UnsupportedOperation

TINY = 1e-30
Slopes = Mapping[int, Tensor]  # by call: slope of the line below, (B, 1 or R, ...)


# --- elementwise functions: a line below and a line above -------------------------------------------------------------


class Lines(NamedTuple):
    """lower_slope·x + lower_offset <= f(x) <= upper_slope·x + upper_offset on a box; tensors of the box's shape."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


def _leaky_relu_lines(x: Box, negative_slope: float = 0.01) -> Lines:
    """Above: the chord. Below: through 0, with slope 1 where upper > -lower, else `negative_slope`."""
    below, above = x.lower.clamp(max=0), x.upper.clamp(min=0)
    chord = (above - negative_slope * below) / (above - below).clamp(min=TINY)
    slope = torch.where(x.lower >= 0, 1.0, torch.where(x.upper <= 0, negative_slope, chord))
    steeper = torch.where(x.upper > -x.lower, torch.ones_like(slope), negative_slope)
    unstable = unstable_relus(x)
    return Lines(
        torch.where(unstable, steeper, slope),
        torch.zeros_like(slope),
        slope,
        torch.where(unstable, above - slope * above, 0.0),
    )


def _relu_lines(x: Box) -> Lines:
    return _leaky_relu_lines(x, 0.0)


def unstable_relus(x: Box) -> Tensor:
    return (x.lower < 0) & (x.upper > 0)


def _s_shaped(function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> Callable[[Box], Lines]:
    """Lines for an increasing function, convex left of 0 and concave right of it, with f(x) = 2 f(0) - f(-x)."""

    def below(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of a tangent at some d <= 0 that is still below at `upper`; of the chord if none is."""

        def tangent_is_below(d: Tensor) -> Tensor:
            return function(d) + derivative(d) * (upper - d) <= function(upper)

        # The tangent's value at `upper` grows with d; `near` is the largest d, from below, at which it is low enough.
        near, far = lower.clamp(max=0), upper.clamp(max=0)
        for _ in range(40):
            middle = (near + far) / 2
            low_enough = tangent_is_below(middle)
            near, far = torch.where(low_enough, middle, near), torch.where(low_enough, far, middle)
        touching = torch.where(upper <= 0, (lower + upper) / 2, near).detach()
        width = upper - lower
        chord = torch.where(
            width > 1e-6,
            (function(upper) - function(lower)) / width.clamp(min=1e-6),
            torch.minimum(derivative(lower), derivative(upper)),
        )
        tangent = (lower < 0) & tangent_is_below(touching)
        slope = torch.where(tangent, derivative(touching), chord)
        point = torch.where(tangent, touching, lower)
        return slope, function(point) - slope * point

    def lines(x: Box) -> Lines:
        lower_slope, lower_offset = below(x.lower, x.upper)
        upper_slope, mirrored_offset = below(-x.upper, -x.lower)
        return Lines(lower_slope, lower_offset, upper_slope, 2 * function(torch.zeros_like(x.lower)) - mirrored_offset)

    return lines


def _sigmoid_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _tanh_derivative(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


LINES: dict[Callable, Callable[..., Lines]] = {
    F.relu: _relu_lines,
    F.leaky_relu: _leaky_relu_lines,
    torch.sigmoid: _s_shaped(torch.sigmoid, _sigmoid_derivative),
    torch.tanh: _s_shaped(torch.tanh, _tanh_derivative),
}


# --- rules: coefficients of an operation's result into coefficients of its inputs -----------------------------------

Contributions = list[tuple[Ref, Tensor]]


def _dot(coefficients: Tensor, values: Tensor) -> Tensor:
    """(B, R, ...) · (B, ...) -> (B, R)."""
    return torch.einsum("brn,bn->br", coefficients.flatten(2), values.flatten(1))


def _affine(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    refs = leaves((call.args, call.kwargs), Ref)
    zeros = [torch.zeros_like(boxes[ref.index].like) for ref in refs]

    def function(*values: Tensor) -> Tensor:
        remaining = iter(values)
        args, kwargs = map_leaves((call.args, call.kwargs), Ref, lambda _: next(remaining))
        return call.function(*args, **kwargs)

    constant, pull_back = torch.func.vjp(function, *zeros)
    parts = torch.func.vmap(pull_back, in_dims=1, out_dims=1)(a)
    return list(zip(refs, parts, strict=True)), _dot(a, constant)


def _reshaped(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    """Elements keep their order."""
    (ref,) = leaves((call.args, call.kwargs), Ref)
    return [(ref, a.reshape(*a.shape[:2], *boxes[ref.index].shape[1:]))], a.new_zeros(a.shape[:2])


def _scaled(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    ref, scale, shift = call.args
    return [(ref, a * scale[:, None])], _dot(a, shift.expand(boxes[call.index].shape))


def _sum(sign: int) -> Callable[..., tuple[Contributions, Tensor]]:
    """x + y or x - y, of two values or of a value and a constant."""

    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        shape = boxes[call.index].shape
        refs = [argument for argument in call.args if isinstance(argument, Ref)]
        if call.kwargs or any(boxes[ref.index].shape != shape for ref in refs):
            return _affine(call, a, boxes)
        contributions, constant = [], a.new_zeros(a.shape[:2])
        for argument, factor in zip(call.args, (1, sign), strict=True):
            if isinstance(argument, Ref):
                contributions.append((argument, factor * a))
            else:
                shift = torch.as_tensor(factor * argument, dtype=a.dtype, device=a.device)
                constant = constant + _dot(a, shift.expand(shape))
        return contributions, constant

    return rule


def _linear(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    x, weight, bias = _weighted_arguments(*call.args, **call.kwargs)[:3]
    return [(x, a @ weight)], (a * bias).flatten(2).sum(2) if bias is not None else a.new_zeros(a.shape[:2])


def _conv(input_gradient: Callable[..., Tensor]) -> Callable[..., tuple[Contributions, Tensor]]:
    def rule(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
        x, weight, bias, stride, padding, dilation, groups = _weighted_arguments(*call.args, **call.kwargs)
        if isinstance(padding, str):
            return _affine(call, a, boxes)
        shape = boxes[x.index].shape
        rows = a.flatten(0, 1)
        pulled = input_gradient((len(rows), *shape[1:]), weight, rows, stride, padding, dilation, groups)
        constant = a.new_zeros(a.shape[:2]) if bias is None else a.flatten(3).sum(3) @ bias
        return [(x, pulled.unflatten(0, a.shape[:2]))], constant

    return rule


def _weighted_arguments(
    x: Ref,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    return x, weight, bias, stride, padding, dilation, groups


def _max_pool(call: Call, a: Tensor, boxes: Mapping[int, Box]) -> tuple[Contributions, Tensor]:
    """Below: the input whose lower bound is largest. Above: that one where it exceeds all others, else a constant."""
    ref, *arguments = _pool_arguments(*call.args, **call.kwargs)
    lower, upper = boxes[ref.index].lower, boxes[ref.index].upper
    if call.function is F.max_pool1d:
        lower, upper, a = lower[:, :, None], upper[:, :, None], a[..., None, :]
        arguments = [(neutral, *_tuple(value, 1)) for value, neutral in zip(arguments, (1, 1, 0, 1), strict=True)]
    kernel, stride, padding, dilation = arguments
    ceil_mode = _ceil_mode(*call.args, **call.kwargs)
    largest, chosen = F.max_pool2d(lower, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    exceeds = torch.zeros_like(largest, dtype=torch.bool)
    if not ceil_mode:
        exceeds = largest >= _largest_other(upper.detach(), chosen, kernel, stride, padding, dilation)
    follows = exceeds[:, None] | (a > 0)
    target = a.new_zeros(*a.shape[:3], lower.shape[2:].numel())
    indices = chosen.flatten(2)[:, None].expand(-1, a.shape[1], -1, -1)
    pulled = target.scatter_add(3, indices, torch.where(follows, a, 0.0).flatten(3))
    ceiling = F.max_pool2d(upper, kernel, stride, padding, dilation, ceil_mode)
    constant = _dot(torch.where(follows, 0.0, a), ceiling)
    return [(ref, pulled.view(*a.shape[:2], *boxes[ref.index].shape[1:]))], constant


def _pool_arguments(
    x: Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *_: Any, **__: Any
) -> tuple[Any, ...]:
    return x, kernel_size, stride or kernel_size, padding, dilation


def _ceil_mode(x: Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> bool:  # fmt: skip
    return ceil_mode


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value)


def _largest_other(upper: Tensor, chosen: Tensor, *pooling: Any) -> Tensor:
    """The largest upper bound in each window, the chosen input left out; windows may overlap."""
    kernel, stride, padding, dilation = (_tuple(value, 2) for value in pooling)

    def windows(x: Tensor) -> Tensor:
        return F.unfold(x, kernel, dilation, padding, stride).view(*x.shape[:2], -1, *chosen.shape[2:])

    numbers = torch.arange(1, 1 + upper.shape[2:].numel(), device=upper.device, dtype=torch.float64)
    numbers = windows(numbers.view(1, 1, *upper.shape[2:]))  # 0 where a window reaches into the padding
    left_out = (numbers == 0) | (numbers == 1 + chosen[:, :, None])
    return windows(upper).masked_fill(left_out, -torch.inf).amax(2)


BACKWARD: dict[Callable, Callable[..., tuple[Contributions, Tensor]]] = {
    **{function: _affine for function in (*AFFINE, scale_shift, torch.cat, F.pad) if function in RULES},
    **{function: _reshaped for function in (torch.flatten, Tensor.reshape, Tensor.contiguous, Tensor.unflatten)},
    scale_shift: _scaled,
    torch.add: _sum(1),
    torch.sub: _sum(-1),
    F.linear: _linear,
    F.conv1d: _conv(torch.nn.grad.conv1d_input),
    F.conv2d: _conv(torch.nn.grad.conv2d_input),
    F.max_pool1d: _max_pool,
    F.max_pool2d: _max_pool,
}
NONLINEAR = {*MONOTONE, F.leaky_relu} - {F.pad}


# --- the backward pass ----------------------------------------------------------------------------------------------


def lower_bounds(record: Record, index: int, a: Tensor, slopes: Slopes | None = None) -> Tensor:
    """Lower bounds (B, R) of the functions `a` (B, R, ...) of the value at `index`, over the input box.

    `slopes` replaces the slope of the line below, call by call, where a ReLU is unstable.
    """
    pending: dict[int, Tensor] = {index: a}
    total = a.new_zeros(a.shape[:2])
    for call in reversed(record.calls):
        coefficients = pending.pop(call.index, None)
        if coefficients is None:
            continue
        if call.function in LINES and not _is_concave(call):
            contributions, constant = _elementwise(call, coefficients, record.boxes, (slopes or {}).get(call.index))
        elif call.function in BACKWARD:
            contributions, constant = BACKWARD[call.function](call, coefficients, record.boxes)
        else:
            raise UnsupportedOperation(f"{call.where} has no linear relaxation; methods that support it: ibp")
        total = total + constant
        for ref, part in contributions:
            pending[ref.index] = pending[ref.index] + part if ref.index in pending else part
    box, coefficients = record.boxes[0], pending.get(0)
    if coefficients is None:
        return total
    return total + _dot(coefficients, box.center) - _dot(coefficients.abs(), box.radius)


def _is_concave(call: Call) -> bool:
    """A leaky ReLU with a slope above 1, whose chord lies below it."""
    return call.function is F.leaky_relu and _negative_slope(*call.args, **call.kwargs) > 1


def _elementwise(call: Call, a: Tensor, boxes: Mapping[int, Box], slope: Tensor | None) -> tuple[Contributions, Tensor]:
    (ref,) = leaves(call.args, Ref)
    lines = LINES[call.function](boxes[ref.index], *call.args[1:], **call.kwargs)
    lower_slope = lines.lower_slope[:, None]
    if slope is not None:
        lower_slope = torch.where(unstable_relus(boxes[ref.index])[:, None], slope, lower_slope)
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    pulled = positive * lower_slope + negative * lines.upper_slope[:, None]
    return [(ref, pulled)], _dot(positive, lines.lower_offset) + _dot(negative, lines.upper_offset)


# --- what is asked of it --------------------------------------------------------------------------------------------


def margin_rows(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """(B, K, K): row j of image b is z_y - z_j, a row of zeros for j = y."""
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    return eye[labels][:, None, :] - eye


def crown_margins(bounds: Bounds, labels: Tensor, slopes: Slopes | None = None) -> Tensor:
    """Margins (B, K) by one backward pass, on the boxes that `bounds` recorded. (CROWN-IBP if those are IBP's.)"""
    record = bounds.record
    output = record.boxes[record.output]
    return lower_bounds(record, record.output, margin_rows(labels, output.shape[1], output.like), slopes)


def fused_cross_entropy(
    bounds: Bounds, labels: Tensor, share: Tensor | float = 1.0, differences: Box | None = None
) -> Tensor:
    """Upper bounds (B,) of the cross-entropy by one backward row instead of K. (Xu et al. 2020, "loss fusion".)

    The cross-entropy is log Σ_j exp(z_j - z_y). Each exponential lies below its chord over `differences`, and the
    chords' sum is one linear function of the logits.

    Args:
        bounds: of a joint pass that was recorded.
        share: β; the result is log(β·CROWN-IBP + (1 - β)·IBP).
        differences: (B, K) boxes of z_j - z_y; by default IBP's, the last affine operations merged.
    """
    record = bounds.record
    if differences is None:
        margins = merged_margins(bounds.tail, bounds.tail_input, labels)
        differences = Box(-margins.upper, -margins.lower)
    shift = differences.upper.amax(1, keepdim=True).detach()  # exp(x - shift) cannot overflow
    low, high = (differences.lower - shift).exp(), (differences.upper - shift).exp()
    chord = (high - low) / (differences.upper - differences.lower).clamp(min=1e-8)
    row = -chord.scatter_add(1, labels[:, None], -chord.sum(1, keepdim=True))
    offsets = (low - chord * differences.lower).sum(1)
    relaxed = offsets - lower_bounds(record, record.output, row[:, None])[:, 0]
    return (share * relaxed + (1 - share) * high.sum(1)).log() + shift[:, 0]


def tightened(record: Record, rows_at_once: int, intersect: bool = True) -> Record:
    """The record with the boxes that enter nonlinear operations recomputed by backward passes, first to last (CROWN).

    Args:
        rows_at_once: bound on R in a backward pass, for memory.
        intersect: keep the cheaper box where it is tighter, and ask only about neurons it leaves unstable; otherwise
            every neuron's box is the backward pass's own.
    """
    boxes: dict[int, Box] = {0: record.boxes[0]}
    done: set[int] = {0}
    for position, call in enumerate(record.calls):
        if call.function in NONLINEAR:
            for ref in leaves(call.args, Ref):
                if ref.index not in done:
                    before = replace(record, calls=record.calls[:position], boxes=boxes)
                    boxes[ref.index] = _tightened_box(before, ref.index, call, rows_at_once, intersect)
                    done.add(ref.index)
        args, kwargs = map_leaves((call.args, call.kwargs), Ref, lambda ref: boxes[ref.index])
        boxes[call.index] = RULES[call.function](*args, **kwargs)
        if call.function in LINES:
            done.add(call.index)  # the image of a tight box: a backward pass through the lines cannot be tighter
    return replace(record, boxes=boxes)


def _tightened_box(record: Record, index: int, call: Call, rows_at_once: int, intersect: bool) -> Box:
    box = record.boxes[index]
    lower, upper = box.lower.flatten(1).clone(), box.upper.flatten(1).clone()
    needed = _undecided(box, call).flatten(1).any(0) if intersect else torch.ones_like(lower[0], dtype=torch.bool)
    for neurons in needed.nonzero()[:, 0].split(max(1, rows_at_once // 2)) if needed.any() else ():
        rows = torch.zeros(len(neurons), lower.shape[1], dtype=lower.dtype, device=lower.device)
        rows.scatter_(1, neurons[:, None], 1.0)
        both = torch.cat([rows, -rows]).view(1, -1, *box.shape[1:]).expand(len(lower), *[-1] * box.like.dim())
        low, negative_high = lower_bounds(record, index, both).split(len(neurons), 1)
        high = -negative_high
        if intersect:
            low, high = torch.maximum(low, lower[:, neurons]), torch.minimum(high, upper[:, neurons])
        lower[:, neurons], upper[:, neurons] = low, high
    return Box(lower.view(box.shape), upper.view(box.shape))


def _undecided(box: Box, call: Call) -> Tensor:
    if call.function in (F.relu, F.leaky_relu):
        return unstable_relus(box)
    return box.upper > box.lower


@dataclass(frozen=True)
class AlphaOptions:
    """How alpha-CROWN optimises slopes: steps of Adam at a rate that decays, images leaving as soon as proved."""

    steps: int = 20
    lr: float = 0.2
    decay: float = 0.97


def alpha_margins(bounds: Bounds, labels: Tensor, options: AlphaOptions) -> Tensor:
    """Margins (B, K), the best met while the slopes below unstable ReLUs are optimised, per image and margin.

    (Xu et al. 2021, arXiv 2011.13824.) With zero steps, `crown_margins`. Carries no gradient.
    """
    with torch.no_grad():
        best = crown_margins(bounds, labels)
    record = bounds.record.detach()
    relus = [call for call in record.calls if call.function in (F.relu, F.leaky_relu)]
    left = _open(best).nonzero()[:, 0]
    slopes: dict[int, Tensor] = {}
    for call in relus if options.steps and len(left) else []:
        (ref,) = leaves(call.args, Ref)
        start = LINES[call.function](record.boxes[ref.index], *call.args[1:], **call.kwargs).lower_slope
        slopes[call.index] = start[:, None].repeat(1, best.shape[1], *[1] * (start.dim() - 1)).requires_grad_()
    if not slopes:
        return best
    least = {call.index: _negative_slope(*call.args, **call.kwargs) if call.function is F.leaky_relu else 0.0
             for call in relus}  # fmt: skip
    optimizer = torch.optim.Adam(slopes.values(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.decay)
    for _ in range(options.steps):
        with torch.enable_grad():
            margins = crown_margins(replace(bounds, record=record), labels, slopes)
            optimizer.zero_grad()
            (-margins[_open(best)].sum()).backward(inputs=list(slopes.values()))
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for index, slope in slopes.items():
                slope.clamp_(least[index], 1.0)
        best = torch.where(_open(best)[:, None], torch.maximum(best, margins.detach()), best)
        if not _open(best).any():
            break
    return best


def _negative_slope(x: Ref, negative_slope: float = 0.01) -> float:
    return negative_slope


def _open(margins: Tensor) -> Tensor:
    """(B,) bool: not proved."""
    return (margins > 0).sum(1) < margins.shape[1] - 1
