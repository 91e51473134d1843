"""Softmax; one that ends the network keeps the order of its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds.operations.preconditions import first_alone, off_the_batch_axis, only, require_that
from certtrain.bounds.operations.record import define


def _distributes(x: Any, dim: Any) -> None:
    first_alone(x, dim)
    require_that(dim is not None, "it goes over an axis that PyTorch guesses: name it, dim=-1 say")
    off_the_batch_axis(x.dims, dim)


def _bind_softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: None = None) -> tuple[Any, ...]:
    only(dtype, None, "dtype")
    return input, dim


for _function, _alias, _module in (
    (torch.softmax, F.softmax, nn.Softmax),
    (torch.log_softmax, F.log_softmax, nn.LogSoftmax),
):
    define(
        _function,
        _bind_softmax,
        functions=(_alias,),
        methods=(_function.__name__,),
        modules={_module: lambda m: (m.dim,)},
        require=_distributes,
    )
LAST_FUNCTIONS = (torch.softmax, torch.log_softmax)
