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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.bounds.interval import Bounds
from certtrain.bounds.tracing import (
    SETTLED_BY_CLEAN,
    VIEWS,
    WEIGHTED,
    Call,
    Graph,
    Ref,
    leaves,
    map_leaves,
)
from certtrain.errors import UnsupportedOperation, UsageError, unknown


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

OURS = ARITHMETICS["float64"]
COEFFICIENT_ROUNDINGS = 16  # from BatchNorm's four parameters to a weight that it is folded into, at the most
LARGEST_FACTOR = 2.0**40  # of elementwise scalings; none smaller than its inverse either, but zero
SPARE_ROUNDINGS = 24  # of ours, around a sum: magnitudes, error terms, conversions; far fewer than this


def arithmetic_named(name: str) -> Arithmetic:
    if name not in ARITHMETICS:
        raise unknown("arithmetic", name, ARITHMETICS)
    return ARITHMETICS[name]


# --- error factors, as exact rationals rounded up ---------------------------------------------------------------------


def _rounded_up(value: Fraction) -> float:
    return math.nextafter(float(value), math.inf)


def _compound(unit: Fraction, count: int) -> Fraction | None:
    """1 / (1 - k·u) ≥ (1 ± u)^±k, or None where k·u ≥ 1 and nothing is known."""
    total = count * unit
    return 1 / (1 - total) if total < 1 else None


@lru_cache(maxsize=1024)
def sum_error(arithmetic: Arithmetic, terms: int) -> float:
    """Eq. 4: e with |computed - exact| ≤ e·(Σ|w_i||x_i| + |b|), for the deployed network's deviation plus ours."""
    theirs = _compound(arithmetic.unit, terms + 1 + COEFFICIENT_ROUNDINGS)
    ours = _compound(OURS.unit, terms + 1 + SPARE_ROUNDINGS)
    if theirs is None or ours is None:
        return math.inf
    return _rounded_up((1 + arithmetic.operands) * (1 + arithmetic.stored) ** 2 * theirs - 1 + ours - 1)


@lru_cache(maxsize=1024)
def elementwise_error(arithmetic: Arithmetic, roundings: int) -> float:
    """Eq. 6: the same for a few operations on single elements, relative to the sum of the magnitudes they combine."""
    theirs, ours = _compound(arithmetic.unit, roundings), _compound(OURS.unit, roundings + SPARE_ROUNDINGS)
    return _rounded_up((1 + arithmetic.stored) ** 2 * theirs - 1 + ours - 1)


@lru_cache(maxsize=1024)
def _inflation(terms: int) -> float:
    """Eq. 5: what a float64 sum of so many non-negative terms is multiplied by to be no less than the exact one."""
    ours = _compound(OURS.unit, terms + SPARE_ROUNDINGS)
    return math.inf if ours is None else _rounded_up(ours)


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

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = down(self._center - self._radius)
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = up(self._center + self._radius)
        return self._upper

    @property
    def radius(self) -> Tensor:
        if self._radius is None:
            center = self.center
            self._radius = up(torch.maximum(self._upper - center, center - self._lower))
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


def _widened(box: OutwardBox, error: float, magnitude: Tensor, arithmetic: Arithmetic, terms: int = 1) -> OutwardBox:
    """`box` and whatever lies within error·magnitude of it or has lost an underflow; all reals where it may overflow.

    Every factor that meets a value is below LARGEST_FACTOR, so that an underflow costs no more than that many `tiny`.
    """
    underflow = 8 * (terms + COEFFICIENT_ROUNDINGS) * LARGEST_FACTOR * arithmetic.tiny
    radius = (box.radius + error * magnitude + underflow) * _inflation(1)
    fits = 2 * terms * (magnitude + radius) <= arithmetic.largest
    return OutwardBox.around(box.center, torch.where(fits, radius, torch.inf))


# --- one rule per operation -------------------------------------------------------------------------------------------

Rule = Callable[..., OutwardBox]


