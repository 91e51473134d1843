"""What comes out of an operation on one value in a deployed arithmetic, of any values in a box. docs/soundness.md.

Sums and comparisons of two values are here as well; products of two are in `attention.py`, all rules in `table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds import interval
from certtrain.bounds.box import Box
from certtrain.bounds.operations.pooling import COPYING, resize
from certtrain.bounds.operations.products import einsum_subscripts
from certtrain.bounds.rounding.arithmetic import (
    ARITHMETICS,
    COEFFICIENT_ROUNDINGS,
    LARGEST_FACTOR,
    PLACE_ERROR,
    Arithmetic,
    elementwise_error,
    inflation,
    sum_error,
)
from certtrain.bounds.rounding.boxes import OutwardBox, unbounded_unless, widened
from certtrain.bounds.shapes import flattened, per_channel, per_image
from certtrain.errors import UnsupportedOperation, UsageError
from certtrain.per_axis import per_axis

Rule = Callable[..., OutwardBox]


@dataclass(frozen=True)
class Sum:
    """The sums of products that made a value, as far as a BatchNorm that is folded into them must know.

    terms: products in each; foldings: BatchNorms that follow in all; largest: (B,) no less than |x| of any of its
    inputs; weight: no less than Σ|w| of any sum, and bias than |b|, the BatchNorms so far included; done: how many
    those are.
    """

    terms: int
    foldings: int
    largest: Tensor
    weight: Tensor
    bias: Tensor
    done: int = 0


def weighted(function: Callable[..., Tensor]) -> Rule:
    def rule(
        a: Arithmetic, x: OutwardBox, weight: Tensor, bias: Tensor | None, *settings: Any, foldings: int = 1
    ) -> OutwardBox:
        terms = terms_of(function, weight)
        error, magnitude = sum_error(a, terms, foldings), x.magnitude
        if bias is None:
            bias = weight.new_zeros(_out_channels(function, weight, settings))
        underflow, fits = sum_range(a, terms, weight.abs().sum(), bias, magnitude)
        center = function(x.center, weight, bias, *settings)
        reach = function(x.radius + error * magnitude, weight.abs(), error * bias.abs(), *settings)
        return _within_range(center, reach, underflow, fits, terms)

    return rule


def matmul_terms(x: Any, y: Any) -> int:
    """Products in one sum."""
    return int(x.shape[-1])


def einsum_terms(x: Any, y: Any, equation: str) -> int:
    """Products in one sum, where letters are summed over that one operand alone has, too.

    Both operands' own would be two more results that are stored, which `sum_error` does not count.
    """
    subscripts, output = einsum_subscripts(equation)
    one, other = map(set, subscripts)
    if one - other - set(output) and other - one - set(output):
        raise UnsupportedOperation(
            f"einsum {equation!r} sums in each factor alone, which has no sound rule: sum before"
        )
    sizes: dict[str, int] = {}
    for term, part in zip(subscripts, (x, y), strict=True):
        sizes |= zip(term, part.shape, strict=True)
    return math.prod(size for letter, size in sizes.items() if letter not in output)


def product_with_constant(function: Callable[..., Tensor], terms_of: Callable[..., int]) -> Rule:
    """A matrix product with a constant, on either side."""

    def rule(a: Arithmetic, x: Any, y: Any, *settings: Any) -> OutwardBox:
        box, matrix = (x, y) if isinstance(x, OutwardBox) else (y, x)

        def with_matrix(part: Tensor, factor: Tensor) -> Tensor:
            return function(*((part, factor) if box is x else (factor, part)), *settings)

        terms, sizes, magnitude = terms_of(x, y, *settings), matrix.abs(), box.magnitude
        error = sum_error(a, terms)
        norm = terms * sizes.amax()  # einsum sums what one factor has alone before it meets the other
        underflow, fits = sum_range(a, terms, norm.clamp(min=terms), norm, magnitude)
        center = with_matrix(box.center, matrix)
        reach = with_matrix(box.radius + error * magnitude, sizes)
        return _within_range(center, reach, underflow, fits, terms)

    return rule


def sum_range(a: Arithmetic, terms: int, norm: Tensor, bias: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """What underflows can cost any sum of an image, and whether no part of any of them can overflow: (B,) each.

    norm: no less than Σ|w| of any of them.
    """
    largest = largest_of(magnitude)
    underflow = 8 * a.tiny * (2 * terms + 2 + norm + terms * largest)
    return underflow, 2 * (norm * largest + bias.abs().amax()) <= a.largest


def _within_range(center: Tensor, reach: Tensor, underflow: Tensor, fits: Tensor, terms: int) -> OutwardBox:
    """Sums around `center`, but for `reach` and what underflows cost; all reals where one may overflow."""
    radius = (reach + per_image(underflow, center)) * inflation(terms)
    return OutwardBox.around(center, torch.where(per_image(fits, center), radius, torch.inf))


def terms_of(function: Callable[..., Tensor], weight: Tensor) -> int:
    """Products in one sum of a linear map."""
    if function in (F.conv_transpose1d, F.conv_transpose2d):
        return weight.shape[0] * math.prod(weight.shape[2:])
    return math.prod(weight.shape[1:])


def _out_channels(function: Callable[..., Tensor], weight: Tensor, settings: tuple[Any, ...]) -> int:
    if function not in (F.conv_transpose1d, F.conv_transpose2d):
        return weight.shape[0]
    return weight.shape[1] * settings[3]


def largest_of(magnitude: Tensor) -> Tensor:
    """(B,): the largest in each image."""
    return flattened(magnitude, 1).amax(1)


def batch_norm_scaling(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a BatchNorm in eval mode, by the roundings that eq. 7 counts."""
    scale = torch.rsqrt(variance + eps) * (1.0 if weight is None else weight)
    return scale, (0.0 if bias is None else bias) - mean * scale


