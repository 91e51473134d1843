"""BatchNorm and Dropout, which `batch_norm.py` turns into scalings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds.operations.preconditions import batched, first_alone, has_batch_axis
from certtrain.bounds.operations.record import Affine, define


def _bind_batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    return input, running_mean, running_var, weight, bias, training, momentum, eps


def _batch_norm_settings(m: Any) -> tuple[Any, ...]:
    momentum = m.momentum
    if m.training and m.track_running_stats and m.num_batches_tracked is not None:
        with torch.no_grad():
            m.num_batches_tracked.add_(1)
        if momentum is None:  # PyTorch's cumulative average
            momentum = 1.0 / float(m.num_batches_tracked)
    from_batch = m.training or m.running_mean is None
    return m.running_mean, m.running_var, m.weight, m.bias, from_batch, momentum, m.eps


def _channels(x: Any, *settings: Any) -> None:
    first_alone(x, *settings)
    has_batch_axis(x)


def _bind_dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[Any, ...]:
    return input, p, training


define(
    F.batch_norm,
    _bind_batch_norm,
    affine=Affine.FIRST,
    require=_channels,
    modules={
        nn.BatchNorm1d: _batch_norm_settings,
        nn.BatchNorm2d: _batch_norm_settings,
        nn.BatchNorm3d: _batch_norm_settings,
        nn.SyncBatchNorm: _batch_norm_settings,
    },
)
define(
    F.dropout,
    _bind_dropout,
    functions=((torch.dropout, lambda input, p, train: (input, p, train)),),
    affine=Affine.FIRST,
    modules={nn.Dropout: lambda m: (m.p, m.training)},
    identity=lambda x, p, training: not training or p == 0,
)
for _function, _module, _dims in (
    (F.dropout1d, nn.Dropout1d, 3),
    (F.dropout2d, nn.Dropout2d, 4),
    (F.dropout3d, nn.Dropout3d, 5),
):
    define(
        _function,
        _bind_dropout,
        affine=Affine.FIRST,
        modules={_module: lambda m: (m.p, m.training)},
        identity=lambda x, p, training: not training or p == 0,
        require=batched(_dims),
    )
