"""Operations by hand, in rational arithmetic with an adversary's errors, and a network of one operation for each.

Every single operation is taken exactly and then multiplied by 1 ± u, and the adversary chooses the signs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import BoundedModel, Box
from certtrain.bounds.attention import attend
from certtrain.bounds.graph import Call
from certtrain.bounds.normalization import deviation, inverse_root, normalized
from certtrain.bounds.operations.arithmetic import add, sub
from certtrain.bounds.operations.joining import cat
from certtrain.bounds.operations.movement import cast
from certtrain.bounds.operations.pooling import resize
from certtrain.bounds.operations.products import WEIGHTED, einsum
from certtrain.bounds.rounding.arithmetic import ARITHMETICS, Arithmetic
from certtrain.bounds.rounding.boxes import enclosing_linf_box
from certtrain.bounds.rounding.table import EXACT

MODES = ("up", "down", "away from zero", "towards zero", "alternating", "random")
ORDERS = ("one after the other", "pairwise")
FORMULAS = 5  # of BatchNorm
KEPT_BITS = 160
Values = np.ndarray  # of Fractions


class Adversary:
    """Does single operations, each with the worst error that an arithmetic allows, in a direction of its choice.

    mode: how directions are chosen; a dictionary has the sign of each rounding by its number. size: of the errors, in
    units; order, fused, bias_first: how sums of products are taken; formula: which of the usual ones for BatchNorm.
    """

    def __init__(
        self,
        arithmetic: Arithmetic = ARITHMETICS["float32"],
        mode: str | dict[int, int] = "up",
        order: str = ORDERS[0],
        fused: bool = False,
        bias_first: bool = False,
        formula: int = 0,
        size: int = 1,
    ) -> None:
        self.arithmetic, self.mode, self.order = arithmetic, mode, order
        self.fused, self.bias_first, self.formula, self.size = fused, bias_first, formula, size
        self.random, self.roundings = np.random.default_rng(0), 0
        self.rounded = np.frompyfunc(self._rounded, 1, 1)
        to_nearest = arithmetic.stored / (1 + arithmetic.stored)
        self.stored = np.frompyfunc(lambda value: self._erroneous(value, to_nearest), 1, 1)

    def _rounded(self, value: Fraction) -> Fraction:
        return self._erroneous(value, self.arithmetic.unit)

    def _erroneous(self, value: Fraction, error: Fraction) -> Fraction:
        if not error:
            return value
        sign = self._sign(value)
        self.roundings += 1
        return _cut(value * (1 + sign * self.size * error * (1 - Fraction(1, 2**64))))

    def _sign(self, value: Fraction) -> int:
        if isinstance(self.mode, dict):
            return self.mode.get(self.roundings, 0)
        upwards = 1 if value >= 0 else -1
        return {
            "up": upwards,
            "down": -upwards,
            "away from zero": 1,
            "towards zero": -1,
            "alternating": (-1) ** self.roundings,
            "random": int(self.random.choice([-1, 1])),
        }[self.mode]

    def constant(self, value: Tensor | float) -> Values:
        """As it is stored: rounded, to be sure."""
        return self.stored(self.rounded(exactly(value)))

    def product(self, x: Values, weight: Values) -> Values:
        """One of a sum: its operands are rounded first."""
        error = self.arithmetic.operands
        exact = np.frompyfunc(lambda value: self._erroneous(value, error), 1, 1)(x * weight)
        return exact if self.fused else self.rounded(exact)

    def sum(self, terms: list[Values]) -> Values:
        terms = list(terms)
        while len(terms) > 1:
            if self.order == "pairwise":
                pairs = zip(terms[::2], terms[1::2], strict=False)
                terms = [self.rounded(x + y) for x, y in pairs] + terms[len(terms) // 2 * 2 :]
            else:
                terms[:2] = [self.rounded(terms[0] + terms[1])]
        return terms[0]

    def root(self, x: Values) -> Values:
        """Of one unit in the last place more than a correctly rounded one."""
        return self.rounded(self.rounded(np.frompyfunc(_root, 1, 1)(x)))


def _cut(value: Fraction) -> Fraction:
    """Towards zero, to so many bits that it is nothing beside a rounding error: exact numbers would grow and grow."""
    size, denominator = abs(value.numerator), value.denominator
    shift = KEPT_BITS - size.bit_length() + denominator.bit_length()
    if shift <= 0:
        return value
    kept = Fraction((size << shift) // denominator, 1 << shift)
    return kept if value > 0 else -kept


def _root(value: Fraction) -> Fraction:
    shift = 4 ** (KEPT_BITS + value.denominator.bit_length())
    return Fraction(math.isqrt(int(value * shift)), math.isqrt(shift))


def exactly(value: Tensor | float) -> Values:
    if isinstance(value, Tensor):
        flat = np.array([Fraction(number) for number in value.detach().double().flatten().tolist()], dtype=object)
        return flat.reshape(tuple(value.shape))
    return np.array(Fraction(value), dtype=object)


# --- the operations by hand -------------------------------------------------------------------------------------------


def moves(function: Callable[..., Tensor]) -> Callable[..., Values]:
    def by_hand(a: Adversary, x: Values, *settings) -> Values:
        numbers = torch.arange(x.size).reshape(x.shape)
        return x.reshape(-1)[function(numbers, *settings).numpy()]

    return by_hand


def coefficients(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Values, tuple[int, ...]]:
    """(inputs, outputs) of a linear map of one image, each a single weight and so exact; and the result's shape."""
    size = math.prod(shape)
    columns = function(torch.eye(size, dtype=torch.float64).view(size, *shape))
    return columns.flatten(1), (1, *columns.shape[1:])


