"""LayerNorm, GroupNorm, InstanceNorm, RMSNorm: a value divided by the root of its own mean square.

All of them are recorded as the same few operations: deviations d from the mean, an affine map (not of RMSNorm); the
factor r = 1 / √(mean(d²) + ε), by a square, a mean and `inverse_root`; the product d·r, `normalized`; a scale and a
shift. Backward passes go through these one by one. The interval of the product looks at d alone, for which

    z_k = d_k / √((d_k² + Σ_{j≠k} d_j²) / n + ε)

grows with d_k, and falls (d_k > 0) or grows (d_k < 0) with the other squares: its range over a box of d is at the ends
of d_k with the least or the greatest sum of the others. It is exact where every d_j can take each of its values beside
the others', in RMSNorm; elsewhere it is no looser than deviation, square, mean, root and division one after the other,
which would allow the d_k² below the root to be another than the one above it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds.bilinear import squared
from certtrain.bounds.box import Box
from certtrain.bounds.operations.arithmetic import add
from certtrain.bounds.operations.movement import reshape
from certtrain.bounds.operations.preconditions import batched, require_that
from certtrain.bounds.operations.record import (
    DECOMPOSITIONS,
    MODULE_DECOMPOSITIONS,
    Affine,
    Convex,
    ModuleCalls,
    Shape,
    define,
)
from certtrain.errors import UnsupportedOperation

Dims = tuple[int, ...]  # the last axes of a value, counted from behind

# --- the three operations ---------------------------------------------------------------------------------------------


def deviation(x: Tensor, dims: Dims) -> Tensor:
    """x - mean(x)."""
    return x - x.mean(dims, keepdim=True)


def inverse_root(mean_square: Tensor, eps: float) -> Tensor:
    """1 / √(x + ε) of an x that is a mean of squares, and not below 0 whatever a bound says of it."""
    return (mean_square.clamp(min=0) + eps).rsqrt()


def _slope(mean_square: Tensor, eps: float) -> Tensor:
    return -0.5 * inverse_root(mean_square, eps) ** 3


def normalized(d: Tensor, factor: Tensor, x: Tensor, dims: Dims, eps: float, by_squares: bool = False) -> Tensor:
    """d · factor, where factor = 1 / √(mean(d²) + ε); x is what the d are deviations of, or d itself.

    by_squares: mean(d²) may be computed as mean(x²) - mean(x)², which in floating point is another thing.
    """
    return d * factor


def _require_epsilon(x: Any, eps: Any) -> None:
    require_that(eps > 0, f"eps={eps!r} has no rule: it must be above 0")


def _require_values(*args: Any) -> None:
    require_that(all(isinstance(value, Shape) for value in args[:3]), "what it divides by does not depend on the input")


def _require_dims(x: Any, dims: Any) -> None:
    require_that(len(dims) < x.dims, "it goes over all axes, the batch axis among them, and would mix images")


define(deviation, lambda x, dims: (x, dims), affine=Affine.FIRST, require=_require_dims)
define(
    inverse_root,
    lambda x, eps: (x, eps),
    elementwise=True,
    decreasing=True,
    curve=Convex(_slope, least=0.0),
    require=_require_epsilon,
)
define(normalized, lambda *args: args, operands=3, require=_require_values)


def deviation_box(x: Box, dims: Dims) -> Box:
    """x_k counts with weight 1 - 1/n in its own deviation, every other with -1/n."""
    count = count_of(x.like, dims)
    return Box.around(deviation(x.center, dims), (1 - 2 / count) * x.radius + x.radius.mean(dims, keepdim=True))


def normalized_box(d: Box, factor: Box, x: Box, dims: Dims, eps: float, by_squares: bool = False) -> Box:
    """See the head of this file."""
    squares, count = squared(d), count_of(d.like, dims)
    least, most = (sum_of_others(part, dims) for part in (squares.lower, squares.upper))

    def end(of: Tensor, others_if_positive: Tensor, others_if_negative: Tensor) -> Tensor:
        others = torch.where(of >= 0, others_if_positive, others_if_negative)
        return of * ((of.square() + others) / count + eps).rsqrt()

    return Box(end(d.lower, most, least), end(d.upper, least, most))


def count_of(x: Tensor, dims: Dims) -> int:
    """Elements that a mean is taken over."""
    return x.shape[-len(dims) :].numel()


def sum_of_others(squares: Tensor, dims: Dims) -> Tensor:
    """The sum of all others, for each: of the largest on its own, where its part in the whole sum would drown them."""
    flat = squares.flatten(-len(dims))
    top = flat.detach().argmax(-1, keepdim=True)
    without_top = flat.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    others = flat.sum(-1, keepdim=True) - flat
    return others.scatter(-1, top, without_top).view(squares.shape)


def with_batch_axis(x: Tensor, dims: int) -> Tensor:
    return x


define(
    with_batch_axis,
    lambda x, dims: (x, dims),
    affine=Affine.FIRST,
    reshaping=True,
    view=True,
    require=lambda x, dims: batched(dims)(x),
)

# --- the layers, by these ---------------------------------------------------------------------------------------------


def _normalize(call: Any, x: Any, dims: Dims, eps: float, centered: bool = True, by_squares: bool = False) -> Any:
    d = call(deviation, x, dims) if centered else x
    mean_square = call(Tensor.mean, call(torch.square, d), dims, True)
    return call(normalized, d, call(inverse_root, mean_square, eps), x, dims, eps, by_squares)


def _scaled(call: Any, x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else call(torch.mul, x, weight)
    return x if bias is None else call(add, x, bias, 1)


def _last(call: Any, normalized_shape: Any) -> Any:
    """The axes of that shape; counted in the walk where the network asks its input for it, as by `x.shape[1:]`."""
    return _axes(normalized_shape) if isinstance(normalized_shape, list | tuple) else call(_axes, normalized_shape)


def _axes(shape: Sequence[int]) -> Dims:
    return tuple(range(-len(shape), 0))


def layer_norm(
    call: Any, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    return _scaled(call, _normalize(call, input, _last(call, normalized_shape), eps), weight, bias)


def rms_norm(call: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if eps is None:
        raise UnsupportedOperation("RMSNorm without eps has that of the type it is computed in: give it one")
    return _scaled(call, _normalize(call, input, _last(call, normalized_shape), eps, centered=False), weight, None)


def group_norm(call: Any, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """(B, C, ...) as (B, groups, rest) for the statistics, as (B, C, rest) for weight and bias.

    PyTorch takes the variance of images that are stored channels last by squares.
    """
    shape = call(getattr, input, "shape")
    images, channels = (call(operator.getitem, shape, axis) for axis in (0, 1))
    grouped = _normalize(call, call(reshape, input, (images, num_groups, -1)), (-1,), eps, by_squares=True)
    weight, bias = (value if value is None else call(reshape, value, (-1, 1)) for value in (weight, bias))
    scaled = _scaled(call, call(reshape, grouped, (images, channels, -1)), weight, bias)
    return call(reshape, scaled, shape)


def instance_norm(
    call: Any,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return call(F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    require_that(running_mean is None, "InstanceNorm that updates running statistics has no rule: call model.eval()")
    return group_norm(call, input, call(operator.getitem, call(getattr, input, "shape"), 1), weight, bias, eps)


DECOMPOSITIONS |= {
    F.layer_norm: layer_norm,
    torch.layer_norm: lambda call, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: (
        layer_norm(call, input, normalized_shape, weight, bias, eps)
    ),
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
}


def _rms_epsilon(m: Any) -> float | None:
    """By default that of the network's type, whatever type its bounds are computed in."""
    return m.eps if m.eps is not None or m.weight is None else torch.finfo(m.weight.dtype).eps


