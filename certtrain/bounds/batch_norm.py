"""BatchNorm and Dropout: scalings whose coefficients the clean activations decide.

In training mode a BatchNorm's statistics are those of the batch's clean activations (gradients flow through them), and
the box is scaled by the same ones; Dropout's mask is drawn once for both. What is left for bounds is a plain scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.shapes import per_channel
from certtrain.errors import UsageError

Coefficients = tuple[Tensor, Tensor]  # scale and shift of one BatchNorm
BatchSum = Callable[[Tensor], Tensor]  # of sums over a part of the batch: the sums over all of it, with gradient
Settle = Callable[..., tuple[Callable, tuple]]  # (input, clean activations, dims, batch_sum, *settings) -> scaling


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What a BatchNorm computes once its statistics are known; `scale` and `shift` broadcast over `x`."""
    return torch.addcmul(shift, x, scale)


def batch_norm_coefficients(
    clean: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    batch_sum: BatchSum | None = None,
) -> Coefficients:
    """Scale and shift, each (C,), of a BatchNorm.

    In training mode the statistics are those of `clean`, with gradient, and the running ones are updated as
    PyTorch does; otherwise they are the running ones. `batch_sum`: where `clean` is a part of the batch.
    """
    mean: Tensor | None
    var: Tensor | None
    if not training:
        mean, var = running_mean, running_var
    elif clean is None:
        raise UsageError("BatchNorm is in training mode: its statistics are those of the clean input, pass clean=")
    else:
        mean, var, count = _batch_statistics(clean, batch_sum)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
                running_var.lerp_((var.detach() * (count / (count - 1))).to(running_var.dtype), momentum)
    assert mean is not None  # as torch asks of a BatchNorm without statistics, too
    assert var is not None
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift


def _batch_statistics(clean: Tensor, batch_sum: BatchSum | None) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean and (biased) variance of each channel, and the number of values they were taken over."""
    count = clean.numel() // clean.shape[1]
    if batch_sum is None and count < 2:
        raise UsageError(f"BatchNorm in training mode needs more than one value per channel, got {count}")
    var, mean = torch.var_mean(clean, dim=[0, *range(2, clean.dim())], correction=0)
    if batch_sum is None:
        return mean, var, count
    # In two sums, since E[x²] - E[x]² would lose digits.
    sums = batch_sum(torch.cat([count * mean, torch.full_like(mean[:1], count)]))
    whole_count = sums[-1]
    whole_mean = sums[:-1] / whole_count
    whole_var = batch_sum(count * (var + (mean - whole_mean).square())) / whole_count
    return whole_mean, whole_var, whole_count


def _settle_batch_norm(
    x: Any, clean: Tensor | None, dims: int, batch_sum: BatchSum | None, *settings: Any
) -> tuple[Callable, tuple]:
    coefficients: Callable[..., Coefficients] = batch_norm_coefficients  # mypy takes *settings to fill batch_sum too
    scale, shift = coefficients(clean, *settings, batch_sum=batch_sum)
    return scale_shift, (x, per_channel(scale, dims), per_channel(shift, dims))


def _dropout(drop: Callable[..., Tensor]) -> Settle:
    """Of a Dropout of single elements, or of whole channels: the mask that `drop` draws."""

    def settle(
        x: Any,
        clean: Tensor | None,
        dims: int,
        batch_sum: BatchSum | None,
        p: float = 0.5,
        training: bool = True,
    ) -> tuple[Callable, tuple]:
        if not training or p == 0:
            return torch.mul, (x, 1.0)
        if batch_sum is not None:
            raise UsageError(
                "Dropout would draw the same for every part of a batch: train in one process, or without it"
            )
        if clean is None:
            raise UsageError("Dropout is active in training mode: pass clean=, or call model.eval()")
        return torch.mul, (x, drop(torch.ones_like(clean), p, True))

    return settle


SETTLED_BY_CLEAN: dict[Callable, Settle] = {
    F.batch_norm: _settle_batch_norm,
    **{drop: _dropout(drop) for drop in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)},
}