def sum_of_products(a: Adversary, x: Values, columns: Tensor, bias: Values | None) -> Values:
    """(outputs,)"""
    results = []
    for output in range(columns.shape[1]):
        used = columns[:, output].nonzero()[:, 0]
        if len(used) == 0:
            results.append(Fraction(0) if bias is None else bias[output])
            continue
        terms = list(a.product(x.reshape(-1)[used.numpy()], exactly(columns[used, output])))
        if bias is not None:
            terms.insert(0 if a.bias_first else len(terms), bias[output])
        results.append(a.sum(terms))
    return np.array(results, dtype=object)


def weighted(function: Callable[..., Tensor]) -> Callable[..., Values]:
    def by_hand(a: Adversary, x: Values, weight: Tensor, bias: Tensor | None, *settings) -> Values:
        columns, shape = coefficients(lambda e: function(e, weight.double(), None, *settings), x.shape[1:])
        if bias is not None:
            zeros = torch.zeros(1, *x.shape[1:], dtype=torch.float64)
            bias = exactly(function(zeros, weight.double(), bias.double(), *settings).flatten())
        return a.stored(sum_of_products(a, x, columns, bias)).reshape(shape)

    return by_hand


def matrix_product(function: Callable[..., Tensor]) -> Callable[..., Values]:
    def by_hand(a: Adversary, x, y, *settings) -> Values:
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            return product_of_matrices(a, x, y)
        value, matrix = (x, y) if isinstance(x, np.ndarray) else (y, x)
        order = (lambda e: (e, matrix.double())) if value is x else (lambda e: (matrix.double(), e))
        columns, shape = coefficients(lambda e: function(*order(e), *settings), value.shape[1:])
        return a.stored(sum_of_products(a, value, columns, None)).reshape(shape)

    return by_hand


def einstein_sum(a: Adversary, x, y, equation: str) -> Values:
    x, y = (value if isinstance(value, np.ndarray) else exactly(value) for value in (x, y))
    inputs, output = equation.split("->")
    first, second = inputs.split(",")
    sizes = dict(zip(first + second, x.shape + y.shape, strict=True))
    summed = [letter for letter in sizes if letter not in output]
    result = np.empty([sizes[letter] for letter in output], dtype=object)
    for place in np.ndindex(*result.shape):
        terms = []
        for inner in np.ndindex(*(sizes[letter] for letter in summed)):
            at = dict(zip([*output, *summed], place + inner, strict=True))
            one, other = (part[tuple(at[letter] for letter in term)] for part, term in ((x, first), (y, second)))
            terms.append(a.product(np.array(one, dtype=object), np.array(other, dtype=object)))
        result[place] = a.sum(terms)
    return a.stored(result)


