"""Weighted layers, and products of matrices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds.operations.arithmetic import add
from certtrain.bounds.operations.preconditions import batched, first_alone, has_batch_axis, require_that
from certtrain.bounds.operations.record import DECOMPOSITIONS, Affine, Shape, define


def _bind_linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, ...]:
    return input, weight, bias


def _bind_conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, groups


def _bind_conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, output_padding, groups, dilation


def pads_first(module: nn.Module) -> bool:
    """Is it a convolution that pads its input, with other values than zeros, and convolves without padding then?"""
    return getattr(module, "padding_mode", "zeros") != "zeros"


def padding_settings(module: Any) -> tuple[Any, ...]:
    """How: the arguments of `F.pad` after the input."""
    return tuple(module._reversed_padding_repeated_twice), module.padding_mode, None


def _conv_settings(m: Any) -> tuple[Any, ...]:
    return m.weight, m.bias, m.stride, 0 if pads_first(m) else m.padding, m.dilation, m.groups


def _conv_transpose_settings(m: Any) -> tuple[Any, ...]:
    return m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation


def _linear_input(x: Any, weight: Any, bias: Any = None) -> None:
    first_alone(x, weight, bias)
    require_that(weight.dim() == 2, "its weight has one dimension only: give it a second, w[None]")
    has_batch_axis(x)


define(
    F.linear,
    _bind_linear,
    operands=3,
    affine=Affine.FIRST,
    require=_linear_input,
    modules={nn.Linear: lambda m: (m.weight, m.bias)},
)
_function: Callable[..., Any]
_torch: Callable[..., Any]
_module: type[nn.Module]

for _function, _torch, _module, _dims in (
    (F.conv1d, torch.conv1d, nn.Conv1d, 3),
    (F.conv2d, torch.conv2d, nn.Conv2d, 4),
    (F.conv3d, torch.conv3d, nn.Conv3d, 5),
):
    define(
        _function,
        _bind_conv,
        functions=(_torch,),
        operands=3,
        affine=Affine.FIRST,
        require=batched(_dims),
        modules={_module: _conv_settings},
    )
for _function, _torch, _module, _dims in (
    (F.conv_transpose1d, torch.conv_transpose1d, nn.ConvTranspose1d, 3),
    (F.conv_transpose2d, torch.conv_transpose2d, nn.ConvTranspose2d, 4),
):
    define(
        _function,
        _bind_conv_transpose,
        functions=(_torch,),
        operands=3,
        affine=Affine.FIRST,
        require=batched(_dims),
        modules={_module: _conv_transpose_settings},
    )

WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d)
"""Layers of the form W x + b."""


def _matrix_operands(x: Any, y: Any) -> None:
    if isinstance(x, Shape):
        require_that(x.dims >= 2, "the batch axis of its left operand would be summed over")
        other = y.dims if isinstance(y, Shape) else y.dim()
        require_that(other <= max(x.dims, 2), "the batch axis of its left operand would not be the result's first")
        require_that(x.dims > 2 or other <= 2, "the batch axis of its left operand would not be the result's first")
    if isinstance(y, Shape):
        require_that(y.dims >= 3, "the batch axis of its right operand would be summed over")
        other = x.dims if isinstance(x, Shape) else x.dim()
        require_that(other <= y.dims, "the batch axis of its right operand would not be the result's first")
    if isinstance(x, Shape) and isinstance(y, Shape):
        require_that(x.dims == y.dims, "the batch axes of its operands would not meet")


define(
    torch.matmul,
    lambda input, other: (input, other),
    functions=(
        operator.matmul,
        (torch.bmm, lambda input, mat2: (input, mat2)),
        (torch.mm, lambda input, mat2: (input, mat2)),
    ),
    methods=("matmul", ("bmm", lambda input, mat2: (input, mat2)), ("mm", lambda input, mat2: (input, mat2))),
    operands=2,
    affine=Affine.ONE,
    require=_matrix_operands,
)


def einsum(x: Any, y: Any, equation: str) -> Tensor:
    return torch.einsum(equation, x, y)


def einsum_subscripts(equation: str) -> tuple[list[str], str]:
    """The letters of each operand's axes, and those of the result's."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    return inputs.split(","), output


def _bind_einsum(equation: str, *operands: Any) -> tuple[Any, ...]:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    require_that(len(operands) == 2, f"einsum of {len(operands)} operands has no rule, of two it has")
    return (*operands, equation)


def _einsum_operands(x: Any, y: Any, equation: str) -> None:
    require_that("->" in equation and "." not in equation, f"einsum {equation!r}: write it with -> and without ...")
    terms, output = einsum_subscripts(equation)
    images = {term[0] for term, operand in zip(terms, (x, y), strict=True) if isinstance(operand, Shape)}
    elsewhere = [term for term, operand in zip(terms, (x, y), strict=True) if not isinstance(operand, Shape)]
    elsewhere += [term[1:] for term, operand in zip(terms, (x, y), strict=True) if isinstance(operand, Shape)]
    require_that(
        images == set(output[:1]) and not any(letter in term for letter in images for term in elsewhere),
        f"einsum {equation!r}: the batch axis must be the first of every value and of the result, and nowhere else",
    )


define(
    einsum,
    lambda *args: args,
    functions=((torch.einsum, _bind_einsum),),
    operands=2,
    affine=Affine.ONE,
    require=_einsum_operands,
)


def _affine_product(call: Any, input: Any, left: Any, right: Any, beta: Any, alpha: Any) -> Any:
    """beta·input + alpha·(left @ right); factors of 1, the rule, are left out."""
    product = call(torch.matmul, left, right)
    product = product if alpha == 1 else call(torch.mul, product, alpha)
    return call(add, product, input if beta == 1 else call(torch.mul, input, beta), 1)


def _decompose_addmm(call: Any, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _affine_product(call, input, mat1, mat2, beta, alpha)


def _decompose_baddbmm(call: Any, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _affine_product(call, input, batch1, batch2, beta, alpha)


DECOMPOSITIONS |= {torch.addmm: _decompose_addmm, "addmm": _decompose_addmm}
DECOMPOSITIONS |= {torch.baddbmm: _decompose_baddbmm, "baddbmm": _decompose_baddbmm}
