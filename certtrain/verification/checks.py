"""What is refused before a network is verified: radii, images, networks, arithmetics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from certtrain.bounds.rounding.arithmetic import arithmetic_named
from certtrain.data import Split, to_float
from certtrain.errors import DataError, UsageError
from certtrain.modules import device_of
from certtrain.runtime.distributed import Ranks


def checked_radii(eps: float | Sequence[float]) -> list[float]:
    """One radius or several as a list of floats.

    Raises:
        UsageError: none; or one that is no number, negative, infinite or NaN.
    """
    try:
        radii = [float(eps)] if isinstance(eps, int | float | Real) else [float(radius) for radius in eps]
    except (TypeError, ValueError) as error:
        raise UsageError(f"eps must be a number or several, not {eps!r}") from error
    if not radii:
        raise UsageError("eps: name at least one radius")
    for radius in radii:
        if not (math.isfinite(radius) and radius >= 0):
            raise UsageError(f"eps: a radius is a finite number and not negative, not {radius}")
    return radii


def require_share(data: Split, ranks: Ranks) -> None:
    """Raises where there are fewer images than processes."""
    if len(data) < ranks.world_size:
        raise UsageError(
            f"{len(data)} test images for {ranks.world_size} processes: take more images, or fewer processes"
        )


def check_fit(model: nn.Module, data: Split) -> None:
    """Whether `data` can be asked of `model`, which is in eval mode.

    Raises:
        UsageError: parameters that are not finite float32, or outputs that are not logits (B, K) in float32 with K ≥ 2.
        DataError: a label that is none of the K classes.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UsageError(f"verification is of float32 networks; {name} is {_type_name(parameter)}: model.float()")
        if not parameter.isfinite().all():
            raise UsageError(f"the network cannot be verified: {name} has values that are infinite or NaN")
    with torch.no_grad():
        output = model(to_float(data.images[:1].to(device_of(model))))
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1 or output.shape[1] < 2:
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"the model must return logits (B, K) of at least two classes; one image gives {shown}")
    if output.dtype != torch.float32:
        raise UsageError(f"the model must return float32 logits, not {_type_name(output)}")
    low, high = (int(bound) for bound in data.labels.aminmax())
    if low < 0 or high >= output.shape[1]:
        raise DataError(f"labels reach from {low} to {high}, outside the model's classes 0 to {output.shape[1] - 1}")


def require_sound(backend: str, arithmetic: str) -> None:
    """Raises UsageError for an arithmetic that is unknown, or one that the backend's bounds do not cover."""
    arithmetic_named(arithmetic)
    if backend != "native":
        raise UsageError(f"bounds that cover the rounding of {arithmetic} are those of backend native, not {backend}")


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
