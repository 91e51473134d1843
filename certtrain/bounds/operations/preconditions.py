"""What rules assume of the arguments of a call; what does not hold is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certtrain.bounds.operations.record import Shape
from certtrain.errors import UnsupportedOperation


def require_that(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedOperation(reason)


def off_the_batch_axis(dims: int, *axes: Any) -> None:
    """None of these axes of a value is the images'."""
    require_that(
        all(isinstance(axis, int) and axis % max(1, dims) != 0 for axis in axes),
        "it works along the batch axis, and would mix images",
    )


def batched(*dims: int) -> Callable[..., None]:
    """The value has one of these numbers of dimensions; PyTorch takes fewer for an input without a batch axis."""

    def require(x: Shape, *args: Any) -> None:
        first_alone(x, *args)
        wanted = " or ".join(map(str, dims))
        require_that(x.dims in dims, f"its input has {x.dims} dimensions, not {wanted}: where is the batch axis?")

    return require


def has_batch_axis(x: Shape) -> None:
    """The value has another dimension beside the channels or features."""
    require_that(x.dims >= 2, "its input has one dimension only: where is the batch axis?")


def first_alone(x: Any, *others: Any) -> None:
    """Only the first operand is a value."""
    require_that(
        isinstance(x, Shape) and not any(isinstance(other, Shape) for other in others),
        "weights that depend on the input have no rule, nor have settings",
    )


def aligned(*operands: Any) -> None:
    """Broadcasting leaves the batch axis of every value the first of the result."""
    values = [operand for operand in operands if isinstance(operand, Shape)]
    constants = [operand.dim() for operand in operands if isinstance(operand, Tensor)]
    most = max([value.dims for value in values] + constants)
    require_that(
        all(value.dims == most for value in values),
        "broadcasting would align the batch axis of one operand with another axis of the other",
    )


def reduces(x: Shape, dim: Any, keepdim: bool = False) -> None:
    dims = axes_of(dim)
    require_that(bool(dims), "it reduces over all axes, the batch axis among them, and would mix images")
    off_the_batch_axis(x.dims, *dims)


def axes_of(dim: Any) -> tuple[Any, ...]:
    return () if dim is None else tuple(dim) if isinstance(dim, tuple | list | torch.Size) else (dim,)


def only(value: Any, allowed: Any, name: str) -> None:
    require_that(value is allowed or value == allowed, f"{name}={value!r} has no rule")
