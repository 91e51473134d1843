"""Attacks on a network's tail, and the link by which their gradients reach its head.

Mao et al. 2023, "Connecting certified and adversarial training", arXiv 2305.04574.
Latent points have shape (B, K, ...): for each image one point for each class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from certtrain.bounds import Box
from certtrain.config.methods import LatentAttackSection
from certtrain.training.attack import Uniform, ascended, visiting

SMALLEST_WIDTH = 1e-5  # that the link divides by


@torch.no_grad()
def latent_points(
    options: LatentAttackSection, tail: Callable[[Tensor], Tensor], box: Box, labels: Tensor, uniform: Uniform
) -> Tensor:
    """(B, K, ...): in the box, where the logit of class t is large beside the label's.

    Args:
        tail: latent points -> logits (B, K, K).
        box: (B, ...), of the head's results.
        uniform: random numbers of the points' shape.
    """
    lower, upper = box.lower.detach()[:, None], box.upper.detach()[:, None]

    def excess(x: Tensor) -> Tensor:
        return -pairwise_margins(tail(x), labels)

    step_size = options.step_size or max(0.2, 2 / options.steps)
    starts = (lower + uniform(restart) * (upper - lower) for restart in range(options.restarts))
    return ascended(options, step_size, starts, Box(lower, upper), upper - lower, visiting(excess), excess)


def pairwise_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K): z_y - z_t from the logits (B, K, K) at the point for class t."""
    of_label = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))[:, :, 0]
    return of_label - logits.diagonal(dim1=1, dim2=2)


def linked(points: Tensor, box: Box, share: float) -> Tensor:
    """`points` (B, K, ...), as functions of the ends of `box` (B, ...).

    A point's gradient reaches the upper end where the point lies in the upper `share` c of the box's width, by
    (x - (u - c(u - l))) / (c(u - l)): not at all at the inner end of that part, whole at u. Symmetrically the lower.
    In boxes that are next to nothing half of it reaches each end, as in the authors' code: the head then learns of the
    point.
    """
    lower, upper = box.lower[:, None], box.upper[:, None]
    reach = share * (upper - lower).detach()

    def reaching(past: Tensor) -> Tensor:
        """The share of the gradient, by how far points are past the inner end of a part."""
        return (past >= 0) * past.clamp(min=SMALLEST_WIDTH / 2) / reach.clamp(min=SMALLEST_WIDTH)

    to_upper, to_lower = reaching(points - (upper.detach() - reach)), reaching(lower.detach() + reach - points)
    return points + to_upper * (upper - upper.detach()) + to_lower * (lower - lower.detach())


def with_gradient_scaled(value: Tensor, factor: float) -> Tensor:
    """`value`; its gradient is multiplied."""
    return factor * value + (1 - factor) * value.detach()
