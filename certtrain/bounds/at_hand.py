"""Where values of tensors may be asked for: it must not cut a compiled graph, break torch.vmap, or wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack


def at_hand(x: Tensor) -> bool:
    """May values of `x` be asked for, in every training step too?"""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not under_vmap()


def under_vmap() -> bool:
    """Is this within torch.vmap, where tensors stand for several?"""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())
