"""The largest radius proved for each image, and the errors it draws as a function of epsilon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds import BoundedModel
from certtrain.bounds.margins import proved
from certtrain.data import Split, to_float
from certtrain.errors import require_counts
from certtrain.modules import device_of, evaluating
from certtrain.runtime.precision import full_precision
from certtrain.verification.attacks import Attack, predictions
from certtrain.verification.pixels import perturbation_box
from certtrain.verification.verify import check_fit, checked_radii, parts_of, verify

CURVE_POINTS = 101
ATTACKED_POINTS = 9


@dataclass(frozen=True)
class Radii:
    """What was found for each image, (N,) each, in the order of the split.

    correct: the unperturbed image is classified right; proved: the largest radius proved, no more than `max_eps`, and
    -1 where not even the image itself is proved: where it is misclassified, or the bounds are too loose at radius 0.
    """

    correct: Tensor
    proved: Tensor
    max_eps: float
    pgd_eps: tuple[float, ...]
    pgd_error: tuple[float, ...]
    arithmetic: str | None

    @property
    def natural_error(self) -> float:
        return (~self.correct).double().mean().item()

    def verified_error(self, eps: float) -> float:
        """Share of images that are not proved at `eps`."""
        return (self.proved < eps).double().mean().item()

    def summary(self) -> dict[str, Any]:
        """What goes into radius.json; errors are fractions."""
        grid = torch.linspace(0, self.max_eps, CURVE_POINTS, dtype=torch.float64).tolist()
        return {
            "images": len(self.proved),
            "arithmetic": self.arithmetic,
            "eps": grid,
            "natural_error": self.natural_error,
            "verified_error": [self.verified_error(eps) for eps in grid],
            "pgd_eps": list(self.pgd_eps),
            "pgd_error": list(self.pgd_error),
            "radii": self.proved.tolist(),
            "correct": self.correct.tolist(),
        }


def certified_radii(
    model: nn.Module,
    data: Split,
    max_eps: float,
    *,
    attack: Attack | None = None,
    arithmetic: str | None = None,
    batch_size: int = 256,
    halvings: int = 14,
    seed: int = 0,
) -> Radii:
    """The largest radius that IBP proves for each image, by bisection: IBP's margins only fall as a box grows.

    Args:
        model: as of `verify`, as are `arithmetic`, `batch_size` and `seed`.
        data: the images.
        max_eps: where the search ends; a radius found is at most max_eps / 2^halvings too small, and never too large.
        attack: None for none; the PGD error is taken at a few radii, 0 among them.

    Raises:
        UsageError, DataError: as of `verify`.
    """
    (max_eps,) = checked_radii(max_eps)
    require_counts(batch_size=batch_size)
    data = data.to(device_of(model))
    with evaluating(model), full_precision(), torch.no_grad():
        check_fit(model, data)
        net = BoundedModel(model, to_float(data.images[:1]))
        found = [_bisect(net, part, max_eps, arithmetic, halvings) for _, part in parts_of(data, batch_size)]
    correct, radii = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    grid = torch.linspace(0, max_eps, ATTACKED_POINTS, dtype=torch.float64).tolist() if attack else []
    errors = _pgd_errors(model, data, grid, attack, batch_size, seed)
    return Radii(correct, radii, max_eps, tuple(grid), errors, arithmetic)


def _bisect(
    net: BoundedModel, data: Split, max_eps: float, arithmetic: str | None, halvings: int
) -> tuple[Tensor, Tensor]:
    """`Radii.correct` and `Radii.proved` of a batch."""
    labels = data.labels

    def holds(eps: Tensor) -> Tensor:
        box = perturbation_box(data.images, eps.view(-1, 1, 1, 1), arithmetic)
        return proved(net.margins(box, labels, arithmetic=arithmetic))

    correct = predictions(net.model, to_float(data.images)) == labels
    low = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    high = torch.full_like(low, max_eps)
    everywhere, somewhere = holds(high), holds(low)
    for _ in range(halvings):
        middle = (low + high) / 2
        inside = holds(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    low = torch.where(everywhere, max_eps, low)
    return correct, torch.where(correct & somewhere, low, -1.0)


def _pgd_errors(
    model: nn.Module, data: Split, radii: Sequence[float], attack: Attack | None, batch_size: int, seed: int
) -> tuple[float, ...]:
    results = verify(model, data, radii, attack=attack, batch_size=batch_size, seed=seed) if radii else []
    return tuple(result.pgd_error for result in results)
