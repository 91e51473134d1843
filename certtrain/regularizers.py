"""What the short warmup adds to the loss: bound tightness and ReLU balance. (Shi et al. 2021, section 3.3.)

Pure functions of boxes: anything with `lower`, `upper`, `center` and `radius` will do, also boxes that another
library computed (`Box(lower, upper)`). Of points they say little, and teach nothing: where the radius still is 0, ask
for the bounds at a small one, such as 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from certtrain.bounds.box import Box
from certtrain.errors import UsageError

TINY = 1e-12


def tightness_loss(relu_inputs: Sequence[Box], input_box: Box, tol: float = 0.5) -> Tensor:
    """Mean over ReLU layers of max(0, tol - mean(r_0) / mean(r_i)) / tol.

    Args:
        relu_inputs: the box before each ReLU.
        input_box: the box that enters the first affine layer (after input normalisation), radius r_0.
        tol: tightness below which a layer is penalised, above 0.

    Returns:
        A scalar in [0, 1].

    Raises:
        UsageError: there is no ReLU layer; `tol` is not above 0.
    """
    return tightness_of([moments(box) for box in relu_inputs], input_box.radius.mean(), tol)


def relu_balance_loss(relu_inputs: Sequence[Box], tol: float = 0.5) -> Tensor:
    """Mean over ReLU layers of [max(0, tol - ρ) + max(0, tol - ν)] / tol.

    ρ and ν compare active with inactive neurons, by the mean and by the variance that their centres contribute,
    each folded to min(q, 1/q). A layer with no active or no inactive neuron contributes 0 and no gradient.

    Returns:
        A scalar in [0, 2].

    Raises:
        UsageError: there is no ReLU layer; `tol` is not above 0.
    """
    return relu_balance_of([moments(box) for box in relu_inputs], tol)


def l1_penalty(weights: Iterable[Tensor]) -> Tensor:
    """Sum of the absolute values of `weights`, a scalar. Raises UsageError if there are none."""
    return _stacked("weight", [weight.abs().sum() for weight in weights]).sum()


class Moments(NamedTuple):
    """Sums over one layer's box before its ReLU, scalars. They add up over parts of a batch, and so both losses are
    functions of a whole batch even when it is worked through in parts.

    c and r are centre and radius, A and I the active (lower > 0) and inactive (upper < 0) neurons.
    """

    elements: Tensor  # how many
    radius: Tensor  # Σ r
    center: Tensor  # Σ c
    active_count: Tensor
    active: Tensor  # Σ c·1_A
    active_squares: Tensor  # Σ c²·1_A
    inactive_count: Tensor
    inactive: Tensor
    inactive_squares: Tensor

    def plus(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def completed_by(self, total: Moments) -> Moments:
        """`total`, with gradient through this part of it only."""
        return Moments(*(part + (whole - part).detach() for part, whole in zip(self, total, strict=True)))


def moments(box: Box) -> Moments:
    center = box.center
    active, inactive = (box.lower > 0).to(center.dtype), (box.upper < 0).to(center.dtype)
    center_active, center_inactive = center * active, center * inactive
    return Moments(
        torch.full_like(center.sum(), center.numel()),
        box.radius.sum(),
        center.sum(),
        active.sum(),
        center_active.sum(),
        (center * center_active).sum(),
        inactive.sum(),
        center_inactive.sum(),
        (center * center_inactive).sum(),
    )


def tightness_of(layers: Sequence[Moments], input_radius: Tensor, tol: float) -> Tensor:
    """`tightness_loss` from each layer's moments; `input_radius` is mean(r_0)."""
    _require_tolerance(tol)
    tightness = [layer_tightness(m.radius / m.elements, input_radius) for m in layers]
    return _stacked("ReLU layer", [torch.relu(tol - value) / tol for value in tightness]).mean()


def layer_tightness(radius: Tensor, input_radius: Tensor) -> Tensor:
    """mean(r_0) / mean(r_i), of both means."""
    return input_radius / radius.clamp(min=TINY)


def relu_balance_of(layers: Sequence[Moments], tol: float) -> Tensor:
    """`relu_balance_loss` from each layer's moments."""
    _require_tolerance(tol)
    return _stacked("ReLU layer", [_imbalance(m, tol) for m in layers]).mean()


def _require_tolerance(tol: float) -> None:
    if not tol > 0:
        raise UsageError(f"tol must be above 0, not {tol}: what is within it is not penalised")


def _stacked(of: str, terms: list[Tensor]) -> Tensor:
    if not terms:
        raise UsageError(f"a regularizer needs at least one {of} to look at, and was given none")
    return torch.stack(terms)


def _imbalance(m: Moments, tol: float) -> Tensor:
    mean = m.center / m.elements
    active_variance = _deviation(m.active_squares, m.active, m.active_count, mean)
    inactive_variance = _deviation(m.inactive_squares, m.inactive, m.inactive_count, mean)
    value = torch.relu(tol - _folded(m.active, -m.inactive)) + torch.relu(
        tol - _folded(active_variance, inactive_variance)
    )
    both_sides = (m.active_count > 0) & (m.inactive_count > 0)
    return torch.where(both_sides, value, torch.zeros_like(value)) / tol


def _deviation(squares: Tensor, total: Tensor, count: Tensor, mean: Tensor) -> Tensor:
    """Σ (c - mean)² over the neurons that were summed."""
    return (squares - 2 * mean * total + mean.square() * count).clamp(min=0)


def _folded(a: Tensor, b: Tensor) -> Tensor:
    """min(a/b, b/a), for a, b >= 0; 0 where both are 0."""
    return torch.minimum(a, b) / torch.maximum(a, b).clamp(min=TINY)