def product_of_matrices(a: Adversary, x: Values, y: Values) -> Values:
    terms = [a.product(x[..., :, k, None], y[..., None, k, :]) for k in range(x.shape[-1])]
    return a.stored(a.sum(terms))


def softmax(a: Adversary, x: Values, dim: int) -> Values:
    """Over the last axis, of exponentials that are four units in the last place off."""
    assert dim == -1

    def exponential(value: Fraction) -> Fraction:
        with localcontext(prec=60, Emin=-(10**6)):
            exact = (Decimal(value.numerator) / Decimal(value.denominator)).exp()
        return a._erroneous(Fraction(exact), 8 * a.arithmetic.unit)

    terms = np.frompyfunc(exponential, 1, 1)(a.rounded(x - x.max(-1, keepdims=True)))
    total = a.sum([terms[..., k, None] for k in range(x.shape[-1])])
    return a.stored(a.rounded(terms * a.rounded(1 / total)) if a.fused else a.rounded(terms / total))


def mean_of(a: Adversary, x: Values) -> Values:
    return a.rounded(a.sum([x[..., k, None] for k in range(x.shape[-1])]) / x.shape[-1])


def variance(a: Adversary, x: Values, mean: Values) -> Values:
    """In two passes, or by Welford's recurrence."""
    if not a.fused:
        return mean_of(a, a.rounded(a.rounded(x - mean) ** 2))
    so_far, squares = x[..., :1], x[..., :1] * 0
    for k in range(1, x.shape[-1]):
        apart = a.rounded(x[..., k, None] - so_far)
        so_far = a.rounded(so_far + a.rounded(apart / (k + 1)))
        squares = a.rounded(squares + a.rounded(apart * a.rounded(x[..., k, None] - so_far)))
    return a.rounded(squares / x.shape[-1])


def normalized_by_hand(
    a: Adversary, d: Values, factor: Values, x: Values, dims: tuple[int, ...], eps: float, by_squares: bool = False
) -> Values:
    """From x alone, as a LayerNorm that is one operation; its parts are not stored."""
    assert dims == (-1,)
    mean = mean_of(a, x) if d is not x else x[..., :1] * 0
    spread = variance(a, x, mean) if d is not x else mean_of(a, a.rounded(x * x))
    if by_squares and a.order == "pairwise":
        spread = a.rounded(mean_of(a, a.rounded(x * x)) - a.rounded(mean * mean))
    inverse = a.rounded(1 / a.root(a.rounded(spread + a.rounded(exactly(eps)))))
    if a.bias_first:
        return a.stored(a.rounded(a.rounded(x * inverse) - a.rounded(mean * inverse)))
    return a.stored(a.rounded(a.rounded(x - mean) * inverse))


def average(function: Callable[..., Tensor]) -> Callable[..., Values]:
    """The sum, then the quotient; or the reciprocal's product with each."""

    def by_hand(a: Adversary, x: Values, *settings) -> Values:
        columns, shape = coefficients(lambda e: function(e, *settings), x.shape[1:])
        results = []
        for output in range(columns.shape[1]):
            used = columns[:, output].nonzero()[:, 0]
            terms = x.reshape(-1)[used.numpy()]
            divisors = [Fraction(round(1 / share)) for share in columns[used, output].tolist()]
            if not divisors:
                results.append(Fraction(0))
            elif a.fused:
                reciprocals = a.rounded(1 / np.array(divisors, dtype=object))
                results.append(a.sum(list(a.rounded(terms * reciprocals))))
            else:
                results.append(a.rounded(a.sum(list(terms)) / divisors[0]))
        return a.stored(np.array(results, dtype=object)).reshape(shape)

    return by_hand


def batch_norm(a: Adversary, x: Values, m, v, w, b, training, momentum, eps) -> Values:
    m, v, w, b = (exactly(p).reshape(1, -1, *[1] * (x.ndim - 2)) if p is not None else None for p in (m, v, w, b))
    w = np.array(Fraction(1), dtype=object) if w is None else w
    b = np.array(Fraction(0), dtype=object) if b is None else b
    r, one = a.rounded, Fraction(1)
    root = a.root(r(v + a.rounded(exactly(eps))))
    inverse = r(one / root)
    scale = r(w * inverse)
    result = [
        lambda: r(r(x * scale) + r(b - r(m * scale))),
        lambda: r(r(r(r(x - m) * inverse) * w) + b),
        lambda: r(r(r(x - m) * scale) + b),
        lambda: r(r(r(r(x - m) / root) * w) + b),
        lambda: r(r(w * r(r(x - m) * inverse)) + b),
    ][a.formula]()
    return a.stored(result)


