"""Interval bounds of what a network computes in floating point, whatever the order of its sums.

The rules of `interval.py` bound the network as real mathematics. These bound the *deployed* network: every value that
an `Arithmetic` can produce, for any order and parenthesisation of every sum, with fused multiply-adds or without, for
every input in the box. Everything here is computed in float64, whose own errors are bounded and added in the same way,
so that a positive margin is a theorem about the numbers that will be compared. docs/soundness.md has the derivation;
the equation numbers below are its.

The one idea: the computed sum of n products lies within e·Σ|w_i||x_i| of the exact one, where e grows like n roundings
(Higham, Accuracy and Stability of Numerical Algorithms, ch. 3). With |x_i| ≤ m_i over the box, that is a radius of
|w|·(r + e·m) instead of |w|·r: the same two products as without rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, reduce
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds import interval
from certtrain.bounds.attention import attend
from certtrain.bounds.batch_norm import SETTLED_BY_CLEAN
from certtrain.bounds.box import Box
from certtrain.bounds.graph import Call, Graph, Ref, Step, leaves, map_leaves
from certtrain.bounds.interval import Bounds
from certtrain.bounds.margins import no_nan
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.inspections import INSPECTED_ATTRIBUTES, INSPECTING_METHODS, INSPECTIONS, MAKERS
from certtrain.bounds.operations.joining import cat
from certtrain.bounds.operations.movement import cast
from certtrain.bounds.operations.pooling import COPYING
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.operations.record import OPERATIONS
from certtrain.bounds.tracing import Method, record_of
from certtrain.errors import UnsupportedOperation, UsageError, unknown
from certtrain.per_axis import per_axis


@dataclass(frozen=True)
class Arithmetic:
    """How a deployed network rounds.

    unit: relative error of one operation, and of an addition within a sum of products
    operands: relative error that the two operands of a product bring in together as they are rounded to its format
    stored: relative error of a result as it is written to memory, in addition to `unit`
    tiny: what an underflow, gradual or flushed to zero, can cost at most: the smallest normal number
    largest: the greatest finite number
    """

    unit: Fraction
    operands: Fraction
    stored: Fraction
    tiny: float
    largest: float


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


_FLOAT32_RANGE = (2.0**-126, 2.0**127)

ARITHMETICS: dict[str, Arithmetic] = {
    "float64": Arithmetic(_power(-53), Fraction(0), Fraction(0), 2.0**-1022, 2.0**1023),
    "float32": Arithmetic(_power(-24), Fraction(0), Fraction(0), *_FLOAT32_RANGE),
    # Operands lose all but ten bits, perhaps by truncation; the units that add them truncate as well.
    "tf32": Arithmetic(_power(-22), (1 + _power(-10)) ** 2 - 1, Fraction(0), *_FLOAT32_RANGE),
    # Weights and activations are kept in bfloat16 (rounded to nearest), sums and BatchNorm's parameters in float32.
    "bf16": Arithmetic(_power(-22), _power(-8), _power(-8), *_FLOAT32_RANGE),
}

BOUND_ARITHMETIC = ARITHMETICS["float64"]  # in which the bounds themselves are computed
COEFFICIENT_ROUNDINGS = 16  # from BatchNorm's four parameters to a weight that it is folded into, at the most
LARGEST_FACTOR = 2.0**40  # of elementwise scalings; none smaller than its inverse either, but zero
PLACE_ERROR = 2.0**-20  # of the place of a nearest pixel, which any arithmetic computes in float32 or better
SPARE_ROUNDINGS = 24  # of a bound's, around a sum: magnitudes, error terms, conversions; far fewer than this


def arithmetic_named(name: str) -> Arithmetic:
    if name not in ARITHMETICS:
        raise unknown("arithmetic", name, ARITHMETICS)
    return ARITHMETICS[name]


# --- error factors, as exact rationals rounded up ---------------------------------------------------------------------


def rounded_up(value: Fraction) -> float:
    return math.nextafter(float(value), math.inf)


def compound(unit: Fraction, count: int) -> Fraction | None:
    """1 / (1 - k·u) ≥ (1 ± u)^±k, or None where k·u ≥ 1 and nothing is known."""
    total = count * unit
    return 1 / (1 - total) if total < 1 else None


@lru_cache(maxsize=1024)
def sum_error(arithmetic: Arithmetic, terms: int, foldings: int = 1) -> float:
    """Eq. 4: e with |computed - exact| ≤ e·(Σ|w_i||x_i| + |b|), for the deployed network's deviation plus the bound's.

    `foldings`: BatchNorms that may be folded into the weights, one after the other.
    """
    deployed = compound(arithmetic.unit, terms + 1 + max(1, foldings) * COEFFICIENT_ROUNDINGS)
    bound = compound(BOUND_ARITHMETIC.unit, terms + 1 + SPARE_ROUNDINGS)
    if deployed is None or bound is None:
        return math.inf
    return rounded_up((1 + arithmetic.operands) * (1 + arithmetic.stored) ** 2 * deployed - 1 + bound - 1)


@lru_cache(maxsize=1024)
def elementwise_error(arithmetic: Arithmetic, roundings: int) -> float:
    """Eq. 6: the same for a few operations on single elements, relative to the sum of the magnitudes they combine."""
    deployed = compound(arithmetic.unit, roundings)
    bound = compound(BOUND_ARITHMETIC.unit, roundings + SPARE_ROUNDINGS)
    if deployed is None or bound is None:
        return math.inf
    return rounded_up((1 + arithmetic.stored) ** 2 * deployed - 1 + bound - 1)


@lru_cache(maxsize=1024)
def inflation(terms: int) -> float:
    """Eq. 5: what a float64 sum of so many non-negative terms is multiplied by to be no less than the exact one."""
    bound = compound(BOUND_ARITHMETIC.unit, terms + SPARE_ROUNDINGS)
    return math.inf if bound is None else rounded_up(bound)


# --- boxes whose conversions round outward ----------------------------------------------------------------------------


def down(x: Tensor) -> Tensor:
    """Below the exact result, where `x` is a result rounded to nearest."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


