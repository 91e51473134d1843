"""How many images are classified right, withstand an attack, and are proved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds import Bounder, Box, bounded_model
from certtrain.bounds.model import evaluating
from certtrain.bounds.rounding import arithmetic_named
from certtrain.data import Split, to_float
from certtrain.data.seeding import generator
from certtrain.errors import DataError, UnsupportedOperation, UsageError
from certtrain.runtime.distributed import ALONE, Ranks
from certtrain.runtime.precision import full_precision
from certtrain.training.losses import proved
from certtrain.verification.attacks import Attack, logits_of
from certtrain.verification.folding import fold_batch_norm
from certtrain.verification.pixels import perturbation_box


@dataclass
class Stage:
    """One method of a cascade: how many images it was asked about, how many of them it proved, and its price."""

    method: str
    images: int = 0
    proved: int = 0
    seconds: float = 0.0  # of all processes together

    @classmethod
    def merged(cls, parts: Sequence[Stage]) -> Stage:
        totals = (sum(getattr(part, name) for part in parts) for name in ("images", "proved", "seconds"))
        return cls(parts[0].method, *totals)


@dataclass(frozen=True, eq=False)
class Verification:
    """What was found at one epsilon; per-image tensors (N,) on the CPU, in the order of the split.

    Attributes:
        eps: the radius.
        stages: the methods of the cascade, in order.
        arithmetic: that of the deployed network for which the bounds hold, None for real mathematics.
        prediction: the class of the unperturbed image, -1 where its logits are not all numbers.
        correct: the prediction is the label.
        attacked: right, but the attack found a misclassified point.
        adversarial: those points (M, C, H, W), in order.
        proved: no perturbation of at most eps in any pixel changes the prediction, which is right.
        margin: smallest lower bound of z_y - z_j, j ≠ y.
        seconds: all of it, the attack included.
        trees: by position, what proves an image by branch and bound (`Trees`), where that was kept.
        attack: the names of those that were made, None where none was.
    """

    eps: float
    stages: tuple[Stage, ...]
    arithmetic: str | None
    prediction: Tensor
    correct: Tensor
    attacked: Tensor
    adversarial: Tensor
    proved: Tensor
    margin: Tensor
    seconds: float
    trees: Mapping[int, bytes] = field(default_factory=dict)
    attack: str | None = None

    @property
    def unknown(self) -> Tensor:
        """(N,) bool: classified right, neither proved nor attacked."""
        return self.correct & ~self.proved & ~self.attacked

    @property
    def fates(self) -> dict[str, Tensor]:
        """A flag (N,) per image for each thing that can become of it; every image has one fate."""
        return {
            "proved": self.proved,
            "unknown": self.unknown,
            "attacked": self.attacked,
            "misclassified": ~self.correct,
        }

    @property
    def natural_error(self) -> float:
        """Share of images that are misclassified as they are."""
        return _share(~self.correct)

    @property
    def pgd_error(self) -> float:
        """Share of images that are misclassified as they are, or at an attacked point within eps."""
        return _share(~self.correct | self.attacked)

    @property
    def verified_error(self) -> float:
        """Share of images that are not proved."""
        return _share(~self.proved)

    @classmethod
    def merged(cls, parts: Sequence[Verification]) -> Verification:
        """What several processes found, each for consecutive images; it lasted as long as the slowest."""
        stages = tuple(Stage.merged(stages) for stages in zip(*(part.stages for part in parts), strict=True))
        names = ("prediction", "correct", "attacked", "adversarial", "proved", "margin")
        of_each_image = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        seconds = max(part.seconds for part in parts)
        first = parts[0]
        rest: dict[str, Any] = {"seconds": seconds, "attack": first.attack, **of_each_image}
        return cls(first.eps, stages, first.arithmetic, **rest)

    def summary(self) -> dict[str, Any]:
        """What goes into a JSON file; errors are fractions."""
        return {
            "eps": self.eps,
            "method": ",".join(stage.method for stage in self.stages),
            "arithmetic": self.arithmetic,
            "attack": self.attack,
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
    attack: Attack | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    backend: str = "native",
    arithmetic: str | None = None,
    ranks: Ranks = ALONE,
) -> list[Verification]:
    """Natural, PGD and verified error of `model` on `data`, at one epsilon or several.

    The model is put into eval mode and back. Products are taken in float32 without TF32, whatever the process's
    settings are. Only images that are classified right and not proved are attacked: a proved one cannot be.

    Args:
        model: with float32 parameters; it returns logits (B, K), K ≥ 2, of images (B, C, H, W) in [0, 1].
        data: images; it is moved to the model's device.
        eps: radius, or radii.
        method: of `BoundedModel.margins`, or several by price: each sees only the images that those before left
            unknown.
        attack: None for none; the PGD error is then a lower bound, the natural error.
        limit: only the first so many images.
        backend: of `bounded_model`.
        arithmetic: prove what the deployed network computes in this floating-point arithmetic, "float32" and others of
            `bounds.rounding`, in any order of its sums, for every representation of the pixels (`pixel_box`). None: the
            network as real mathematics.
        ranks: the processes that share the images.

    Returns:
        A Verification per radius, of all images in every process.

    Raises:
        UsageError: a radius that is negative or not finite; a model of another type or with other outputs; an
            arithmetic that is unknown, or that method or backend cannot cover; fewer images than processes.
        DataError: a label that is none of the model's classes.
    """
    radii = checked_radii(eps)
    device = device_of(model)
    everything = data.take(slice(limit))
    images = range(len(everything))
    if len(images) < ranks.world_size:
        raise UsageError(
            f"{len(images)} test images for {ranks.world_size} processes: take more images, or fewer processes"
        )
    share = ranks.share(images)
    data = everything.take(slice(share.start, share.stop)).to(device)
    methods = (method,) if isinstance(method, str) else tuple(method)
    if arithmetic is not None:
        _require_sound(backend, arithmetic)
    question = _Question(methods, arithmetic, attack, batch_size, seed, share.start)
    with evaluating(model), full_precision():
        check_fit(model, everything)  # of all, so that every process finds the same
        example = to_float(data.images[:1])
        network = _fewest_operations(model, example) if backend == "native" and arithmetic is None else model
        net = bounded_model(network, example, backend)
        found = [question.answer(net, data, radius) for radius in radii]
    return [Verification.merged(parts) for parts in zip(*ranks.all_gather(found), strict=True)]


def _fewest_operations(model: nn.Module, example: Tensor) -> nn.Module:
    """`model` with BatchNorm folded, if that computes the same."""
    try:
        return fold_batch_norm(model, example)
    except UnsupportedOperation:
        return model


def checked_radii(eps: float | Sequence[float]) -> list[float]:
    """One radius or several as a list of floats.

    Raises:
        UsageError: none; or one that is no number, negative, infinite or NaN.
    """
    try:
        radii = [float(eps)] if isinstance(eps, int | float) else [float(radius) for radius in eps]
    except (TypeError, ValueError) as error:
        raise UsageError(f"eps must be a number or several, not {eps!r}") from error
    if not radii:
        raise UsageError("eps: name at least one radius")
    for radius in radii:
        if not (math.isfinite(radius) and radius >= 0):
            raise UsageError(f"eps: a radius is a finite number and not negative, not {radius}")
    return radii


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def check_fit(model: nn.Module, data: Split) -> None:
    """Whether `data` can be asked of `model`, which is in eval mode.

    Raises:
        UsageError: parameters that are not finite float32, or outputs that are not logits (B, K) in float32 with K ≥ 2.
        DataError: a label that is none of the K classes.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UsageError(f"verification is of float32 networks; {name} is {_type_name(parameter)}: model.float()")
        if not parameter.isfinite().all():
            raise UsageError(f"the network cannot be verified: {name} has values that are infinite or NaN")
    with torch.no_grad():
        output = model(to_float(data.images[:1].to(device_of(model))))
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1 or output.shape[1] < 2:
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"the model must return logits (B, K) of at least two classes; one image gives {shown}")
    if output.dtype != torch.float32:
        raise UsageError(f"the model must return float32 logits, not {_type_name(output)}")
    low, high = (int(bound) for bound in data.labels.aminmax())
    if low < 0 or high >= output.shape[1]:
        raise DataError(f"labels reach from {low} to {high}, outside the model's classes 0 to {output.shape[1] - 1}")


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The classes (B,) of float images (B, C, H, W), -1 where a logit is NaN: that is no prediction."""
    logits = logits_of(model, images)
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def _require_sound(backend: str, arithmetic: str) -> None:
    arithmetic_named(arithmetic)
    if backend != "native":
        raise UsageError(f"bounds that cover the rounding of {arithmetic} are those of backend native, not {backend}")


@dataclass(frozen=True)
class _Question:
    """What `verify` asks of each radius; `first` is the position of its data's first image among all processes'."""

    methods: tuple[str, ...]
    arithmetic: str | None
    attack: Attack | None
    batch_size: int
    seed: int
    first: int

    def answer(self, net: Bounder, data: Split, eps: float) -> Verification:
        started = time.perf_counter()
        stages = tuple(Stage(method) for method in self.methods)
        found: list[tuple[Tensor, ...]] = []
        for start, part in parts_of(data, self.batch_size):
            images, labels = to_float(part.images), part.labels
            prediction = predictions(net.model, images)
            correct = prediction == labels
            with torch.no_grad():
                box = perturbation_box(part.images, eps, self.arithmetic)
                margins = self._cascade(net, box, labels, correct, stages)
            holds = proved(margins) & correct
            attacked, points = self._attacks(net.model, images, labels, eps, correct & ~holds, self.first + start)
            smallest = margins.scatter(1, labels[:, None], torch.inf).amin(1)
            found.append((prediction, correct, attacked, points, holds, smallest))
        whole = [torch.cat(part).cpu() for part in zip(*found, strict=True)]
        prediction, correct, attacked, points, holds, smallest = whole
        seconds = time.perf_counter() - started
        name = None if self.attack is None else self.attack.name
        return Verification(
            eps, stages, self.arithmetic, prediction, correct, attacked, points, holds, smallest, seconds, attack=name
        )

    def _attacks(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, left: Tensor, position: int
    ) -> tuple[Tensor, Tensor]:
        """(B,) bool, and the points found; an image's attack follows from the seed and its own position alone."""
        attacked, points = torch.zeros_like(left), images[:0]
        chosen = left.nonzero()[:, 0]
        if self.attack is not None and len(chosen) > 0:
            generators = [generator(self.seed, position + i) for i in chosen.tolist()]
            points, broken = self.attack(model, images[chosen], labels[chosen], eps, generators)
            attacked[chosen], points = broken, points[broken]
        return attacked, points

    def _cascade(self, net: Bounder, box: Box, labels: Tensor, correct: Tensor, stages: Sequence[Stage]) -> Tensor:
        """Margins (B, K) by the first stage, then by one after another for those right and unknown."""
        margins = torch.full((len(labels), net.classes), -torch.inf, dtype=box.like.dtype, device=labels.device)
        margins.scatter_(1, labels[:, None], 0.0)
        for position, stage in enumerate(stages):
            left = (torch.ones_like(correct) if position == 0 else correct & ~proved(margins)).nonzero()[:, 0]
            if len(left) == 0:
                break
            started = time.perf_counter()
            bounds = net.margins(box.map(partial(_rows, left)), labels[left], stage.method, arithmetic=self.arithmetic)
            margins[left] = torch.maximum(margins[left], bounds)
            stage.images += len(left)
            stage.proved += int((proved(margins[left]) & correct[left]).sum())
            stage.seconds += time.perf_counter() - started
        return margins


def parts_of(data: Split, size: int) -> Iterator[tuple[int, Split]]:
    """`data` in its own order, `size` images at a time, each part with the position of its first."""
    return ((start, data.take(slice(start, start + size))) for start in range(0, len(data), size))


def _rows(index: Tensor, values: Tensor) -> Tensor:
    return values[index]


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
