"""PGD: an attack that finds misclassified points, and so an upper bound on what can be verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certtrain.bounds.box import Box
from certtrain.bounds.rounding import down, nearest_above, nearest_below, up


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the margin z_y - max_{j≠y} z_j. (Madry et al. 2018, arXiv 1706.06083.)

    steps: gradient steps of each restart; step_size: as a share of epsilon, a tenth of it in the second half;
    restarts: from points drawn uniformly in the box, the first from the image itself.
    """

    steps: int = 40
    restarts: int = 2
    step_size: float = 0.25

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        eps: float,
        generators: Sequence[torch.Generator] | None = None,
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
        points = images.clone()
        found = _predictions(model, images) != labels
        for restart in range(self.restarts):
            left = (~found).nonzero()[:, 0]
            if len(left) == 0:
                break
            box = inscribed_linf_box(images[left], eps)
            start = images[left]
            if restart > 0:
                own = [None if generators is None else generators[i] for i in left.tolist()]
                drawn = [torch.rand(start.shape[1:], generator=one) for one in own]
                share = torch.stack(drawn).to(start)
                start = box.lower + share * (box.upper - box.lower)
            candidates = self._descend(model, start, labels[left], box.lower, box.upper, eps)
            broken = _predictions(model, candidates) != labels[left]
            points[left[broken]] = candidates[broken]
            found[left[broken]] = True
        return points, found

    def _descend(
        self, model: nn.Module, start: Tensor, labels: Tensor, lower: Tensor, upper: Tensor, eps: float
    ) -> Tensor:
        """A point per image: the first misclassified one met on the way, else the last."""
        x = start.clamp(lower, upper)
        result, broken = x, torch.zeros_like(labels, dtype=torch.bool)
        for step in range(self.steps + 1):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(model, x)
                others = logits.scatter(1, labels[:, None], -torch.inf)
                margin = logits.gather(1, labels[:, None])[:, 0] - others.amax(1)
                (gradient,) = torch.autograd.grad(margin.sum(), x)
            result = torch.where(broken[:, None, None, None], result, x.detach())
            broken = broken | (logits.detach().argmax(1) != labels)  # not at a tie that the label wins
            if step == self.steps or bool(broken.all()):
                break
            size = eps * self.step_size * (1.0 if step < self.steps / 2 else 0.1)
            x = (x.detach() - size * gradient.sign()).clamp(lower, upper)
        return result


def inscribed_linf_box(x: Tensor, eps: float) -> Box:
    """`linf_box` in the type of `x`, from which rounding lets nothing stick out: an attack counts only inside."""
    lower, upper = up(x.double() - eps).clamp(min=0), down(x.double() + eps).clamp(max=1)
    return Box(torch.minimum(nearest_above(lower, x.dtype), x), torch.maximum(nearest_below(upper, x.dtype), x))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What `model` computes; its forward may write into its input, so that it gets one of its own."""
    return model(images.clone())


@torch.no_grad()
def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    return logits_of(model, images).argmax(1)