def _affine(modules: ModuleCalls, m: Any) -> tuple[Any, Any]:
    return modules.parameter(m, "weight"), modules.parameter(m, "bias")


def _instance_norm(dims: int) -> Any:
    def decomposition(modules: ModuleCalls, m: Any, input: Any) -> Any:
        mean, variance = modules.parameter(m, "running_mean"), modules.parameter(m, "running_var")
        weight, bias = _affine(modules, m)
        input = modules.call(with_batch_axis, input, dims)
        uses_input = m.training or not m.track_running_stats
        momentum = m.momentum or 0.0
        return instance_norm(modules.call, input, mean, variance, weight, bias, uses_input, momentum, m.eps)

    return decomposition


MODULE_DECOMPOSITIONS |= {
    nn.LayerNorm: lambda modules, m, input: layer_norm(
        modules.call, input, m.normalized_shape, *_affine(modules, m), m.eps
    ),
    nn.RMSNorm: lambda modules, m, input: rms_norm(
        modules.call, input, m.normalized_shape, modules.parameter(m, "weight"), _rms_epsilon(m)
    ),
    nn.GroupNorm: lambda modules, m, input: group_norm(modules.call, input, m.num_groups, *_affine(modules, m), m.eps),
}
for _dims, _module in ((3, nn.InstanceNorm1d), (4, nn.InstanceNorm2d), (5, nn.InstanceNorm3d)):
    MODULE_DECOMPOSITIONS[_module] = _instance_norm(_dims)