def sum_of_two(sign: int) -> Callable[..., Values]:
    def by_hand(a: Adversary, x, y, alpha=1) -> Values:
        x, y = (value if isinstance(value, np.ndarray) else a.constant(value) for value in (x, y))
        if alpha != 1:
            y = a.rounded(a.rounded(exactly(alpha)) * y)
        return a.stored(a.rounded(x + sign * y))

    return by_hand


def product_of_two(a: Adversary, x, y) -> Values:
    x, y = (value if isinstance(value, np.ndarray) else a.constant(value) for value in (x, y))
    return a.stored(a.rounded(x * y))


def quotient(a: Adversary, x: Values, y) -> Values:
    divisor = a.constant(y)
    return a.stored(a.rounded(x * a.rounded(1 / divisor)) if a.fused else a.rounded(x / divisor))


def leaky_relu(a: Adversary, x: Values, slope: float) -> Values:
    below = a.rounded(x * a.rounded(exactly(slope)))
    return a.stored(np.where(x > 0, x, below))


def chosen(function: Callable[..., Tensor]) -> Callable[..., Values]:
    """Comparisons are exact, so that the place of the largest can be found among ranks."""

    def by_hand(a: Adversary, x: Values, *settings) -> Values:
        order = sorted(set(x.reshape(-1).tolist()))
        ranks = torch.tensor([order.index(value) for value in x.reshape(-1).tolist()], dtype=torch.float64)
        largest = function(ranks.view(x.shape), *settings)
        return np.array(order, dtype=object)[largest.long().numpy()]

    return by_hand


def extremum(choose: Callable[[Values, Values], Values]) -> Callable[..., Values]:
    def by_hand(a: Adversary, x, y) -> Values:
        return choose(*(value if isinstance(value, np.ndarray) else a.constant(value) for value in (x, y)))

    return by_hand


def clamped(a: Adversary, x: Values, lower: float | None, upper: float | None) -> Values:
    x = x if lower is None else np.maximum(x, a.constant(lower))
    return x if upper is None else np.minimum(x, a.constant(upper))


def hard_sigmoid(a: Adversary, x: Values) -> Values:
    return a.stored(sixth(a, relu6(a.rounded(x + 3))))


def hard_swish(a: Adversary, x: Values) -> Values:
    return a.stored(sixth(a, a.rounded(x * relu6(a.rounded(x + 3)))))


def sixth(a: Adversary, x: Values) -> Values:
    return a.rounded(x * a.rounded(exactly(Fraction(1, 6)))) if a.fused else a.rounded(x / 6)


def relu6(x: Values) -> Values:
    return np.minimum(np.maximum(x, Fraction(0)), Fraction(6))


def prelu(a: Adversary, x: Values, weight: Tensor) -> Values:
    slope = a.constant(weight).reshape(1, -1, *[1] * (x.ndim - 2))
    return a.stored(np.where(x > 0, x, a.rounded(x * slope)))


def resized(a: Adversary, x: Values, *settings) -> Values:
    """With the places of the nearest as float32 has them."""
    numbers = torch.arange(x.size, dtype=torch.float32).reshape(x.shape)
    return x.reshape(-1)[F.interpolate(numbers, *settings).long().numpy()]


def joined(a: Adversary, parts, dim: int) -> Values:
    return np.concatenate([part if isinstance(part, np.ndarray) else a.constant(part) for part in parts], dim)


def padded(a: Adversary, x: Values, *settings) -> Values:
    numbers = F.pad(torch.arange(1, x.size + 1).reshape(x.shape).double(), *settings).long()
    return np.concatenate([np.array([Fraction(0)], dtype=object), x.reshape(-1)])[numbers.numpy()]


