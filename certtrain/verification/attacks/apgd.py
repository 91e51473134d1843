"""Auto-PGD, the attacks by gradients of AutoAttack: no step size to choose. (Croce & Hein 2020, arXiv 2003.01690.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from certtrain.bounds.box import Box
from certtrain.bounds.shapes import per_image
from certtrain.verification.attacks.attack import (
    Generators,
    ascent,
    first_found,
    inscribed_linf_box,
    logits_of,
    predicted,
    uniform_in,
)
from certtrain.verification.attacks.losses import (
    cross_entropy,
    difference_of_logits_ratio,
    targeted_difference_of_logits_ratio,
)

MOMENTUM = 0.75  # α: weight of the step beside that of the one before
ENOUGH = 0.75  # ρ: share of the steps between checkpoints that must raise the loss

LOSSES = {"ce": cross_entropy, "dlr": difference_of_logits_ratio}


@dataclass(frozen=True)
class APGD:
    """Untargeted Auto-PGD on the cross-entropy, or on DLR, the difference of logits ratio.

    steps: of each restart; restarts: from points drawn uniformly in the box.
    """

    loss: Literal["ce", "dlr"] = "ce"
    steps: int = 100
    restarts: int = 1

    @property
    def name(self) -> str:
        return f"apgd-{self.loss}"

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, generators: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """See `Attack`."""

        def attempt(left: Tensor) -> Tensor:
            box = inscribed_linf_box(images[left], eps)
            loss = partial(LOSSES[self.loss], labels=labels[left])
            return auto_pgd(model, uniform_in(box, generators, left), labels[left], box, eps, loss, self.steps)

        return first_found(model, images, labels, [attempt] * self.restarts)


@dataclass(frozen=True)
class TargetedAPGD:
    """Auto-PGD on the targeted DLR, one target after another (APGD-T).

    steps: of each attempt; targets: the wrong classes that are tried, from the most likely one on; restarts: of each,
    from points drawn uniformly in the box.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9

    name = "apgd-t"

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, generators: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """See `Attack`."""
        with torch.no_grad():
            logits = logits_of(model, images)
        ranked = logits.scatter(1, labels[:, None], -torch.inf).argsort(stable=True, dim=1, descending=True)
        targets = ranked[:, : min(self.targets, logits.shape[1] - 1)]

        def attempt(rank: int, left: Tensor) -> Tensor:
            box = inscribed_linf_box(images[left], eps)
            loss = partial(targeted_difference_of_logits_ratio, labels=labels[left], targets=targets[left, rank])
            return auto_pgd(model, uniform_in(box, generators, left), labels[left], box, eps, loss, self.steps)

        ranks = [*range(targets.shape[1])] * self.restarts
        return first_found(model, images, labels, (partial(attempt, rank) for rank in ranks))


def auto_pgd(
    model: nn.Module,
    start: Tensor,
    labels: Tensor,
    box: Box,
    eps: float,
    loss: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Ascent whose step size is halved, image by image, where it no longer helps. (Algorithm 1.)

    Args:
        start: (B, C, H, W) in `box`; labels: (B,).
        eps: half of the first step.
        loss: (B,) of logits (B, K).

    Returns:
        A point per image: the first misclassified one on the way, else the one of the largest loss.
    """

    def visit(x: Tensor) -> _Visit:
        logits, value, direction = ascent(model, x, loss)
        return _Visit(x, value, direction, predicted(logits) != labels)

    here = best = first_wrong = visit(start)
    previous, size = start, torch.full_like(here.loss, 2 * eps)
    best_before, halved, rises, last = best.loss, torch.zeros_like(best.wrong), torch.zeros_like(labels), 0
    for step in range(1, steps + 1):
        if bool(first_wrong.wrong.all()):
            break
        momentum = MOMENTUM if step > 1 else 1.0
        stepped = (here.x + per_image(size, start) * here.direction).clamp(box.lower, box.upper)
        moved = here.x + momentum * (stepped - here.x) + (1 - momentum) * (here.x - previous)
        before, here = here, visit(moved.clamp(box.lower, box.upper))
        previous = before.x
        best = _Visit.where(here.loss > best.loss, here, best)
        first_wrong = _Visit.where(first_wrong.wrong, first_wrong, here)
        rises = rises + (here.loss > before.loss)
        if step in checkpoints(steps):
            halved = (rises < ENOUGH * (step - last)) | (~halved & (best.loss <= best_before))
            size = torch.where(halved, size / 2, size)
            here = _Visit.where(halved, best, here)
            best_before, rises, last = best.loss, torch.zeros_like(rises), step
    return _Visit.where(first_wrong.wrong, first_wrong, best).x


class _Visit(NamedTuple):
    """Points (B, ...), their losses (B,), the direction (B, ...) in which these grow, and (B,) bool: misclassified?"""

    x: Tensor
    loss: Tensor
    direction: Tensor
    wrong: Tensor

    @classmethod
    def where(cls, choose: Tensor, these: _Visit, others: _Visit) -> _Visit:
        """Image by image, one or the other."""
        pairs = zip(these, others, strict=True)
        return cls(*(torch.where(per_image(choose, this), this, other) for this, other in pairs))


@cache
def checkpoints(steps: int) -> frozenset[int]:
    """The steps after which step sizes are looked at: ⌈p·steps⌉, p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, ..."""
    percent, interval, found = 22, 22, []
    while percent <= 100:
        found.append(-(-percent * steps // 100))
        interval = max(interval - 3, 6)
        percent += interval
    return frozenset(found)