def batch_norm(
    a: Arithmetic,
    x: OutwardBox,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    preceding: Sum | None,
) -> tuple[OutwardBox, Sum | None]:
    """Eq. 7: in any of the usual orders, or folded into the sums before it.

    Returns the box, and those sums with this BatchNorm folded into them.
    """
    if training:
        raise UsageError("sound bounds are those of a network in eval mode: call model.eval()")
    weight = torch.ones_like(variance) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    known = _is_harmless(variance + eps) & (variance >= 0) & (eps >= 0)  # a difference has a greater relative error
    known = known & _is_small(batch_norm_scaling(mean, variance, weight, bias, eps)[0], weight, mean, bias)
    mean, weight, bias = (torch.where(known, each, 0.0) for each in (mean, weight, bias))
    scale, shift = batch_norm_scaling(mean, torch.where(known, variance, 1.0), weight, bias, eps)
    parameters = mean.abs() * scale.abs() + bias.abs()
    losses: Tensor | float = 0.0
    folded = None
    if preceding is not None:
        most = scale.abs().amax()
        folded = replace(
            preceding,
            weight=preceding.weight * most,
            bias=preceding.bias * most + parameters.amax(),
            done=preceding.done + 1,
        )
        met = preceding.weight + preceding.bias + mean.abs().amax() + bias.abs().amax()
        losses = per_image(_folding_losses(a, preceding, folded, met), x.like)
    scale, shift, parameters, mean, known = (
        per_channel(each, x.like.dim()) for each in (scale, shift, parameters, mean, known)
    )
    moved = OutwardBox.around(torch.addcmul(shift, x.center, scale), x.radius * scale.abs())
    magnitude = scale.abs() * x.magnitude + parameters
    # What is centred first meets the weight, or the reciprocal of the root, before it meets the other.
    entering = x.magnitude + mean.abs()
    moved = unbounded_unless(known & (2 * LARGEST_FACTOR * entering <= a.largest), moved)
    moved = widened(moved, elementwise_error(a, COEFFICIENT_ROUNDINGS), magnitude, a, losses=_flushed(a, entering))
    terms, foldings = (1, 1) if preceding is None else (preceding.terms, preceding.foldings)
    return widened(moved, sum_error(a, terms, foldings), parameters, a, losses=losses), folded


def _folding_losses(a: Arithmetic, preceding: Sum, folded: Sum, met: Tensor) -> Tensor:
    """(B,): what underflows of folded weights, and of what they are multiplied by, cost as they meet the inputs.

    Infinite where a folded sum may overflow. met: no less than what meets the BatchNorm's weight as it is folded,
    perhaps before the root of its variance.
    """
    lost = 8 * folded.terms * LARGEST_FACTOR**folded.done * a.tiny * (1 + folded.largest)
    lost = lost + _flushed(a, preceding.weight * folded.largest + preceding.bias)
    largest = torch.maximum(folded.weight * (1 + folded.largest) + folded.bias, LARGEST_FACTOR * met)
    return torch.where(2 * largest <= a.largest, lost, torch.inf)


def _is_harmless(value: Tensor) -> Tensor:
    """Far enough from underflow and overflow that quotients by it, and its root, are normal numbers."""
    return (value.abs() > 1 / LARGEST_FACTOR) & _is_small(value)


def _is_small(*values: Tensor) -> Tensor:
    return reduce(torch.logical_and, [value.abs() < LARGEST_FACTOR for value in values])


def _flushed(a: Arithmetic, magnitude: Tensor) -> Tensor:
    """What factors lose that are too small to be normal numbers, by underflow or flushed to zero, as they meet values.

    A factor has at most `COEFFICIENT_ROUNDINGS` of them; each loses one `tiny`, times what else it is multiplied by.
    """
    return 8 * COEFFICIENT_ROUNDINGS * LARGEST_FACTOR * a.tiny * magnitude


