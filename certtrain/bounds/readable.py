"""Where values of tensors may be asked for: it must not cut a compiled graph, break torch.vmap, wait for a GPU, or be
asked of what has none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack


def values_readable(x: Tensor) -> bool:
    """May values of `x` be asked for, in every training step too?

    Subclasses of tensors may have none: those of PyTorch's FakeTensorMode, in which costs are counted.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or under_vmap():
        return False
    return type(x) in (Tensor, nn.Parameter)


def under_vmap() -> bool:
    """Is this within torch.vmap, where tensors stand for several?"""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())