def _weighted(function: Callable[..., Tensor]) -> Rule:
    def rule(
        a: Arithmetic, x: OutwardBox, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> OutwardBox:
        if not isinstance(x, Box) or isinstance(weight, Box):
            raise UnsupportedOperation(f"{function.__name__} with weights that depend on the input has no sound rule")
        terms = terms_of(function, weight)
        error, magnitude = sum_error(a, terms), x.magnitude
        if bias is None:
            bias = weight.new_zeros(_out_channels(function, weight, args, kwargs))
        underflow, fits = _sum_range(a, terms, weight, bias, magnitude)
        center = function(x.center, weight, bias, *args, **kwargs)
        slack = error * bias.abs() + underflow
        radius = function(x.radius + error * magnitude, weight.abs(), slack, *args, **kwargs) * _inflation(terms)
        return OutwardBox.around(center, torch.where(_per_image(fits, center), radius, torch.inf))

    return rule


def _sum_range(a: Arithmetic, terms: int, weight: Tensor, bias: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """What underflows can cost any of the sums, and (B,) whether no part of any sum of an image can overflow."""
    norm = weight.abs().sum()  # no less than that of any row
    largest = magnitude.flatten(1).amax(1)
    underflow = 8 * a.tiny * (2 * terms + 2 + norm + terms * largest.amax())
    return underflow, 2 * (norm * largest + bias.abs().amax()) <= a.largest


def terms_of(function: Callable[..., Tensor], weight: Tensor) -> int:
    """Products in one sum of a linear map."""
    if function in (F.conv_transpose1d, F.conv_transpose2d):
        return weight.shape[0] * math.prod(weight.shape[2:])
    return math.prod(weight.shape[1:])


def _out_channels(function: Callable[..., Tensor], weight: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> int:
    if function not in (F.conv_transpose1d, F.conv_transpose2d):
        return weight.shape[0]
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    return weight.shape[1] * groups


def _per_image(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))


def _batch_norm(
    a: Arithmetic,
    x: OutwardBox,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    terms: int,
) -> OutwardBox:
    """Eq. 7: in any of the usual orders, or folded into the layer before, which summed `terms` products."""
    if training:
        raise UsageError("sound bounds are those of a network in eval mode: call model.eval()")
    scale = torch.rsqrt(variance + eps) * (1.0 if weight is None else weight)
    bias = torch.zeros_like(mean) if bias is None else bias
    shift = bias - mean * scale
    if not _is_harmless(variance + eps, scale, mean, bias):
        return OutwardBox.around(x.center, torch.full_like(x.center, torch.inf))
    scale, shift, mean, bias = (v.view(1, -1, *[1] * (x.like.dim() - 2)) for v in (scale, shift, mean, bias))
    moved = OutwardBox.around(torch.addcmul(shift, x.center, scale), x.radius * scale.abs())
    parameters = mean.abs() * scale.abs() + bias.abs()
    magnitude = scale.abs() * x.magnitude + parameters
    moved = _widened(moved, elementwise_error(a, COEFFICIENT_ROUNDINGS), magnitude, a)
    return _widened(moved, sum_error(a, terms), parameters, a)


def _is_harmless(*values: Tensor) -> bool:
    """Far enough from underflow and overflow that products and quotients of them are normal numbers; zero is."""
    sizes = torch.cat([value.abs().flatten() for value in values])
    return bool(((sizes == 0) | ((sizes > 1 / LARGEST_FACTOR) & (sizes < LARGEST_FACTOR))).all())


def _leaky_relu(a: Arithmetic, x: OutwardBox, negative_slope: float = 0.01) -> OutwardBox:
    if not 0 <= negative_slope <= 1:
        raise UnsupportedOperation(f"LeakyReLU with negative_slope={negative_slope} has no sound rule")
    ends = OutwardBox(F.leaky_relu(x.lower, negative_slope), F.leaky_relu(x.upper, negative_slope))
    return _widened(ends, elementwise_error(a, 2), x.magnitude, a)


def _add(a: Arithmetic, x: Any, y: Any, *, alpha: float = 1) -> OutwardBox:
    if alpha != 1:
        y = _mul(a, y, alpha) if isinstance(y, Box) else y * alpha
    boxes = [value for value in (x, y) if isinstance(value, Box)]
    center = _center(x) + _center(y)
    radius = sum(box.radius for box in boxes).expand_as(center)
    return _widened(OutwardBox.around(center, radius), elementwise_error(a, 2), _magnitude(x) + _magnitude(y), a)


def _neg(a: Arithmetic, x: OutwardBox) -> OutwardBox:
    return OutwardBox.around(-x.center, x.radius)


def _sub(a: Arithmetic, x: Any, y: Any, *, alpha: float = 1) -> OutwardBox:
    return _add(a, x, _neg(a, y) if isinstance(y, Box) else -y, alpha=alpha)


def _mul(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
    if isinstance(x, Box) and isinstance(y, Box):
        raise UnsupportedOperation("the product of two values that both depend on the input has no sound rule")
    box, factor = (x, y) if isinstance(x, Box) else (y, x)
    return _scaled(a, box, factor, lambda value, factor: value * factor)


def _div(a: Arithmetic, x: Any, y: Any) -> OutwardBox:
    if isinstance(y, Box):
        raise UnsupportedOperation("division by a value that depends on the input has no sound rule")
    return _scaled(a, x, y, lambda value, divisor: value / divisor)


def _scaled(a: Arithmetic, x: OutwardBox, factor: Any, operation: Callable[[Tensor, Any], Tensor]) -> OutwardBox:
    sizes = torch.as_tensor(factor, dtype=torch.float64, device=x.like.device)
    center = operation(x.center, factor)
    if not _is_harmless(sizes):
        return OutwardBox.around(center, torch.full_like(center, torch.inf))
    radius, magnitude = operation(x.radius, sizes.abs()), operation(x.magnitude, sizes.abs())
    return _widened(OutwardBox.around(center, radius), elementwise_error(a, 4), magnitude, a)


def _averaging(function: Callable[..., Tensor], window: Callable[..., int]) -> Rule:
    """Sums and means: products with one constant, of `window(x, *args)` terms."""

    def rule(a: Arithmetic, x: OutwardBox, *args: Any, **kwargs: Any) -> OutwardBox:
        terms = window(x.like, *args, **kwargs)
        center, radius = function(x.center, *args, **kwargs), function(x.radius, *args, **kwargs)
        magnitude = function(x.magnitude, *args, **kwargs) * _inflation(terms)
        moved = OutwardBox.around(center, radius * _inflation(terms))
        return _widened(moved, sum_error(a, terms + 2), magnitude, a, terms)

    return rule


def _reduced(x: Tensor, *args: Any, **kwargs: Any) -> int:
    return x.numel() // max(1, x.sum(*args, **kwargs).numel())


def _kernel(x: Tensor, kernel_size: int | tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return math.prod(kernel_size) if isinstance(kernel_size, tuple) else kernel_size ** (x.dim() - 2)


def _adaptive(x: Tensor, output_size: Any) -> int:
    """Windows of adaptive pooling overlap; the whole image is no less than any of them."""
    return math.prod(x.shape[2:])


def _exact(function: Callable[..., Tensor]) -> Rule:
    """Moves elements, or compares them: nothing is rounded."""
    return lambda a, x, *args, **kwargs: x.map(lambda part: function(part, *args, **kwargs))


def _monotone(function: Callable[..., Tensor]) -> Rule:
    return lambda a, x, *args, **kwargs: OutwardBox(
        function(x.lower, *args, **kwargs), function(x.upper, *args, **kwargs)
    )


def _pad(a: Arithmetic, x: OutwardBox, pad: Any, mode: str = "constant", value: float | None = None) -> OutwardBox:
    if value:
        raise UnsupportedOperation(f"padding with {value}, which is rounded, has no sound rule; zero has")
    return _monotone(F.pad)(a, x, pad, mode)


def _center(value: Any) -> Any:
    return value.center if isinstance(value, Box) else value


def _magnitude(value: Any) -> Any:
    return value.magnitude if isinstance(value, OutwardBox) else abs(value)


RULES: dict[Callable, Rule] = {
    **{function: _weighted(function) for function in WEIGHTED},
    **{function: _exact(function) for function in VIEWS},
    **{function: _monotone(function) for function in (F.relu, F.max_pool1d, F.max_pool2d)},
    **{function: _averaging(function, _kernel) for function in (F.avg_pool1d, F.avg_pool2d)},
    **{function: _averaging(function, _adaptive) for function in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)},
    **{function: _averaging(function, _reduced) for function in (torch.Tensor.mean, torch.Tensor.sum)},
    F.batch_norm: _batch_norm,
    F.leaky_relu: _leaky_relu,
    F.pad: _pad,
    torch.add: _add,
    torch.sub: _sub,
    torch.mul: _mul,
    torch.div: _div,
    torch.neg: _neg,
    torch.cat: lambda a, parts, dim=0: OutwardBox.cat(parts, dim),
}


# --- the walk ---------------------------------------------------------------------------------------------------------


class _SoundPass:
    """Walks a box through the network in a deployed arithmetic (a `tracing.Transform`)."""

    settled: ClassVar = {
        function: settle for function, settle in SETTLED_BY_CLEAN.items() if function is not F.batch_norm
    }

    def __init__(self, arithmetic: Arithmetic, output: int) -> None:
        self._arithmetic, self._output = arithmetic, output
        self._terms: dict[int, int] = {}  # of the sums behind a value, where a linear map made it
        self.relu_inputs: list[OutwardBox] = []
        self.affine_input: OutwardBox | None = None
        self.classifier: tuple[Call, OutwardBox] | None = None  # with what enters it

    def apply(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OutwardBox:
        if call.function not in RULES:
            raise UnsupportedOperation(f"{call.where} has no sound rule: its rounding errors are not known")
        args, kwargs = map_leaves((args, kwargs), Tensor, Tensor.double)
        if call.function is F.relu:
            self.relu_inputs.append(args[0])
        if call.function in WEIGHTED:
            self.affine_input = self.affine_input or args[0]
            self._terms[call.index] = terms_of(call.function, args[1])
        if call.function is F.linear and call.index == self._output and args[0].like.dim() == 2:
            self.classifier = Call(call.index, call.function, args, kwargs, call.where), args[0]
        if call.function is F.batch_norm:
            kwargs = {**kwargs, "terms": self._terms.get(call.args[0].index, 1)}
        return RULES[call.function](self._arithmetic, *args, **kwargs)

    def clean(self, value: OutwardBox) -> None:
        return None

    def like(self, value: OutwardBox) -> Tensor:
        return value.like


@contextmanager
def _plain_convolutions() -> Iterator[None]:
    """Without cuDNN, whose convolutions need not be sums of products (Winograd, FFT)."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@torch.no_grad()
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
    a = arithmetic_named(arithmetic)
    _require_stored_constants(graph)
    entering = outward(box)
    entering = _widened(entering, _rounded_up(a.stored), entering.magnitude, a) if a.stored else entering
    walk = _SoundPass(a, graph.output)
    with _plain_convolutions():
        output = graph.run(entering, walk)
    tail, tail_input = ((walk.classifier[0],), walk.classifier[1]) if walk.classifier else ((), output)
    return Bounds(None, output, tuple(walk.relu_inputs), walk.affine_input or entering, tail, tail_input)


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
        (classifier,), x = bounds.tail, bounds.tail_input
        _, weight, *rest = classifier.args
        bias = rest[0] if rest and rest[0] is not None else weight.new_zeros(len(weight))
        terms, magnitude = weight.shape[1], x.magnitude
        underflow, fits = _sum_range(a, terms, weight, bias, magnitude)
        difference = weight[labels][:, None, :] - weight
        center = torch.einsum("bki,bi->bk", difference, x.center) + (bias[labels][:, None] - bias)
        reach = torch.einsum("bki,bi->bk", difference.abs(), x.radius)
        sizes = F.linear(magnitude, weight.abs(), bias.abs())
        error = sum_error(a, terms) * (sizes.gather(1, own) + sizes) + 2 * underflow
        lower = down(center - (reach + error) * _inflation(terms))
        lower = torch.where(fits[:, None], lower, -torch.inf)
    return torch.where(lower.isnan(), -torch.inf, lower).scatter(1, own, 0.0)


def _require_stored_constants(graph: Graph[Any]) -> None:
    """What the network computes from its parameters alone is rounded too, and no rule here covers that."""
    stored: set[int] = set()
    for index, operation in enumerate(graph.operations):
        reads = {ref.index for ref in leaves((operation.args, operation.kwargs), Ref)}
        if operation.function is getattr and not reads:
            stored.add(index)
        elif not operation.tracked and reads & stored:
            if operation.function not in VIEWS:
                raise UnsupportedOperation(f"{operation.where} computes with parameters alone: it has no sound rule")
            stored.add(index)