BY_HAND: dict[Callable, Callable[..., Values]] = {
    torch.softmax: softmax,
    attend: product_of_matrices,
    torch.square: lambda a, x: a.stored(a.rounded(x * x)),
    deviation: lambda a, x, dims: a.rounded(x - mean_of(a, x)),
    inverse_root: lambda a, x, eps: a.rounded(1 / a.root(a.rounded(x + a.rounded(exactly(eps))))),
    normalized: normalized_by_hand,
    **{function: weighted(function) for function in WEIGHTED},
    torch.matmul: matrix_product(torch.matmul),
    einsum: einstein_sum,
    **{function: moves(function) for function in EXACT},
    **{
        function: average(function)
        for function in (
            F.avg_pool1d,
            F.avg_pool2d,
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
            F.avg_pool3d,
            Tensor.mean,
            Tensor.sum,
        )
    },
    **{
        function: chosen(function)
        for function in (
            F.max_pool1d,
            F.max_pool2d,
            F.max_pool3d,
            F.adaptive_max_pool1d,
            F.adaptive_max_pool2d,
            torch.amax,
            torch.amin,
        )
    },
    F.relu6: lambda a, x: relu6(x),
    F.hardsigmoid: hard_sigmoid,
    F.hardswish: hard_swish,
    torch.sqrt: lambda a, x: a.stored(a.root(x)),
    torch.rsqrt: lambda a, x: a.stored(a.rounded(1 / a.root(x))),
    torch.reciprocal: lambda a, x: a.stored(a.rounded(1 / x)),
    F.prelu: prelu,
    torch.clamp: clamped,
    F.hardtanh: clamped,
    torch.abs: lambda a, x: abs(x),
    torch.maximum: extremum(np.maximum),
    torch.minimum: extremum(np.minimum),
    resize: resized,
    F.relu: lambda a, x: np.where(x > 0, x, Fraction(0)),
    F.leaky_relu: leaky_relu,
    F.batch_norm: batch_norm,
    F.pad: padded,
    add: sum_of_two(1),
    sub: sum_of_two(-1),
    torch.mul: product_of_two,
    torch.div: quotient,
    torch.neg: lambda a, x: -x,
    cat: joined,
    cast: lambda a, x, dtype=None: a.stored(a.rounded(x)),
}


class ByHand:
    """Walks one image through a network, every operation by hand (a `graph.Transform`)."""

    settled: dict = {}  # noqa: RUF012

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary

    def apply(self, call: Call, args: tuple) -> Values:
        return BY_HAND[call.function](self.adversary, *args)

    def clean(self, value: Values) -> None:
        return None

    def like(self, value: Values) -> Tensor:
        return torch.empty(value.shape)


# --- a network of one operation for each ------------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, function: Callable, constant: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("c", torch.zeros(1) if constant is None else constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def spread(*shape: int) -> Tensor:
    """Numbers of both signs, over six orders of magnitude."""
    return torch.randn(shape) * 10.0 ** torch.randint(-3, 4, shape)


def spread_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread(*parameter.shape))
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(spread(*module.running_mean.shape))
            module.running_var.copy_(spread(*module.running_var.shape).abs())
    return module


