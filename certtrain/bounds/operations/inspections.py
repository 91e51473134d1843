"""What does not depend on the elements of a tensor, but on its sizes and type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAKERS: set[Callable | str] = {
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    "new_zeros",
    "new_ones",
    "new_full",
}
"""Of tensors that hold one number."""


def type_of(*kinds: Any) -> torch.dtype | None:
    """What `x.to(*kinds)` casts to: a type, or that of a tensor; devices and flags do not matter."""
    types = (kind.dtype if isinstance(kind, Tensor) else kind for kind in kinds)
    return next((kind for kind in types if isinstance(kind, torch.dtype)), None)


INSPECTIONS: set[Callable] = {
    type_of,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    getattr,
    Tensor.stride,
    Tensor.is_contiguous,
    *(maker for maker in MAKERS if callable(maker)),
}
INSPECTING_METHODS = {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    *(maker for maker in MAKERS if isinstance(maker, str)),
}
INSPECTED_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
