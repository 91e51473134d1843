"""The attack inside training: PGD on a batch, on its device, without waiting for any result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from certtrain.bounds import Box, linf_box
from certtrain.config.methods import AttackSection, StepsSection

Uniform = Callable[[int], Tensor]  # number of a draw -> one number in [0, 1) for each element of the images
Visit = Callable[[Tensor], tuple[Tensor, Tensor]]  # points -> the gradients of their losses, and the losses
Losses = Callable[[Tensor], Tensor]  # points -> their losses alone, which cost less


@torch.no_grad()
def attacked(
    options: AttackSection, images: Tensor, eps: Tensor, visit: Visit, losses: Losses, uniform: Uniform
) -> Tensor:
    """A point near each image to which steps of rising loss lead.

    Args:
        options: how it is looked for.
        images: (B, C, H, W) in [0, 1].
        eps: the radius that is trained on, a scalar.
        visit: of points (B, C, H, W) the gradient of each one's loss, and the losses (B,); losses: these alone.
        uniform: random numbers of the images' shape.

    Returns:
        (B, C, H, W) in [0, 1], within eps of the images where `options.clamp_to_box`, else within eps_factor·eps.
    """
    radius = options.eps_factor * eps
    box = linf_box(images, radius)
    unit = radius if options.step_of == "radius" else (box.upper - box.lower) / 2
    starts = (_start(options, images, box, uniform, restart) for restart in range(options.restarts))
    points = ascended(options, options.step_size, starts, box, unit, visit, losses)
    if options.clamp_to_box:
        allowed = linf_box(images, eps)
        points = torch.clamp(points, allowed.lower, allowed.upper)
    return points


def _start(options: AttackSection, images: Tensor, box: Box, uniform: Uniform, restart: int) -> Tensor:
    if options.start == "image" and restart == 0:
        return images
    return box.lower + uniform(restart) * (box.upper - box.lower)


def visiting(losses: Losses) -> Visit:
    """The losses of points with their gradients, of which each point has its own."""

    def summed(x: Tensor) -> tuple[Tensor, Tensor]:
        found = losses(x)
        return found.sum(), found

    def visit(x: Tensor) -> tuple[Tensor, Tensor]:
        gradient, (_, found) = torch.func.grad_and_value(summed, has_aux=True)(x)
        return gradient, found

    return visit


class _Kept(NamedTuple):
    """Points, and their losses, of which there is one for each of the points' first axes."""

    points: Tensor
    losses: Tensor

    def or_worse(self, other: _Kept) -> _Kept:
        """Of each pair of points that with the larger loss."""
        worse = other.losses > self.losses
        chosen = worse.view(*worse.shape, *[1] * (self.points.dim() - worse.dim()))
        return _Kept(torch.where(chosen, other.points, self.points), torch.where(worse, other.losses, self.losses))


def ascended(
    options: StepsSection,
    step_size: float,
    starts: Iterable[Tensor],
    box: Box,
    unit: Tensor,
    visit: Visit,
    losses: Losses,
) -> Tensor:
    """Signed steps inside `box` from each of the starts, and of what they meet what `options.keep` says.

    Args:
        unit: what `step_size` is a share of.
        visit: of points the gradient of each one's loss, and the losses, for images (B,) or points of several (B, K);
            losses: these alone, of points that lead nowhere.
    """
    kept: _Kept | None = None
    for x in starts:
        for step in range(options.steps):
            gradient, found = visit(x)
            if options.keep == "worst":
                kept = _Kept(x, found) if kept is None else kept.or_worse(_Kept(x, found))
            decays = sum(step >= share * options.steps for share in options.decay_at)
            size = step_size * options.decay**decays * unit
            x = torch.clamp(x + size * gradient.sign(), box.lower, box.upper)
        if options.keep == "last" and options.restarts == 1:
            return x  # of which nothing needs to be known
        last = _Kept(x, losses(x))
        kept = last if kept is None else kept.or_worse(last)
    assert kept is not None
    return kept.points