SHAPE = (2, 4, 4)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 2), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 2, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(2, 2, 3, 2, 1), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3, 2, 1, groups=2), SHAPE),
    "conv3d": (lambda: nn.Conv3d(1, 1, 2), (1, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 2, 3, 2), (2, 3)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 2, 2, groups=2), (2, 2, 2)),
    "matmul": (lambda: One(lambda self, x: x @ self.c, spread(4, 3)), SHAPE),
    "matmul from the left": (lambda: One(lambda self, x: self.c @ x, spread(3, 4)), SHAPE),
    "einsum": (lambda: One(lambda self, x: torch.einsum("bchw,cd->bdhw", x, self.c), spread(2, 3)), SHAPE),
    "einsum over a letter of one": (
        lambda: One(lambda self, x: torch.einsum("bij,i->bi", x, self.c), spread(3)),
        (3, 9),
    ),
    "avg_pool2d, one size in a tuple": (lambda: nn.AvgPool2d((4,)), SHAPE),
    "avg_pool1d": (lambda: nn.AvgPool1d(3, 2, 1), (2, 6)),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), SHAPE),
    "avg_pool2d, great divisor": (lambda: nn.AvgPool2d(2, divisor_override=2**40), SHAPE),
    "adaptive_avg_pool1d": (lambda: nn.AdaptiveAvgPool1d(4), (2, 6)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(3), SHAPE),
    "mean": (lambda: One(lambda self, x: x.mean((1, 3))), SHAPE),
    "sum": (lambda: One(lambda self, x: x.sum(2)), SHAPE),
    "max_pool1d": (lambda: nn.MaxPool1d(2), (2, 6)),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 2, 1), SHAPE),
    "max_pool3d": (lambda: nn.MaxPool3d(2), (1, 2, 4, 2)),
    "avg_pool3d": (lambda: nn.AvgPool3d(2), (1, 2, 4, 2)),
    "adaptive_avg_pool3d": (lambda: nn.AdaptiveAvgPool3d((1, 3, 2)), (1, 2, 4, 2)),
    "adaptive_max_pool": (
        lambda: nn.Sequential(nn.AdaptiveMaxPool2d((3, 2)), nn.Flatten(2), nn.AdaptiveMaxPool1d(4)),
        SHAPE,
    ),
    "amax": (lambda: One(lambda self, x: torch.cat([x.amax((1, 3)), x.amin(2).flatten(1)], 1)), SHAPE),
    "abs": (lambda: One(lambda self, x: x.abs()), SHAPE),
    "relu6": (lambda: nn.ReLU6(), SHAPE),
    "hardsigmoid": (lambda: nn.Hardsigmoid(), SHAPE),
    "hardswish": (lambda: nn.Hardswish(), SHAPE),
    "roots": (lambda: One(lambda self, x: torch.cat([x.sqrt(), x.rsqrt(), x.reciprocal()], 1)), SHAPE),
    "prelu": (lambda: nn.PReLU(2), SHAPE),
    "clamp": (lambda: One(lambda self, x: x.clamp(-0.1, 0.7).clamp(max=0.3)), SHAPE),
    "hardtanh": (lambda: nn.Hardtanh(-0.3, 0.1), SHAPE),
    "maximum": (lambda: One(lambda self, x: torch.maximum(x, self.c), spread(2, 4, 4)), SHAPE),
    "minimum": (lambda: One(lambda self, x: torch.minimum(x, x.transpose(2, 3)), spread(2, 4, 4)), SHAPE),
    "interpolate": (lambda: nn.Upsample(size=(82, 7)), (1, 2, 4)),
    "interpolate, exact": (
        lambda: nn.Upsample(scale_factor=2.3, mode="nearest-exact", recompute_scale_factor=True),
        (1, 2, 16),
    ),
    "more moves": (
        lambda: One(
            lambda self, x: torch.cat(
                [
                    x.flip(1).roll(1, 2).flatten(1),
                    x.narrow(2, 1, 2).select(3, 0).flatten(1),
                    x.index_select(1, self.c).movedim(1, 2).flatten(1),
                    torch.tile(x, (1, 1, 2)).repeat(1, 2, 1, 1).flatten(1),
                    x[:, :1].expand(-1, 3, -1, -1).flatten(1),
                    F.pixel_unshuffle(F.pixel_shuffle(x.reshape(-1, 8, 2, 2), 2), 2).flatten(1),
                    F.channel_shuffle(x, 2).flatten(1),
                ],
                1,
            ),
            torch.tensor([1, 0]),
        ),
        SHAPE,
    ),
    "relu": (lambda: nn.ReLU(), SHAPE),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), SHAPE),
    "batch_norm": (lambda: nn.BatchNorm2d(2), SHAPE),
    "batch_norm, 1d, without parameters": (lambda: nn.BatchNorm1d(6, affine=False), (6,)),
    "pad": (lambda: One(lambda self, x: F.pad(x, (1, 0, 0, 2))), SHAPE),
    "add": (lambda: One(lambda self, x: x + self.c, spread(2, 4, 4)), SHAPE),
    "add a number": (lambda: One(lambda self, x: 0.1 + x), SHAPE),
    "add, alpha": (lambda: One(lambda self, x: torch.add(x, self.c, alpha=0.7), spread(2, 4, 4)), SHAPE),
    "add two values": (lambda: One(lambda self, x: torch.add(x, x.transpose(2, 3), alpha=0.3)), SHAPE),
    "sub": (lambda: One(lambda self, x: self.c - x, spread(2, 4, 4)), SHAPE),
    "sub, alpha": (lambda: One(lambda self, x: torch.sub(x, self.c, alpha=-0.7), spread(2, 4, 4)), SHAPE),
    "mul": (lambda: One(lambda self, x: x * self.c, spread(2, 4, 4)), SHAPE),
    "mul by a number": (lambda: One(lambda self, x: 0.3 * x), SHAPE),
    "div": (lambda: One(lambda self, x: x / self.c, spread(2, 4, 4)), SHAPE),
    "neg": (lambda: One(lambda self, x: -x), SHAPE),
    "mul of two values": (lambda: One(lambda self, x: x * x.flip(1)), SHAPE),
    "matmul of two values": (lambda: One(lambda self, x: x @ x.transpose(2, 3)), SHAPE),
    "einsum of two values": (lambda: One(lambda self, x: torch.einsum("bij,bjk->bik", x, x)), (4, 4)),
    "einsum of two values over a letter of one": (
        lambda: One(lambda self, x: torch.einsum("bi,bij->bi", x[:, :, 0], x)),
        (3, 9),
    ),
    "square": (lambda: One(lambda self, x: x * x + x.square()), SHAPE),
    "softmax": (lambda: One(lambda self, x: x.softmax(-1) * 2), SHAPE),
    "attention": (lambda: One(lambda self, x: (x * 0.01).softmax(-1) @ x), SHAPE),
    "layer norm": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4, affine=False), (4, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(2), (2, 6)),
    "rms norm": (lambda: nn.RMSNorm(6, eps=0.1, elementwise_affine=False), (2, 6)),
    "cat": (
        lambda: One(lambda self, x: torch.cat([x, self.c.expand(x.size(0), -1, -1, -1)], 1), spread(1, 1, 4, 4)),
        SHAPE,
    ),
    "cast": (lambda: One(lambda self, x: x.double().to(torch.float32)), SHAPE),
    "reshaping": (
        lambda: One(
            lambda self, x: torch.cat(
                [x.permute(0, 2, 1, 3).flatten(1), x.transpose(1, 2).contiguous().view(x.size(0), -1)], 1
            ).unflatten(1, (4, 16))[:, 1:]
        ),
        SHAPE,
    ),
    "parts": (
        lambda: One(
            lambda self, x: (
                torch.cat([x.chunk(2, 1)[1], x.split([1, 1], 1)[0], x.unbind(1)[1].unsqueeze(1)], 1)
                .squeeze(-2)
                .clone()
                .detach()
            )
        ),
        SHAPE,
    ),
}
IDENTITIES = {function for function in EXACT if function.__name__ == "identity"}  # left out as a network is recorded


