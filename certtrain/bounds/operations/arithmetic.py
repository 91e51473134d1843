"""Sums, products, quotients, and the greater or lesser of two."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds.operations.preconditions import aligned, only, require_that
from certtrain.bounds.operations.record import DECOMPOSITIONS, WRITES, Affine, Bind, Shape, define


def add(x: Any, y: Any, alpha: float = 1) -> Any:
    return x + y if alpha == 1 else x + alpha * y


def sub(x: Any, y: Any, alpha: float = 1) -> Any:
    return x - y if alpha == 1 else x - alpha * y


def _bind_sum(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, other, alpha


def _bind_two(input: Any, other: Any, *, out: None = None) -> tuple[Any, ...]:
    only(out, None, "out")
    return input, other


def _bind_quotient(input: Any, other: Any, *, rounding_mode: str | None = None, out: None = None) -> tuple[Any, ...]:
    only(rounding_mode, None, "rounding_mode")
    return _bind_two(input, other, out=out)


def _summands(x: Any, y: Any, alpha: Any) -> None:
    require_that(isinstance(alpha, int | float) and math.isfinite(alpha), f"alpha={alpha!r} is no finite number")
    aligned(x, y)


def _operators(name: str) -> tuple[tuple[Callable, Bind], ...]:
    bind: Bind = lambda x, y: (x, y, 1) if name in ("add", "sub") else (x, y)  # noqa: E731
    return (getattr(operator, name), bind), (getattr(operator, f"i{name}"), bind)


define(
    add,
    _bind_sum,
    functions=(torch.add, *_operators("add")),
    methods=("add", "add_", "__radd__"),
    operands=2,
    affine=Affine.JOINTLY,
    require=_summands,
)
define(
    sub,
    _bind_sum,
    functions=(torch.sub, torch.subtract, *_operators("sub")),
    methods=("sub", "sub_", "subtract", "subtract_"),
    operands=2,
    affine=Affine.JOINTLY,
    require=_summands,
)
define(
    torch.mul,
    _bind_two,
    functions=(torch.multiply, *_operators("mul")),
    methods=("mul", "mul_", "multiply", "multiply_"),
    operands=2,
    affine=Affine.ONE,
    require=aligned,
)
define(
    torch.div,
    _bind_quotient,
    functions=(torch.divide, torch.true_divide, *_operators("truediv")),
    methods=("div", "div_", "divide", "divide_", "true_divide"),
    operands=2,
    affine=Affine.FIRST,
    require=aligned,
)
define(
    torch.neg,
    lambda input: (input,),
    functions=(torch.negative, (operator.neg, lambda x: (x,))),
    methods=("neg", "neg_", "negative"),
    affine=Affine.FIRST,
)
WRITES |= {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def _one_value(x: Any, y: Any) -> None:
    require_that(
        all(isinstance(operand, Shape | Tensor) for operand in (x, y)), "it compares with something that is no tensor"
    )
    aligned(x, y)


for _function in (torch.maximum, torch.minimum):
    define(_function, _bind_two, methods=(_function.__name__,), operands=2, increasing=True, require=_one_value)


def _of_two(function: Callable) -> Callable[..., Any]:
    """`torch.max(x, y)`; of one tensor, along an axis or over all, it returns other things."""

    def decomposition(call: Any, input: Any, *others: Any, other: Any = None, **settings: Any) -> Any:
        found = [*others, *([] if other is None else [other])]
        two = len(found) == 1 and not isinstance(found[0], int) and not settings
        require_that(two, "of one tensor it has no rule: write amax or amin, and name the axes")
        return call(function, input, found[0])

    return decomposition


DECOMPOSITIONS |= {torch.max: _of_two(torch.maximum), "max": _of_two(torch.maximum)}
DECOMPOSITIONS |= {torch.min: _of_two(torch.minimum), "min": _of_two(torch.minimum)}
