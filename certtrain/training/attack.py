"""The attack inside training: PGD on a batch, on its device, without waiting for any result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from certtrain.bounds import Box, linf_box
from certtrain.config.methods import AttackSection, StepsSection

Uniform = Callable[[int], Tensor]  # number of a draw -> one number in [0, 1) for each element of the images


@torch.no_grad()
def attacked(
    options: AttackSection,
    images: Tensor,
    eps: Tensor,
    gradient: Callable[[Tensor], Tensor],
    losses: Callable[[Tensor], Tensor],
    uniform: Uniform,
) -> Tensor:
    """A point near each image at which its loss is large.

    Args:
        options: how it is looked for.
        images: (B, C, H, W) in [0, 1].
        eps: the radius that is trained on, a scalar.
        gradient: of each image's loss, at points (B, C, H, W).
        losses: (B,) at points; asked only to choose among several restarts.
        uniform: random numbers of the images' shape.

    Returns:
        (B, C, H, W) in [0, 1], within eps of the images where `options.clamp_to_box`, else within eps_factor·eps.
    """
    radius = options.eps_factor * eps
    box = linf_box(images, radius)
    best = ascended(options, options.step_size, _start(options, images, box, uniform, 0), box, radius, gradient)
    for restart in range(1, options.restarts):
        points = ascended(
            options, options.step_size, _start(options, images, box, uniform, restart), box, radius, gradient
        )
        better = losses(points) > losses(best)
        best = torch.where(better.view(-1, *[1] * (images.dim() - 1)), points, best)
    if options.clamp_to_box:
        allowed = linf_box(images, eps)
        best = torch.clamp(best, allowed.lower, allowed.upper)
    return best


def _start(options: AttackSection, images: Tensor, box: Box, uniform: Uniform, restart: int) -> Tensor:
    if options.start == "image" and restart == 0:
        return images
    return box.lower + uniform(restart) * (box.upper - box.lower)


def ascended(
    options: StepsSection,
    step_size: float,
    x: Tensor,
    box: Box,
    unit: Tensor,
    gradient: Callable[[Tensor], Tensor],
) -> Tensor:
    """Signed steps from `x` inside `box`; `unit` is what `step_size` is a share of."""
    for step in range(options.steps):
        decays = sum(step >= share * options.steps for share in options.decay_at)
        size = step_size * options.decay**decays * unit
        x = torch.clamp(x + size * gradient(x).sign(), box.lower, box.upper)
    return x
