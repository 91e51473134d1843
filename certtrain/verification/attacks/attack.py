"""What attacks have in common: the question, the box, attempt after attempt, and several attacks as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from certtrain.bounds.box import Box
from certtrain.bounds.rounding.boxes import down, nearest_above, nearest_below, up

Generators = Sequence[torch.Generator] | None
Attempt = Callable[[Tensor], Tensor]  # positions (L,) of the images that are left -> a point for each of them


class Attack(Protocol):
    """Looks for a misclassified point near each image."""

    @property
    def name(self) -> str:
        """What a configuration calls it."""
        ...

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, generators: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Look for a misclassified point near each image.

        Args:
            model: in eval mode.
            images: (B, C, H, W) in [0, 1]; labels: (B,).
            eps: radius of the box, cut to [0, 1], that no point leaves.
            generators: on the CPU, one for each image; where its restarts begin, whatever images are beside it.

        Returns:
            points (B, C, H, W), and (B,) bool: is the point misclassified? Where none was found the point is the image.
        """
        ...


@dataclass(frozen=True)
class Ensemble:
    """Several attacks, each on the images that those before it left.

    Each has the random numbers it would have alone, so that together they find what any of them finds.
    """

    members: tuple[Attack, ...]

    @property
    def name(self) -> str:
        return ",".join(member.name for member in self.members)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, generators: Generators = None
    ) -> tuple[Tensor, Tensor]:
        def attempt(member: Attack, left: Tensor) -> Tensor:
            own = None if generators is None else [generators[i].clone_state() for i in left.tolist()]
            return member(model, images[left], labels[left], eps, own)[0]

        return first_found(model, images, labels, (partial(attempt, member) for member in self.members))


def first_found(model: nn.Module, images: Tensor, labels: Tensor, attempts: Iterable[Attempt]) -> tuple[Tensor, Tensor]:
    """What an `Attack` returns, of attempts that are made one after another for the images that are left."""
    points = images.clone()
    found = predictions(model, images) != labels
    for attempt in attempts:
        left = (~found).nonzero()[:, 0]
        if len(left) == 0:
            break
        candidates = attempt(left)
        broken = predictions(model, candidates) != labels[left]
        points[left[broken]] = candidates[broken]
        found[left[broken]] = True
    return points, found


def uniform_in(box: Box, generators: Generators, left: Tensor) -> Tensor:
    """A point of each of the boxes, which are those of the images `left`, by the image's own generator."""
    own = [torch.default_generator if generators is None else generators[i] for i in left.tolist()]
    share = torch.stack([torch.rand(box.shape[1:], generator=one, device=one.device) for one in own]).to(box.like)
    return (box.lower + share * (box.upper - box.lower)).clamp(box.lower, box.upper)


def ascent(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K) at `x`, each image's loss (B,), and the sign of its gradient, 0 where that is undefined."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x)
        losses = loss(logits)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return logits.detach(), losses.detach(), gradient.sign().nan_to_num(0.0)


def inscribed_linf_box(x: Tensor, eps: float) -> Box:
    """`linf_box` in the type of `x`, from which rounding lets nothing stick out: an attack counts only inside."""
    lower, upper = up(x.double() - eps).clamp(min=0), down(x.double() + eps).clamp(max=1)
    return Box(torch.minimum(nearest_above(lower, x.dtype), x), torch.maximum(nearest_below(upper, x.dtype), x))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What `model` computes; its forward may write into its input, so that it gets one of its own."""
    return model(images.clone())


def predicted(logits: Tensor) -> Tensor:
    """The classes (B,) that logits (B, K) say, -1 where one of them is NaN: that is no prediction."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """What is `predicted` of images (B, C, H, W)."""
    return predicted(logits_of(model, images))
