"""How many images are classified right, withstand an attack, and are proved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.attacks import PGD
from certtrain.bounds import BoundedModel, linf_box
from certtrain.bounds.graph import evaluating
from certtrain.data import Split, evaluation_batches
from certtrain.folding import fold_batch_norm
from certtrain.objectives import proved
from certtrain.precision import full_precision


@dataclass
class Stage:
    """One method of a cascade: how many images it was asked about, how many of them it proved, and its price."""

    method: str
    images: int = 0
    proved: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Verification:
    """What was found at one epsilon; per-image tensors (N,) on the CPU, in the order of the split.

    correct: classified right; attacked: right, but PGD found a misclassified point; proved: no perturbation of at
    most eps in any pixel changes the prediction, which is right; margin: smallest lower bound of z_y - z_j, j ≠ y.
    stages: the methods of the cascade, in order; seconds: all of it, the attack included.
    """

    eps: float
    stages: tuple[Stage, ...]
    correct: Tensor
    attacked: Tensor
    proved: Tensor
    margin: Tensor
    seconds: float

    @property
    def natural_error(self) -> float:
        return _share(~self.correct)

    @property
    def pgd_error(self) -> float:
        return _share(~self.correct | self.attacked)

    @property
    def verified_error(self) -> float:
        """Share of images that are not proved."""
        return _share(~self.proved)

    def summary(self) -> dict[str, Any]:
        """What goes into a JSON file; errors are fractions."""
        return {
            "eps": self.eps,
            "method": ",".join(stage.method for stage in self.stages),
            "images": len(self.correct),
            "natural_error": self.natural_error,
            "pgd_error": self.pgd_error,
            "verified_error": self.verified_error,
            "stages": [vars(stage) | {"seconds": round(stage.seconds, 3)} for stage in self.stages],
            "seconds": round(self.seconds, 3),
        }


def verify(
    model: nn.Module,
    data: Split,
    eps: float | Sequence[float],
    method: str | Sequence[str] = "ibp",
    *,
    attack: PGD | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    backend: str = "native",
) -> list[Verification]:
    """Natural, PGD and verified error of `model` on `data`, at one epsilon or several.

    The model is put into eval mode and back. Products are taken in float32 without TF32, whatever the process's
    settings are. Only images that are classified right and not proved are attacked: a proved one cannot be.

    Args:
        data: images; it is moved to the model's device.
        eps: radius, or radii.
        method: of `BoundedModel.margins`, or several by price: each sees only the images that those before left open.
        attack: None for none; the PGD error is then a lower bound, the natural error.
        limit: only the first so many images.
        backend: of `BoundedModel`.

    Returns:
        A Verification per radius.
    """
    device = next(model.parameters()).device
    data = data.take(slice(limit)).to(device)
    radii = [eps] if isinstance(eps, int | float) else list(eps)
    methods = [method] if isinstance(method, str) else list(method)
    with evaluating(model), full_precision():
        network = fold_batch_norm(model) if backend == "native" else model  # the same map in fewer operations
        net = BoundedModel(network, next(evaluation_batches(data, 1))[0], backend)
        return [_verify_at(net, data, radius, methods, attack, batch_size, seed) for radius in radii]


def _verify_at(
    net: BoundedModel, data: Split, eps: float, methods: Sequence[str], attack: PGD | None, batch_size: int, seed: int
) -> Verification:
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    stages = tuple(Stage(method) for method in methods)
    found: list[tuple[Tensor, ...]] = []
    for images, labels in evaluation_batches(data, batch_size):
        with torch.no_grad():
            correct = net.model(images).argmax(1) == labels
            margins = _cascade(net, images, labels, eps, correct, stages)
        holds = proved(margins) & correct
        attacked = torch.zeros_like(correct)
        open_ = (correct & ~holds).nonzero()[:, 0]
        if attack is not None and len(open_) > 0:
            _, attacked[open_] = attack(net.model, images[open_], labels[open_], eps, generator)
        smallest = margins.scatter(1, labels[:, None], torch.inf).amin(1)
        found.append((correct, attacked, holds, smallest))
    parts = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    return Verification(eps, stages, *parts, seconds=time.perf_counter() - started)


def _cascade(
    net: BoundedModel, images: Tensor, labels: Tensor, eps: float, correct: Tensor, stages: Sequence[Stage]
) -> Tensor:
    """Margins (B, K) by the first stage, then by one after another for those right and open."""
    margins = torch.full((len(images), net.classes), -torch.inf, dtype=images.dtype, device=images.device)
    margins.scatter_(1, labels[:, None], 0.0)
    for position, stage in enumerate(stages):
        left = (torch.ones_like(correct) if position == 0 else correct & ~proved(margins)).nonzero()[:, 0]
        if len(left) == 0:
            break
        started = time.perf_counter()
        bounds = net.margins(linf_box(images[left], eps), labels[left], stage.method)
        margins[left] = torch.maximum(margins[left], bounds)
        stage.images += len(left)
        stage.proved += int((proved(margins[left]) & correct[left]).sum())
        stage.seconds += time.perf_counter() - started
    return margins


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
