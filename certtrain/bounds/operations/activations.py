"""The records of elementwise functions: their spellings, and what is known of their graphs. (See `record.py`.)

Intervals follow from where a function grows and falls, linear relaxations from its curve. A new one is a few lines.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds.operations.preconditions import first_alone, has_batch_axis, only, require_that
from certtrain.bounds.operations.record import (
    DECOMPOSITIONS,
    WRITES,
    Concave,
    Convex,
    PiecewiseLinear,
    Smooth,
    SShaped,
    define,
)

_ELEMENTWISE = {"elementwise": True}
_GROWS = {"elementwise": True, "increasing": True}


def _bind_input(input: Any, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return (input,)


def _bind_activation(input: Any, inplace: bool = False) -> tuple[Any, ...]:
    return (input,)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _require_number(name: str, value: Any, least: float = -math.inf) -> None:
    require_that(_number(value) and value >= least, f"{name}={value!r} has no rule: it must be a number >= {least}")


# --- piecewise linear -------------------------------------------------------------------------------------------------


def _bind_leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> tuple[Any, ...]:
    return input, negative_slope


def _slope(x: Any, negative_slope: Any) -> None:
    first_alone(x, negative_slope)
    require_that(
        _number(negative_slope) and negative_slope >= 0,
        f"negative_slope={negative_slope!r} is not monotone and has no rule",
    )


define(
    F.relu,
    _bind_activation,
    functions=(torch.relu,),
    methods=("relu", "relu_"),
    writes=(torch.relu_, F.relu_),
    modules={nn.ReLU: lambda m: ()},
    rectifies=True,
    curve=PiecewiseLinear((0.0,)),
    **_GROWS,
)
define(
    F.leaky_relu,
    _bind_leaky_relu,
    writes=(F.leaky_relu_,),
    modules={nn.LeakyReLU: lambda m: (m.negative_slope,)},
    rectifies=True,
    require=_slope,
    curve=PiecewiseLinear((0.0,)),
    **_GROWS,
)


def _prelu_weight(x: Any, weight: Any) -> None:
    first_alone(x, weight)
    has_batch_axis(x)


define(
    F.prelu,
    lambda input, weight: (input, weight),
    functions=(torch.prelu,),
    methods=("prelu",),
    modules={nn.PReLU: lambda m: (m.weight,)},
    operands=2,
    rectifies=True,
    require=_prelu_weight,
    curve=PiecewiseLinear((0.0,)),
    **_ELEMENTWISE,
)
define(
    F.relu6,
    _bind_activation,
    modules={nn.ReLU6: lambda m: ()},
    rectifies=True,
    curve=PiecewiseLinear((0.0, 6.0)),
    **_GROWS,
)


def _ends(lower: Any, upper: Any) -> Sequence[float]:
    return [end for end in (lower, upper) if end is not None]


def _require_ends(x: Any, lower: Any, upper: Any) -> None:
    first_alone(x, lower, upper)
    for end in _ends(lower, upper):
        _require_number("an end", end)


def _bind_clamp(input: Any, min: Any = None, max: Any = None, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, min, max


def _bind_clamp_min(input: Any, min: Any, *, out: None = None) -> tuple[Any, ...]:
    return _bind_clamp(input, min, None, out=out)


def _bind_clamp_max(input: Any, max: Any, *, out: None = None) -> tuple[Any, ...]:
    return _bind_clamp(input, None, max, out=out)


define(
    torch.clamp,
    _bind_clamp,
    functions=(torch.clip, (torch.clamp_min, _bind_clamp_min), (torch.clamp_max, _bind_clamp_max)),
    methods=("clamp", "clip", ("clamp_min", _bind_clamp_min), ("clamp_max", _bind_clamp_max)),
    writes=(torch.clamp_, torch.clip_, (torch.clamp_min_, _bind_clamp_min), (torch.clamp_max_, _bind_clamp_max)),
    require=_require_ends,
    curve=PiecewiseLinear(_ends),
    **_GROWS,
)


def _bind_hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> tuple[Any, ...]:
    return input, min_val, max_val


define(
    F.hardtanh,
    _bind_hardtanh,
    writes=(F.hardtanh_,),
    modules={nn.Hardtanh: lambda m: (m.min_val, m.max_val)},
    require=_require_ends,
    curve=PiecewiseLinear(_ends),
    **_GROWS,
)
define(
    F.hardsigmoid,
    _bind_activation,
    modules={nn.Hardsigmoid: lambda m: ()},
    curve=PiecewiseLinear((-3.0, 3.0)),
    **_GROWS,
)
define(
    torch.abs,
    _bind_input,
    functions=(torch.absolute, (operator.abs, lambda x: (x,))),
    methods=("abs", "absolute", "__abs__"),
    writes=(torch.abs_,),
    minimum=0.0,
    curve=PiecewiseLinear((0.0,)),
    **_ELEMENTWISE,
)

# --- s-shaped ---------------------------------------------------------------------------------------------------------

define(
    torch.sigmoid,
    _bind_input,
    functions=(F.sigmoid,),
    methods=("sigmoid", "sigmoid_"),
    writes=(torch.sigmoid_,),
    modules={nn.Sigmoid: lambda m: ()},
    curve=SShaped(lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    **_GROWS,
)
define(
    torch.tanh,
    _bind_input,
    functions=(F.tanh,),
    methods=("tanh", "tanh_"),
    writes=(torch.tanh_,),
    modules={nn.Tanh: lambda m: ()},
    curve=SShaped(lambda x: 1 - torch.tanh(x).square()),
    **_GROWS,
)

# --- smooth, or with a kink at 0; growing -----------------------------------------------------------------------------


def _bind_elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> tuple[Any, ...]:
    return input, alpha


def _require_elu(x: Any, alpha: Any) -> None:
    first_alone(x, alpha)
    _require_number("alpha", alpha, 0.0)


def _require_celu(x: Any, alpha: Any) -> None:
    first_alone(x, alpha)
    require_that(_number(alpha) and alpha > 0, f"alpha={alpha!r} has no rule: it must be above 0")


define(
    F.elu,
    _bind_elu,
    writes=(F.elu_,),
    modules={nn.ELU: lambda m: (m.alpha,)},
    rectifies=True,
    require=_require_elu,
    curve=Smooth(lambda near, far, alpha: alpha * torch.exp(-near), kinks=(0.0,)),  # straight right of 0
    **_GROWS,
)
_SELU_SLOPE = 1.7581  # at 0, from the left: scale times alpha, rounded up
define(
    F.selu,
    _bind_activation,
    functions=(torch.selu,),
    writes=(torch.selu_, F.selu_),
    modules={nn.SELU: lambda m: ()},
    rectifies=True,
    curve=Smooth(lambda near, far: _SELU_SLOPE * torch.exp(-near), kinks=(0.0,)),
    **_GROWS,
)
define(
    F.celu,
    _bind_elu,
    functions=(torch.celu,),
    writes=(torch.celu_, F.celu_),
    modules={nn.CELU: lambda m: (m.alpha,)},
    rectifies=True,
    require=_require_celu,
    curve=Convex(),
    **_GROWS,
)


def _bind_softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> tuple[Any, ...]:
    return input, beta, threshold


def _require_softplus(x: Any, beta: Any, threshold: Any) -> None:
    """Where PyTorch returns x itself it leaves out less than 3e-9 / beta, an error like those of rounding."""
    first_alone(x, beta, threshold)
    require_that(_number(beta) and beta > 0, f"beta={beta!r} has no rule: it must be above 0")
    _require_number("threshold", threshold, 20.0)


define(
    F.softplus,
    _bind_softplus,
    modules={nn.Softplus: lambda m: (m.beta, m.threshold)},
    rectifies=True,
    require=_require_softplus,
    curve=Convex(),
    **_GROWS,
)
define(F.logsigmoid, lambda input: (input,), modules={nn.LogSigmoid: lambda m: ()}, curve=Concave(), **_GROWS)
define(
    torch.exp,
    _bind_input,
    methods=("exp",),
    writes=(torch.exp_,),
    curve=Convex(torch.exp),
    **_GROWS,
)
define(
    torch.sqrt,
    _bind_input,
    methods=("sqrt",),
    writes=(torch.sqrt_,),
    positive=True,
    curve=Concave(lambda x: 0.5 / x.sqrt()),
    **_GROWS,
)
define(
    torch.log,
    _bind_input,
    methods=("log",),
    writes=(torch.log_,),
    positive=True,
    curve=Concave(torch.reciprocal),
    **_GROWS,
)

# --- falling ----------------------------------------------------------------------------------------------------------

define(
    torch.reciprocal,
    _bind_input,
    methods=("reciprocal",),
    writes=(torch.reciprocal_,),
    positive=True,
    decreasing=True,
    curve=Convex(lambda x: -x.reciprocal().square()),
    **_ELEMENTWISE,
)
define(
    torch.rsqrt,
    _bind_input,
    methods=("rsqrt",),
    writes=(torch.rsqrt_,),
    positive=True,
    decreasing=True,
    curve=Convex(lambda x: -0.5 * x.rsqrt() / x),
    **_ELEMENTWISE,
)

# --- with one minimum -------------------------------------------------------------------------------------------------
# Minimisers to the last digit of float64. Bounds of |f''|(1 + x²) are the greatest values on a grid, rounded up.


def _falling_off(most: float) -> Any:
    """|f''(x)| <= most / (1 + x²)."""
    return lambda near, far, *settings: most / (1 + near.square())


def _require_approximation(x: Any, approximate: Any) -> None:
    first_alone(x, approximate)
    require_that(approximate in _GELU_MINIMA, f"approximate={approximate!r} has no rule")


_GELU_MINIMA = {"none": -0.7517915246935645, "tanh": -0.7524614220710162}


def gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


define(
    gelu,
    lambda input, approximate: (input, approximate),
    functions=((F.gelu, lambda input, *, approximate="none": (input, approximate)),),
    modules={nn.GELU: lambda m: (m.approximate,)},
    rectifies=True,
    require=_require_approximation,
    minimum=_GELU_MINIMA.__getitem__,
    curve=Smooth(_falling_off(0.8)),
    **_ELEMENTWISE,
)
define(
    F.silu,
    _bind_activation,
    modules={nn.SiLU: lambda m: ()},
    rectifies=True,
    minimum=-1.2784645427610738,
    curve=Smooth(_falling_off(0.61)),
    **_ELEMENTWISE,
)
define(
    F.mish,
    _bind_activation,
    modules={nn.Mish: lambda m: ()},
    rectifies=True,
    minimum=-1.1924312145154955,
    curve=Smooth(_falling_off(0.73)),
    **_ELEMENTWISE,
)
define(
    F.hardswish,
    _bind_activation,
    modules={nn.Hardswish: lambda m: ()},
    rectifies=True,
    minimum=-1.5,
    curve=Smooth(lambda near, far: torch.where(near >= 3, 0.0, 1 / 3), kinks=(-3.0, 3.0)),
    **_ELEMENTWISE,
)
define(
    torch.square,
    _bind_input,
    methods=("square",),
    writes=(torch.square_,),
    minimum=0.0,
    curve=Convex(lambda x: 2 * x),
    **_ELEMENTWISE,
)

LARGEST_EXPONENT = 16


def power(x: Tensor, exponent: int) -> Tensor:
    return x**exponent


def _require_exponent(x: Any, exponent: Any) -> None:
    first_alone(x, exponent)
    require_that(
        _number(exponent) and exponent == int(exponent) and 1 <= exponent <= LARGEST_EXPONENT,
        f"exponent={exponent!r} has no rule: it must be a whole number from 1 to {LARGEST_EXPONENT}",
    )


define(
    power,
    lambda input, exponent: (input, exponent),
    require=_require_exponent,
    minimum=lambda exponent: 0.0 if exponent % 2 == 0 else -math.inf,
    curve=Smooth(lambda near, far, exponent: exponent * (exponent - 1) * far ** max(exponent - 2, 0)),
    **_ELEMENTWISE,
)


def _decompose_power(call: Any, input: Any, exponent: Any, *, out: None = None) -> Any:
    only(out, None, "out")
    return call(torch.square, input) if _number(exponent) and exponent == 2 else call(power, input, exponent)


for _spelling in (torch.pow, "pow", "pow_", "__pow__"):
    DECOMPOSITIONS[_spelling] = _decompose_power
for _operator in (operator.pow, operator.ipow):
    DECOMPOSITIONS[_operator] = lambda call, x, exponent: _decompose_power(call, x, exponent)
WRITES.add(operator.ipow)