def setting(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, shape = CASES[name]
    module, x = spread_(make()).eval(), spread(1, *shape)
    return module, x.abs() if name == "roots" else x


EXACT_CASES = {"neg", "abs", "pad", "relu", "relu6", "amax", "minimum", "reshaping", "parts", "more moves"}
ROUNDING = [name for name in CASES if name not in EXACT_CASES and "max_pool" not in name and "interpolate" not in name]


def adversaries(arithmetic: str, formulas: int = 1) -> list[Adversary]:
    rest = itertools.product(ORDERS, (False, True), (False, True)) if formulas == 1 else [(ORDERS[0], False, False)]
    kinds = list(itertools.product(MODES, rest, range(formulas)))
    return [
        Adversary(ARITHMETICS[arithmetic], mode, order, fused, first, formula)
        for mode, (order, fused, first), formula in kinds
    ]


def outside(box: Box, values: Values) -> int:
    pairs = zip(values.reshape(-1), box.lower.flatten().tolist(), box.upper.flatten().tolist(), strict=True)
    return sum(not ((low == -math.inf or Fraction(low) <= v) and (high == math.inf or v <= Fraction(high)))
               for v, low, high in pairs)  # fmt: skip


def sound_box(net: BoundedModel, x: Tensor, arithmetic: str) -> Box:
    return net.ibp(enclosing_linf_box(x, 0.0, clip=None), arithmetic=arithmetic).output