def leaky_relu(a: Arithmetic, x: OutwardBox, negative_slope: float) -> OutwardBox:
    if not 0 <= negative_slope <= 1:
        raise UnsupportedOperation(f"LeakyReLU with negative_slope={negative_slope} has no sound rule")
    ends = OutwardBox(F.leaky_relu(x.lower, negative_slope), F.leaky_relu(x.upper, negative_slope))
    return widened(ends, elementwise_error(a, 2), x.magnitude, a, losses=_flushed(a, x.magnitude))


def prelu(a: Arithmetic, x: OutwardBox, weight: Tensor) -> OutwardBox:
    small = _is_small(weight)
    found = interval.RULES[F.prelu](x, torch.where(small, weight, 0.0))
    known, sizes = (per_channel(each, x.like.dim()) for each in (small, weight.abs().clamp(min=1)))
    ends = unbounded_unless(known, OutwardBox.by_ends(found))
    return widened(ends, elementwise_error(a, 4), x.magnitude * sizes, a, losses=_flushed(a, x.magnitude))


def clamped(function: Callable[..., Tensor]) -> Rule:
    """Between two ends, each of which is rounded as it is stored."""

    def rule(a: Arithmetic, x: OutwardBox, lower: float | None, upper: float | None) -> OutwardBox:
        ends = monotone(function)(a, x, lower, upper)
        most = max(abs(end) for end in (lower, upper) if end is not None)
        return widened(ends, elementwise_error(a, 1), torch.full_like(ends.center, most), a)

    return rule


