"""PGD: steps along the sign of a gradient, projected into the box."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from certtrain.bounds.box import Box
from certtrain.bounds.shapes import per_image
from certtrain.verification.attacks.attack import (
    Generators,
    ascent,
    first_found,
    inscribed_linf_box,
    predicted,
    uniform_in,
)
from certtrain.verification.attacks.losses import negative_margin


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the margin z_y - max_{j≠y} z_j. (Madry et al. 2018, arXiv 1706.06083.)

    steps: gradient steps of each restart; step_size: as a share of epsilon, a tenth of it in the second half;
    restarts: from points drawn uniformly in the box, the first from the image itself.
    """

    steps: int = 40
    restarts: int = 2
    step_size: float = 0.25

    name = "pgd"

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, generators: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """See `Attack`."""

        def attempt(restart: int, left: Tensor) -> Tensor:
            box = inscribed_linf_box(images[left], eps)
            start = uniform_in(box, generators, left) if restart else images[left]
            return self._descend(model, start, labels[left], box, eps)

        return first_found(model, images, labels, (partial(attempt, restart) for restart in range(self.restarts)))

    def _descend(self, model: nn.Module, start: Tensor, labels: Tensor, box: Box, eps: float) -> Tensor:
        """A point per image: the first misclassified one met on the way, else the last."""
        x = start
        result, broken = x, torch.zeros_like(labels, dtype=torch.bool)
        for step in range(self.steps + 1):
            logits, _, direction = ascent(model, x, partial(negative_margin, labels=labels))
            result = torch.where(per_image(broken, x), result, x)
            broken = broken | (predicted(logits) != labels)  # not at a tie that the label wins
            if step == self.steps or bool(broken.all()):
                break
            size = eps * self.step_size * (1.0 if step < self.steps / 2 else 0.1)
            x = (x + size * direction).clamp(box.lower, box.upper)
        return result
