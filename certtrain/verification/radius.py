"""The largest radius proved for each image, and the errors it draws as a function of epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds.margins import proved
from certtrain.data import Split, to_float
from certtrain.data.dataset import require_split
from certtrain.errors import require_counts
from certtrain.modules import device_of, evaluating
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import full_precision
from certtrain.verification.answers import Answers, Question, in_parts
from certtrain.verification.attacks import Attack, predictions
from certtrain.verification.checks import checked_radii, require_share
from certtrain.verification.pixels import perturbation_box
from certtrain.verification.verify import DEFAULT_SEARCH, answers_to, verify

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
    backend: str = "native",
    ranks: Ranks = ALONE,
) -> Radii:
    """The largest radius that IBP proves for each image, by bisection: IBP's margins only fall as a box grows.

    Args:
        model: as of `verify`, as are `arithmetic`, `batch_size`, `seed`, `backend` and `ranks`.
        data: the images.
        max_eps: where the search ends; a radius found is at most max_eps / 2^halvings too small, and never too large.
        attack: None for none; the PGD error is taken at a few radii, 0 among them.

    Returns:
        Those of all images, in every process.

    Raises:
        UsageError, DataError, UnsupportedOperation: as of `verify`.
    """
    (max_eps,) = checked_radii(max_eps)
    require_counts(batch_size=batch_size)
    require_split(data)
    data = data.to(device_of(model))
    require_share(data, ranks)
    question = Question(("ibp",), arithmetic, attack, seed, backend, DEFAULT_SEARCH)
    with evaluating(model), full_precision(), torch.no_grad():
        answers = answers_to(question, model, data)
        portions = in_parts(ranks.share(range(len(data))), batch_size)
        own = [_bisect(answers, data.take(torch.tensor(part)), max_eps, halvings) for part in portions]
    found = [batch for batches in ranks.all_gather(own, patient=True) for batch in batches]
    correct, radii = (torch.cat(part) for part in zip(*found, strict=True))
    grid = torch.linspace(0, max_eps, ATTACKED_POINTS, dtype=torch.float64).tolist() if attack else []
    asked: Any = {"attack": attack, "batch_size": batch_size, "seed": seed, "backend": backend, "ranks": ranks}
    errors = tuple(result.pgd_error for result in verify(model, data, grid, **asked)) if grid else ()
    return Radii(correct, radii, max_eps, tuple(grid), errors, arithmetic)


def _bisect(answers: Answers, data: Split, max_eps: float, halvings: int) -> tuple[Tensor, Tensor]:
    """`Radii.correct` and `Radii.proved` of a batch, on the CPU."""
    labels, arithmetic = data.labels, answers.question.arithmetic

    def holds(eps: Tensor) -> Tensor:
        box = perturbation_box(data.images, eps.view(-1, 1, 1, 1), arithmetic)
        return proved(answers.net.margins(box, labels, arithmetic=arithmetic))

    correct = predictions(answers.model, to_float(data.images)) == labels
    low = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    high = torch.full_like(low, max_eps)
    everywhere, somewhere = holds(high), holds(low)
    for _ in range(halvings):
        middle = (low + high) / 2
        inside = holds(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    low = torch.where(everywhere, max_eps, low)
    return correct.cpu(), torch.where(correct & somewhere, low, -1.0).cpu()
