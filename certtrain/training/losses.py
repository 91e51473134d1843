"""What losses of certified training are made of: pure functions of logits and margins.

Margins (B, K) are z_y - z_j or lower bounds of it, 0 in the label's place; -margins are then logits of which the
label's is 0, and their cross-entropy bounds the worst over the set that the margins are bounds for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds.margins import proved

TINY = 1e-12
Metrics = dict[str, Tensor]  # scalars, means over a batch


def robust_cross_entropy(margins: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross-entropies of -margins. (Wong and Kolter 2018, arXiv 1711.00851, theorem 2.)"""
    return F.cross_entropy(-margins, labels, reduction="none")


def margins_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - z_j, (B, K)."""
    return logits.gather(1, labels[:, None]) - logits


def interpolated(first: Tensor, second: Tensor, weight: Tensor | float) -> Tensor:
    """weight·first + (1 - weight)·second."""
    return weight * first + (1 - weight) * second


def geometrically_interpolated(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """first^weight · second^(1 - weight), for losses >= 0; finite gradients where one of them is 0."""
    return first.clamp(min=TINY) ** weight * second.clamp(min=TINY) ** (1 - weight)


def margin_error(margins: Tensor) -> Tensor:
    """Share of images that are not `proved`."""
    return 1 - proved(margins).to(margins.dtype).mean()


def classification_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of images whose largest logit is not the label's."""
    return (logits.argmax(1) != labels).to(logits.dtype).mean()


def total(losses: Metrics) -> Tensor:
    return torch.stack(list(losses.values())).sum()
