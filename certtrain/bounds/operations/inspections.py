"""What does not depend on the elements of a tensor, but on its sizes and type."""

from __future__ import annotations

from collections.abc import Callable

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
INSPECTIONS: set[Callable] = {
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
