"""What attacks maximise: losses (B,) of logits (B, K), above which the label y is no longer predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """log Σ_j exp(z_j) - z_y."""
    return F.cross_entropy(logits, labels, reduction="none")


def negative_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j≠y} z_j - z_y."""
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - _at(logits, labels)


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR: (max_{j≠y} z_j - z_y) / (z_π1 - z_π3), π the order of falling logits. (Croce & Hein 2020, eq. 6.)

    It stays when all logits are scaled or shifted, where the gradient of the cross-entropy of large logits is 0. Of two
    classes, which have no third, the margin.
    """
    return negative_margin(logits, labels) / _spread(logits, third_to=3)


def targeted_difference_of_logits_ratio(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR: (z_t - z_y) / (z_π1 - (z_π3 + z_π4) / 2). (Croce & Hein 2020, eq. 7.)

    Of three classes, which have no fourth, z_π3 is in the place of the mean; of two, the margin.
    """
    return (_at(logits, targets) - _at(logits, labels)) / _spread(logits, third_to=4)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _spread(logits: Tensor, third_to: int) -> Tensor:
    """From the largest logit down to the mean of the third to the `third_to`-th, kept above 0."""
    classes = logits.shape[1]
    if classes < 3:
        return torch.ones_like(logits[:, 0])
    ordered = logits.topk(min(third_to, classes)).values
    return ordered[:, 0] - ordered[:, 2:].mean(1) + 1e-12