def up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def nearest_below(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest numbers of a coarser type that are not above `x`."""
    nearest = x.to(dtype)
    return torch.where(nearest > x, down(nearest), nearest)


def nearest_above(x: Tensor, dtype: torch.dtype) -> Tensor:
    nearest = x.to(dtype)
    return torch.where(nearest < x, up(nearest), nearest)


class OutwardBox(Box):
    """A float64 box whose other form encloses the one it was made in, in exact arithmetic."""

    __slots__ = ()

    @classmethod
    def around(cls, center: Tensor, radius: Tensor) -> Self:
        """`Box.around`; an element whose centre is infinite, or either no number, is unbounded."""
        known = center.isfinite() & ~radius.isnan()
        return super().around(torch.where(known, center, 0.0), torch.where(known, radius, torch.inf))

    @property
    def center(self) -> Tensor:
        if self._center is None:
            middle = (self.lower + self.upper) / 2
            self._center = torch.where(middle.isfinite(), middle, 0.0)  # of [0, inf), too
        return self._center

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = down(self.center - self.radius)
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = up(self.center + self.radius)
        return self._upper

    @property
    def radius(self) -> Tensor:
        if self._radius is None:
            center = self.center
            self._radius = up(torch.maximum(self.upper - center, center - self.lower))
        return self._radius

    @property
    def magnitude(self) -> Tensor:
        """No less than |x| for any x in the box, but for one rounding."""
        return self.center.abs() + self.radius


def outward(box: Box) -> OutwardBox:
    """`box`, of any type, as it is."""
    if isinstance(box, OutwardBox):
        return box
    if box._center is not None and box._radius is not None:
        return OutwardBox.around(box._center.double(), box._radius.double())
    return OutwardBox(box.lower.double(), box.upper.double())


def enclosing_linf_box(x: Tensor, eps: float | Tensor, clip: tuple[float, float] | None = (0.0, 1.0)) -> OutwardBox:
    """`linf_box` that no rounding has made smaller: every real point within `eps` of `x`, and in `clip`, is inside."""
    x = x.double()
    lower, upper = down(x - eps), up(x + eps)
    if clip is not None:
        lower, upper = lower.clamp(*clip), upper.clamp(*clip)
    return OutwardBox(lower, upper)


def widened(
    box: OutwardBox, error: float, magnitude: Tensor, arithmetic: Arithmetic, terms: int = 1, losses: Any = 0.0
) -> OutwardBox:
    """`box` and whatever lies within error·magnitude of it or has lost an underflow; all reals where it may overflow.

    Every factor that meets a value is below LARGEST_FACTOR, so that an underflow costs no more than that many `tiny`;
    `losses` adds underflows that cost more.
    """
    underflow = 8 * (terms + COEFFICIENT_ROUNDINGS) * LARGEST_FACTOR * arithmetic.tiny
    radius = (box.radius + error * magnitude + underflow + losses) * inflation(1)
    fits = 2 * terms * (magnitude + radius) <= arithmetic.largest
    return OutwardBox.around(box.center, torch.where(fits, radius, torch.inf))


def unbounded(x: Tensor) -> OutwardBox:
    return OutwardBox.around(x, torch.full_like(x, torch.inf))


# --- one rule per operation -------------------------------------------------------------------------------------------

Rule = Callable[..., OutwardBox]


@dataclass(frozen=True)
class Sum:
    """The sums of products behind a value, as far as a BatchNorm that is folded into them must know.

    terms: products in each; foldings: BatchNorms behind it in all; largest: (B,) no less than |x| of any of its inputs;
    weight: no less than Σ|w| of any sum, and bias than |b|, the BatchNorms so far included; done: how many those are.
    """

    terms: int
    foldings: int
    largest: Tensor
    weight: Tensor
    bias: Tensor
    done: int = 0


def _weighted(function: Callable[..., Tensor]) -> Rule:
    def rule(
        a: Arithmetic, x: OutwardBox, weight: Tensor, bias: Tensor | None, *settings: Any, foldings: int = 1
    ) -> OutwardBox:
        terms = terms_of(function, weight)
        error, magnitude = sum_error(a, terms, foldings), x.magnitude
        if bias is None:
            bias = weight.new_zeros(_out_channels(function, weight, settings))
        underflow, fits = _sum_range(a, terms, weight.abs().sum(), bias, magnitude)
        center = function(x.center, weight, bias, *settings)
        slack = error * bias.abs() + underflow
        radius = function(x.radius + error * magnitude, weight.abs(), slack, *settings) * inflation(terms)
        return OutwardBox.around(center, torch.where(_per_image(fits, center), radius, torch.inf))

    return rule


def matmul_terms(x: Any, y: Any) -> int:
    """Products in one sum."""
    return int(x.shape[-1])


def einsum_terms(x: Any, y: Any, equation: str) -> int:
    """Products in one sum, where letters are summed over that one operand alone has, too."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, part in zip(inputs.split(","), (x, y), strict=True):
        sizes |= zip(term, part.shape, strict=True)
    return math.prod(size for letter, size in sizes.items() if letter not in output)


def _product(function: Callable[..., Tensor], terms_of: Callable[..., int]) -> Rule:
    """A matrix product with a constant, on either side."""

    def rule(a: Arithmetic, x: Any, y: Any, *settings: Any) -> OutwardBox:
        box, matrix = (x, y) if isinstance(x, OutwardBox) else (y, x)

        def with_matrix(part: Tensor, factor: Tensor) -> Tensor:
            return function(*((part, factor) if box is x else (factor, part)), *settings)

        terms, sizes, magnitude = terms_of(x, y, *settings), matrix.abs(), box.magnitude
        error = sum_error(a, terms)
        underflow, fits = _sum_range(a, terms, terms * sizes.amax(), matrix.new_zeros(1), magnitude)
        center = with_matrix(box.center, matrix)
        radius = (with_matrix(box.radius + error * magnitude, sizes) + underflow) * inflation(terms)
        return OutwardBox.around(center, torch.where(_per_image(fits, center), radius, torch.inf))

    return rule


def _sum_range(a: Arithmetic, terms: int, norm: Tensor, bias: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """What underflows can cost any of the sums, and (B,) whether no part of any sum of an image can overflow.

    norm: no less than Σ|w| of any of them.
    """
    largest = magnitude.flatten(1).amax(1)
    underflow = 8 * a.tiny * (2 * terms + 2 + norm + terms * largest.amax())
    return underflow, 2 * (norm * largest + bias.abs().amax()) <= a.largest


def terms_of(function: Callable[..., Tensor], weight: Tensor) -> int:
    """Products in one sum of a linear map."""
    if function in (F.conv_transpose1d, F.conv_transpose2d):
        return weight.shape[0] * math.prod(weight.shape[2:])
    return math.prod(weight.shape[1:])


def _out_channels(function: Callable[..., Tensor], weight: Tensor, settings: tuple[Any, ...]) -> int:
    if function not in (F.conv_transpose1d, F.conv_transpose2d):
        return weight.shape[0]
    return weight.shape[1] * settings[3]


def _per_image(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))


def _batch_norm(
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
    behind: Sum | None,
) -> tuple[OutwardBox, Sum | None]:
    """Eq. 7: in any of the usual orders, or folded into the sums behind it.

    Returns the box, and those sums with this BatchNorm folded into them.
    """
    if training:
        raise UsageError("sound bounds are those of a network in eval mode: call model.eval()")
    weight = torch.ones_like(variance) if weight is None else weight
    scale = torch.rsqrt(variance + eps) * weight
    bias = torch.zeros_like(mean) if bias is None else bias
    shift = bias - mean * scale
    if not (_is_harmless(variance + eps, scale, weight) and _is_small(mean, bias)):
        return unbounded(x.center), None
    parameters = mean.abs() * scale.abs() + bias.abs()
    losses: Tensor | float = 0.0
    folded = None
    if behind is not None:
        most = scale.abs().amax()
        folded = replace(
            behind,
            weight=behind.weight * most,
            bias=behind.bias * most + parameters.amax(),
            done=behind.done + 1,
        )
        met = behind.weight + behind.bias + mean.abs().amax() + bias.abs().amax()
        losses = _per_image(_folding_losses(a, folded, met), x.like)
    channelwise = (1, -1, *[1] * (x.like.dim() - 2))
    scale, shift, parameters = scale.view(channelwise), shift.view(channelwise), parameters.view(channelwise)
    moved = OutwardBox.around(torch.addcmul(shift, x.center, scale), x.radius * scale.abs())
    magnitude = scale.abs() * x.magnitude + parameters
    # What is centred first meets the weight, or the reciprocal of the root, before it meets the other.
    fits = 2 * LARGEST_FACTOR * (x.magnitude + mean.abs().view(channelwise)) <= a.largest
    moved = OutwardBox.around(moved.center, torch.where(fits, moved.radius, torch.inf))
    moved = widened(moved, elementwise_error(a, COEFFICIENT_ROUNDINGS), magnitude, a)
    terms, foldings = (1, 1) if behind is None else (behind.terms, behind.foldings)
    return widened(moved, sum_error(a, terms, foldings), parameters, a, losses=losses), folded


def _folding_losses(a: Arithmetic, folded: Sum, met: Tensor) -> Tensor:
    """(B,): what underflows of folded weights cost, met by the inputs; infinite where a folded sum may overflow.

    met: no less than what meets the BatchNorm's weight as it is folded, perhaps before the root of its variance.
    """
    lost = 8 * folded.terms * LARGEST_FACTOR**folded.done * a.tiny * (1 + folded.largest)
    largest = torch.maximum(folded.weight * (1 + folded.largest) + folded.bias, LARGEST_FACTOR * met)
    return torch.where(2 * largest <= a.largest, lost, torch.inf)


def _is_harmless(*values: Tensor) -> bool:
    """Far enough from underflow and overflow that products and quotients of them are normal numbers; zero is."""
    sizes = torch.cat([value.abs().flatten() for value in values])
    return bool(((sizes == 0) | ((sizes > 1 / LARGEST_FACTOR) & (sizes < LARGEST_FACTOR))).all())


def _is_small(*values: Tensor) -> bool:
    return all(bool((value.abs() < LARGEST_FACTOR).all()) for value in values)


def _leaky_relu(a: Arithmetic, x: OutwardBox, negative_slope: float) -> OutwardBox:
    if not 0 <= negative_slope <= 1:
        raise UnsupportedOperation(f"LeakyReLU with negative_slope={negative_slope} has no sound rule")
    ends = OutwardBox(F.leaky_relu(x.lower, negative_slope), F.leaky_relu(x.upper, negative_slope))
    return widened(ends, elementwise_error(a, 2), x.magnitude, a)


def _prelu(a: Arithmetic, x: OutwardBox, weight: Tensor) -> OutwardBox:
    channelwise = weight.view(1, -1, *[1] * (x.like.dim() - 2))
    center, sizes = interval.RULES[F.prelu](x, weight), channelwise.abs().clamp(min=1)
    if not _is_harmless(weight):
        return unbounded(center.center)
    return widened(OutwardBox(center.lower, center.upper), elementwise_error(a, 4), x.magnitude * sizes, a)


def _clamped(function: Callable[..., Tensor]) -> Rule:
    """Between two ends, each of which is rounded as it is stored."""

    def rule(a: Arithmetic, x: OutwardBox, lower: float | None, upper: float | None) -> OutwardBox:
        ends = _monotone(function)(a, x, lower, upper)
        most = max(abs(end) for end in (lower, upper) if end is not None)
        return widened(ends, elementwise_error(a, 1), torch.full_like(ends.center, most), a)

    return rule


def _abs(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    ends = interval.RULES[torch.abs](x)
    return OutwardBox(ends.lower, ends.upper)


def _extremum(function: Callable[..., Tensor]) -> Rule:
    def rule(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
        x, y = (value if isinstance(value, Box) else stored(a, value) for value in (x, y))
        return OutwardBox(function(x.lower, y.lower), function(x.upper, y.upper))

    return rule


def _interpolate(
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
    sizes = F.interpolate(x.like, *settings).shape[2:]
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


def _add(a: Arithmetic, x: Any, y: Any, alpha: float = 1) -> OutwardBox:
    """A constant is rounded as it is stored, and so is alpha; then come its product and the sum."""
    if not _is_harmless(torch.tensor(float(alpha), dtype=torch.float64)):
        raise UnsupportedOperation(f"alpha={alpha} has no sound rule")
    boxes = [(value, factor) for value, factor in ((x, 1.0), (y, abs(alpha))) if isinstance(value, Box)]
    center = _center(x) + alpha * _center(y)
    radius = reduce(torch.add, [factor * box.radius for box, factor in boxes]).expand_as(center)
    magnitude = _magnitude(x) + abs(alpha) * _magnitude(y)
    roundings = 2 if alpha == 1 or alpha == -1 else 4
    return widened(OutwardBox.around(center, radius), elementwise_error(a, roundings), magnitude, a)


def _neg(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    return OutwardBox.around(-x.center, x.radius)


def _mul(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
    box, factor = (x, y) if isinstance(x, OutwardBox) else (y, x)
    return _scaled(a, box, factor, lambda value, factor: value * factor)


def _div(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
    return _scaled(a, x, y, lambda value, divisor: value / divisor)


def _scaled(a: Arithmetic, x: OutwardBox, factor: Any, operation: Callable[[Tensor, Any], Tensor]) -> OutwardBox:
    sizes = torch.as_tensor(factor, dtype=torch.float64, device=x.like.device)
    center = operation(x.center, factor)
    if not _is_harmless(sizes):
        return unbounded(center)
    radius, magnitude = operation(x.radius, sizes.abs()), operation(x.magnitude, sizes.abs())
    return widened(OutwardBox.around(center, radius), elementwise_error(a, 4), magnitude, a)


def _averaging(function: Callable[..., Tensor], window: Callable[..., int]) -> Rule:
    """Sums and means: products with one constant, of `window(x, *settings)` terms, which may be added first."""

    def rule(a: Arithmetic, x: OutwardBox, *settings: Any) -> OutwardBox:
        terms = window(x.like, *settings)
        center, radius = function(x.center, *settings), function(x.radius, *settings)
        magnitude = function(x.magnitude, *settings) * inflation(terms)
        moved = OutwardBox.around(center, radius * inflation(terms))
        moved = widened(moved, sum_error(a, terms + 2), magnitude, a, terms)
        fits = 2 * terms * x.magnitude.flatten(1).amax(1) <= a.largest
        return OutwardBox.around(moved.center, torch.where(_per_image(fits, center), moved.radius, torch.inf))

    return rule


def _reduced(x: Tensor, *settings: Any) -> int:
    return x.numel() // max(1, x.sum(*settings).numel())


def _kernel(x: Tensor, kernel_size: int | tuple[int, ...], *settings: Any) -> int:
    return math.prod(per_axis(kernel_size, x.dim() - 2))


def _adaptive(x: Tensor, output_size: Any) -> int:
    """Windows of adaptive pooling overlap; the whole image is no less than any of them."""
    return math.prod(x.shape[2:])


def _exact(function: Callable[..., Tensor]) -> Rule:
    """Moves elements, or compares them: nothing is rounded."""
    return lambda a, x, *settings: x.map(lambda part: function(part, *settings))


def _monotone(function: Callable[..., Tensor]) -> Rule:
    return lambda a, x, *settings: OutwardBox(function(x.lower, *settings), function(x.upper, *settings))


def _pad(a: Arithmetic, x: OutwardBox, pad: Any, mode: str, value: float | None) -> OutwardBox:
    if value:
        raise UnsupportedOperation(f"padding with {value}, which is rounded, has no sound rule; zero has")
    return _monotone(F.pad)(a, x, pad, mode, value)


def _cast(a: Arithmetic, x: OutwardBox, dtype: torch.dtype | None) -> OutwardBox:
    if dtype is None:
        return x
    if a is ARITHMETICS["float64"] and dtype != torch.float64:
        raise UnsupportedOperation(f"a cast to {dtype} in a network of arithmetic float64 has no sound rule")
    return widened(x, elementwise_error(a, 1), x.magnitude, a)


def _cat(a: Arithmetic, parts: Any, dim: int) -> OutwardBox:
    return OutwardBox.cat([part if isinstance(part, Box) else stored(a, part) for part in parts], dim)


def stored(a: Arithmetic, constant: Tensor) -> OutwardBox:
    point = OutwardBox.around(constant, torch.zeros_like(constant))
    return widened(point, elementwise_error(a, 1), constant.abs(), a)


def _center(value: Any) -> Any:
    return value.center if isinstance(value, Box) else value


def _magnitude(value: Any) -> Any:
    return value.magnitude if isinstance(value, OutwardBox) else abs(value)


EXACT = {function for function, operation in OPERATIONS.items() if operation.reshaping} - {cast}
EXACT_METHODS = {"t", "expand", "expand_as", "repeat"}
"""Of constants; values have no rule for them."""

COMPARING = (
    F.relu,
    F.relu6,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    torch.amax,
    torch.amin,
)
"""What returns one of its elements, or a constant that every arithmetic has."""

RULES: dict[Callable, Callable[..., Any]] = {  # each a Rule, but BatchNorm's returns the sums behind it as well
    **{function: _weighted(function) for function in WEIGHTED},
    torch.matmul: _product(torch.matmul, matmul_terms),
    einsum: _product(einsum, einsum_terms),
    **{function: _exact(function) for function in EXACT},
    **{function: _monotone(function) for function in COMPARING},
    **{function: _averaging(function, _kernel) for function in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)},
    **{
        function: _averaging(function, _adaptive)
        for function in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    },
    **{function: _averaging(function, _reduced) for function in (torch.Tensor.mean, torch.Tensor.sum)},
    F.batch_norm: _batch_norm,
    F.leaky_relu: _leaky_relu,
    F.prelu: _prelu,
    **{function: _clamped(function) for function in (torch.clamp, F.hardtanh)},
    torch.abs: _abs,
    **{function: _extremum(function) for function in (torch.maximum, torch.minimum)},
    F.interpolate: _interpolate,
    F.pad: _pad,
    cast: _cast,
    add: _add,
    sub: lambda a, x, y, alpha=1: _add(a, x, y, -alpha),
    torch.mul: _mul,
    torch.div: _div,
    torch.neg: _neg,
    cat: _cat,
}


# --- the walk ---------------------------------------------------------------------------------------------------------


class SoundPass:
    """Walks a box through the network in a deployed arithmetic (a `graph.Transform`)."""

    settled: ClassVar = {
        function: settle for function, settle in SETTLED_BY_CLEAN.items() if function is not F.batch_norm
    }

    def __init__(self, arithmetic: Arithmetic, graph: Graph[OutwardBox]) -> None:
        self.arithmetic, self._output = arithmetic, graph.output
        self._foldings = foldings_of(graph)
        self._sums: dict[int, Sum | None] = {}  # behind a value, where a linear map made it
        self.entering: OutwardBox | None = None
        self._excess: dict[int, Tensor] = {}  # of a softmax: how far its sums can be from 1
        self.relu_inputs: list[OutwardBox] = []
        self.affine_input: OutwardBox | None = None
        self.classifier: tuple[Call, OutwardBox] | None = None  # with what enters it

    def apply(self, call: Call, args: tuple[Any, ...]) -> OutwardBox:
        if call.function not in RULES:
            raise UnsupportedOperation(f"{call.where} has no sound rule: its rounding errors are not known")
        args = map_leaves(args, Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        if OPERATIONS[call.function].rectifies:
            self.relu_inputs.append(args[0])
        if call.function in WEIGHTED:
            self._follow_sums(call, args)
        elif call.function in EXACT:
            self._sums[call.index] = self._sums.get(call.args[0].index)
        result = self.result(call, args)
        if call.function is F.batch_norm:
            result, self._sums[call.index] = result
        elif call.function is torch.softmax:
            result, self._excess[call.index] = result
        self.keep(call, args, result)
        return result

    def keep(self, call: Call, args: tuple[Any, ...], result: OutwardBox) -> None:
        """For walks that look at more; `args`: with boxes in the place of values, and constants in float64."""

    def result(self, call: Call, args: tuple[Any, ...]) -> Any:
        """What the rule of an operation says, for BatchNorm and softmax with what others must know."""
        keywords: dict[str, Any] = {}
        if call.function in WEIGHTED:
            keywords["foldings"] = self._foldings.get(call.index, 1)
        elif call.function is F.batch_norm:
            keywords["behind"] = self._sums.get(call.args[0].index)
        elif call.function is attend:
            keywords["excess"] = self._excess[call.args[0].index]
        return RULES[call.function](self.arithmetic, *args, **keywords)

    def _follow_sums(self, call: Call, args: tuple[Any, ...]) -> None:
        x, weight, bias = args[:3]
        self.affine_input = self.affine_input or x
        if call.function is F.linear and call.index == self._output and x.like.dim() == 2:
            self.classifier = replace(call, args=args), x
        self._sums[call.index] = Sum(
            terms_of(call.function, weight),
            self._foldings.get(call.index, 1),
            x.magnitude.flatten(1).amax(1),
            weight.abs().sum(),
            weight.new_zeros(()) if bias is None else bias.abs().amax(),
        )

    def clean(self, value: OutwardBox) -> None:
        return None

    def like(self, value: OutwardBox) -> Tensor:
        return value.like


def foldings_of(graph: Graph[Any]) -> dict[int, int]:
    """How many BatchNorms stand behind each linear map, with nothing but moved elements in between."""
    behind: dict[int, tuple[int, int]] = {}
    foldings: dict[int, int] = {}
    for index, step in enumerate(graph.steps):
        if step.function in WEIGHTED:
            behind[index] = index, 0
        elif step.function in EXACT | {F.batch_norm} and step.args and isinstance(step.args[0], Ref):
            origin = behind.get(step.args[0].index)
            if origin is not None:
                behind[index] = origin[0], origin[1] + (step.function is F.batch_norm)
                foldings[origin[0]] = max(foldings.get(origin[0], 0), behind[index][1])
    return foldings


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Without cuDNN, whose convolutions need not be sums of products (Winograd, FFT)."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@torch.no_grad()
def propagate_by(walk: SoundPass, graph: Graph[OutwardBox], box: Box) -> Bounds:
    """See `propagate`, which it is with a walk that may look at more."""
    _require_stored_constants(graph)
    if graph.head is not None:
        raise UnsupportedOperation(
            "a softmax as the last operation, which may round two classes to a tie, has no sound rule"
        )
    a, entering = walk.arithmetic, outward(box)
    entering = widened(entering, rounded_up(a.stored), entering.magnitude, a) if a.stored else entering
    walk.entering = entering
    with plain_convolutions():
        output = graph.run(entering, walk)
    tail, tail_input = ((walk.classifier[0],), walk.classifier[1]) if walk.classifier else ((), output)
    return Bounds(None, output, tuple(walk.relu_inputs), walk.affine_input or entering, tail, tail_input)


def propagate(graph: Graph[OutwardBox], box: Box, arithmetic: str) -> Bounds:
    """Bounds that no value computed in `arithmetic` leaves, for any input in `box`; see the head of this file.

    Args:
        graph: of a network in eval mode.
        box: (B, ...), taken as it is: use `enclosing_linf_box` for one that rounding has not made smaller.
        arithmetic: a name of ARITHMETICS.

    Returns:
        Bounds, their boxes float64; `tail` holds the last linear layer if the network ends with one. Where a value
        might overflow its box is infinite, and so are all that follow.

    Raises:
        UsageError: unknown arithmetic, or a network in training mode.
        UnsupportedOperation: an operation without a rule, or a parameter that is computed from others.
    """
    return propagate_by(SoundPass(arithmetic_named(arithmetic), graph), graph, box)


@torch.no_grad()
def margins_of(bounds: Bounds, labels: Tensor, arithmetic: str) -> Tensor:
    """Eq. 8: lower bounds (B, K), float64, of the computed logits' z_y - z_j; 0 in column y, -inf where none is known.

    Args:
        bounds: of `propagate`, in the same arithmetic.
        labels: (B,) int64, the classes y.
    """
    own = labels[:, None]
    if not bounds.tail:
        output = bounds.output
        lower = down(output.lower.gather(1, own) - output.upper)
    else:
        a = arithmetic_named(arithmetic)
        (classifier,), x = bounds.tail, outward(bounds.before_tail)
        _, weight, bias = classifier.args
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        terms, magnitude = weight.shape[1], x.magnitude
        underflow, fits = _sum_range(a, terms, weight.abs().sum(), bias, magnitude)
        difference = weight[labels][:, None, :] - weight
        center = torch.einsum("bki,bi->bk", difference, x.center) + (bias[labels][:, None] - bias)
        reach = torch.einsum("bki,bi->bk", difference.abs(), x.radius)
        sizes = F.linear(magnitude, weight.abs(), bias.abs())
        error = sum_error(a, terms) * (sizes.gather(1, own) + sizes) + 2 * underflow
        lower = down(center - (reach + error) * inflation(terms))
        lower = torch.where(fits[:, None], lower, -torch.inf)
    return no_nan(lower, labels)


def _require_stored_constants(graph: Graph[Any]) -> None:
    """Parameters are as they are stored: what is computed from them alone is rounded too, which no rule here covers.

    So is what is computed from tensors that the forward makes. Sizes, and numbers computed from them, are exact.
    """
    tensors: set[int] = set()
    for index, step in enumerate(graph.steps):
        if step.module is not None:
            _require_stored(step)
        if step.tracked:
            continue
        name = step.function.name if isinstance(step.function, Method) else step.function
        read = {ref.index for ref in leaves((step.args, dict(step.kwargs or {})), Ref)}
        if (name is getattr and not read) or (name in MAKERS and "dtype" not in (step.kwargs or {})):
            tensors.add(index)
        elif read & tensors:
            if _moves_constants(step, name):
                tensors.add(index)
            elif not _is_inspection(step, name):
                raise UnsupportedOperation(f"{step.where} computes with parameters alone: it has no sound rule")
        elif not (_is_inspection(step, name) or getattr(step.function, "__module__", None) == operator.mul.__module__):
            raise UnsupportedOperation(f"{step.where} makes a tensor in the forward: it has no sound rule")


def _is_inspection(step: Step, name: Any) -> bool:
    """The result is no tensor."""
    if name is getattr:
        return step.args[1] in INSPECTED_ATTRIBUTES
    return name not in MAKERS and name in INSPECTIONS | INSPECTING_METHODS


def _moves_constants(step: Step, name: Any) -> bool:
    if name is getattr:
        return step.args[1] in ("T", "mT")
    operation = record_of(step.function)
    return name in EXACT_METHODS if operation is None else operation.function in EXACT


def _require_stored(step: Step) -> None:
    module = step.module
    assert module is not None
    names = [step.arguments()[1]] if step.function is getattr else ["weight", "bias", "running_mean", "running_var"]
    for name in names:
        is_own = name in module._parameters or name in module._buffers or name in vars(module)
        if name.startswith("_tensor_constant"):
            raise UnsupportedOperation(
                f"{step.where}: a tensor made in the forward has no sound rule; make it a buffer"
            )
        if not is_own and isinstance(getattr(module, name, None), Tensor):
            raise UnsupportedOperation(
                f"{step.where}: {name} is computed from other parameters, whose rounding no rule covers"
            )