def absolute(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    return OutwardBox.by_ends(interval.RULES[torch.abs](x))


def extremum(function: Callable[..., Tensor]) -> Rule:
    """Of two values, or of a value and a constant, which is rounded as it is stored."""

    def rule(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
        found = interval.RULES[function](x, y)
        ends = OutwardBox.by_ends(found)
        constants = [value.abs() for value in (x, y) if not isinstance(value, Box)]
        if not constants:
            return ends
        return widened(ends, elementwise_error(a, 1), constants[0].expand_as(ends.like), a)

    return rule


def root(function: Callable[..., Tensor]) -> Rule:
    """Roots and reciprocals, correctly rounded or off by two units in the last place, of values that are above 0."""

    def rule(a: Arithmetic, x: OutwardBox) -> OutwardBox:
        known = x.lower > 1 / LARGEST_FACTOR
        found = interval.RULES[function](Box(*(torch.where(known, end, 1.0) for end in (x.lower, x.upper))))
        ends = unbounded_unless(known, OutwardBox.by_ends(found))
        return widened(ends, elementwise_error(a, 4), found.upper, a)

    return rule


def hard(function: Callable[..., Tensor], magnitude: Callable[[Tensor], Tensor]) -> Rule:
    """(x + 3) / 6 between 0 and 1, or x times that; `magnitude`, of |x|: no less than what is combined."""

    def rule(a: Arithmetic, x: OutwardBox) -> OutwardBox:
        found = interval.RULES[function](x)
        return widened(OutwardBox.by_ends(found), elementwise_error(a, 6), magnitude(x.magnitude), a)

    return rule


def resized(
    a: Arithmetic,
    x: OutwardBox,
    size: Any,
    scale_factor: Any,
    mode: str,
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
) -> OutwardBox:
    """Copies, of one of two neighbours where the place of the nearest is itself rounded."""
    if mode not in COPYING:
        raise UnsupportedOperation(f"mode={mode!r} has no sound rule: its rounding errors are not known")
    settings = (size, scale_factor, mode, align_corners, recompute_scale_factor)
    sizes = resize(x.like, *settings).shape[2:]
    factors = scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor] * len(sizes)
    lower, upper = x.lower, x.upper
    for axis, (after, factor) in enumerate(zip(sizes, factors, strict=True), start=2):
        before = lower.shape[axis]
        step = before / after if factor is None or recompute_scale_factor else 1 / factor
        places = torch.arange(after, dtype=torch.float64, device=lower.device) + (mode == "nearest-exact") / 2
        near, far = (
            (places * step * (1 + error)).floor().long().clamp(0, before - 1) for error in (-PLACE_ERROR, PLACE_ERROR)
        )
        lower = torch.minimum(lower.index_select(axis, near), lower.index_select(axis, far))
        upper = torch.maximum(upper.index_select(axis, near), upper.index_select(axis, far))
    return OutwardBox(lower, upper)


def add(a: Arithmetic, x: Any, y: Any, alpha: float = 1) -> OutwardBox:
    """A constant is rounded as it is stored, and so is alpha; then come its product and the sum."""
    if alpha and not _is_harmless(torch.tensor(float(alpha), dtype=torch.float64)):
        raise UnsupportedOperation(f"alpha={alpha} has no sound rule")
    boxes = [(value, factor) for value, factor in ((x, 1.0), (y, abs(alpha))) if isinstance(value, Box)]
    center = _center(x) + alpha * _center(y)
    radius = reduce(torch.add, [factor * box.radius for box, factor in boxes]).expand_as(center)
    magnitude = _magnitude(x) + abs(alpha) * _magnitude(y)
    roundings = 2 if alpha == 1 or alpha == -1 else 4
    return widened(OutwardBox.around(center, radius), elementwise_error(a, roundings), magnitude, a)


def neg(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    return OutwardBox.around(-x.center, x.radius)


def mul(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
    box, factor = (x, y) if isinstance(x, OutwardBox) else (y, x)
    factor = _as_constant(factor, box)
    return _scaled(a, box, factor, _is_small(factor), torch.mul)


def div(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
    divisor = _as_constant(y, x)
    return _scaled(a, x, divisor, _is_harmless(divisor), torch.div)


def _as_constant(value: Any, box: OutwardBox) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=box.like.device)


def _scaled(
    a: Arithmetic, x: OutwardBox, factor: Tensor, known: Tensor, operation: Callable[..., Tensor]
) -> OutwardBox:
    factor = torch.where(known, factor, 1.0)
    moved = OutwardBox.around(operation(x.center, factor), operation(x.radius, factor.abs()))
    magnitude = operation(x.magnitude, factor.abs())
    moved = unbounded_unless(known, moved)
    return widened(moved, elementwise_error(a, 4), magnitude, a, losses=_flushed(a, x.magnitude))


def averaging(function: Callable[..., Tensor], window: Callable[..., int]) -> Rule:
    """Sums and means: products with one constant, of `window(x, *settings)` terms, which may be added first."""

    def rule(a: Arithmetic, x: OutwardBox, *settings: Any) -> OutwardBox:
        terms = window(x.like, *settings)
        center, radius = function(x.center, *settings), function(x.radius, *settings)
        magnitude = function(x.magnitude, *settings) * inflation(terms)
        moved = OutwardBox.around(center, radius * inflation(terms))
        moved = widened(moved, sum_error(a, terms + 2), magnitude, a, terms)
        fits = 2 * terms * largest_of(x.magnitude) <= a.largest
        return OutwardBox.around(moved.center, torch.where(per_image(fits, center), moved.radius, torch.inf))

    return rule


def reduced_terms(x: Tensor, *settings: Any) -> int:
    return x.numel() // max(1, x.sum(*settings).numel())


def kernel_terms(x: Tensor, kernel_size: int | tuple[int, ...], *settings: Any) -> int:
    return math.prod(per_axis(kernel_size, x.dim() - 2))


def adaptive_terms(x: Tensor, output_size: Any) -> int:
    """Windows of adaptive pooling overlap; the whole image is no less than any of them."""
    return math.prod(x.shape[2:])


def exact(function: Callable[..., Tensor]) -> Rule:
    """Moves elements, or compares them: nothing is rounded."""
    return lambda a, x, *settings: x.map(lambda part: function(part, *settings))


def monotone(function: Callable[..., Tensor]) -> Rule:
    return lambda a, x, *settings: OutwardBox(function(x.lower, *settings), function(x.upper, *settings))


def pad(a: Arithmetic, x: OutwardBox, pad: Any, mode: str, value: float | None) -> OutwardBox:
    if value:
        raise UnsupportedOperation(f"padding with {value}, which is rounded, has no sound rule; zero has")
    return monotone(F.pad)(a, x, pad, mode, value)


def cast(a: Arithmetic, x: OutwardBox, dtype: torch.dtype | None) -> OutwardBox:
    if dtype is None:
        return x
    if a is ARITHMETICS["float64"] and dtype != torch.float64:
        raise UnsupportedOperation(f"a cast to {dtype} in a network of arithmetic float64 has no sound rule")
    return widened(x, elementwise_error(a, 1), x.magnitude, a)


def concatenated(a: Arithmetic, parts: Any, dim: int) -> OutwardBox:
    return OutwardBox.cat([part if isinstance(part, Box) else stored(a, part) for part in parts], dim)


def stored(a: Arithmetic, constant: Tensor) -> OutwardBox:
    """A constant as the deployed network has it, rounded as it is stored: a box of its shape."""
    point = OutwardBox.around(constant, torch.zeros_like(constant))
    return widened(point, elementwise_error(a, 1), constant.abs(), a)


def _center(value: Any) -> Any:
    return value.center if isinstance(value, Box) else value


def _magnitude(value: Any) -> Any:
    return value.magnitude if isinstance(value, OutwardBox) else abs(value)
