"""What `verify` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from certtrain.verification.results import ImageResult
from certtrain.verification.verdicts import GAVE_UP, Verdict


@dataclass
class Stage:
    """One method of a cascade: how many images it was asked about, how many of them it proved, and its price."""

    method: str
    images: int = 0
    proved: int = 0
    seconds: float = 0.0  # of all processes together

    @classmethod
    def of(cls, methods: Sequence[str], results: Sequence[ImageResult]) -> tuple[Stage, ...]:
        stages = tuple(cls(method) for method in methods)
        for result in results:
            for stage, seconds in zip(stages, result.seconds, strict=False):
                stage.images += 1
                stage.seconds += seconds
            stages[len(result.seconds) - 1].proved += result.verdict == Verdict.PROVED
        return stages


@dataclass(frozen=True, eq=False)
class Verification:
    """What was found at one epsilon; per-image tensors (N,) on the CPU, in the order of the split.

    Attributes:
        eps: the radius.
        stages: the methods of the cascade, in order.
        arithmetic: that of the deployed network for which the bounds hold, None for real mathematics.
        prediction: the class of the unperturbed image, -1 where its logits are not all numbers.
        correct: the prediction is the label.
        attacked: right, but a misclassified point was found, by an attack or by branch and bound.
        adversarial: those points (M, C, H, W), in order.
        proved: no perturbation of at most eps in any pixel changes the prediction, which is right.
        margin: smallest lower bound of z_y - z_j, j ≠ y.
        seconds: the attack included; of this call, and of the earlier ones that `results` go on from.
        attack: the names of those that were made, None where none was.
        trees: by position, what proves an image by branch and bound (`Trees`), where that was kept.
        undecided: by position, why branch and bound has given up an image.
        domains: how many it has bounded.
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
    undecided: Mapping[int, str] = field(default_factory=dict)
    domains: int = 0

    @property
    def method(self) -> str:
        """The methods of the cascade, with commas between them."""
        return ",".join(stage.method for stage in self.stages)

    @property
    def unknown(self) -> Tensor:
        """(N,) bool: classified right, neither proved nor attacked."""
        return self.correct & ~self.proved & ~self.attacked

    @property
    def flags_by_verdict(self) -> dict[Verdict, Tensor]:
        """(N,) bool of each verdict; every image has one, and those that were given up are unknown here."""
        return {
            Verdict.PROVED: self.proved,
            Verdict.UNKNOWN: self.unknown,
            Verdict.ATTACKED: self.attacked,
            Verdict.MISCLASSIFIED: ~self.correct,
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

    @property
    def verdicts(self) -> list[str]:
        """Of each image, the value of its `Verdict`."""
        found = [""] * len(self.correct)
        for verdict, flags in self.flags_by_verdict.items():
            for image in flags.nonzero()[:, 0].tolist():
                found[image] = verdict.value
        for image, reason in self.undecided.items():
            found[image] = reason
        return found

    @classmethod
    def of(
        cls,
        eps: float,
        methods: Sequence[str],
        arithmetic: str | None,
        results: Sequence[ImageResult],
        images: Tensor,
        seconds: float,
        attack: str | None,
    ) -> Verification:
        """Of the results of all images, in whatever order."""
        ordered = sorted(results, key=lambda result: result.image)
        verdicts = [result.verdict for result in ordered]
        points = [result.point for result in ordered if result.point is not None]
        return cls(
            eps,
            Stage.of(methods, ordered),
            arithmetic,
            prediction=torch.tensor([result.prediction for result in ordered]),
            correct=torch.tensor([verdict != Verdict.MISCLASSIFIED for verdict in verdicts]),
            attacked=torch.tensor([verdict == Verdict.ATTACKED for verdict in verdicts]),
            adversarial=torch.stack(points) if points else torch.empty(0, *images.shape[1:]),
            proved=torch.tensor([verdict == Verdict.PROVED for verdict in verdicts]),
            margin=torch.tensor([result.margin for result in ordered], dtype=_margin_type(arithmetic)),
            seconds=seconds,
            undecided={i: verdict for i, verdict in enumerate(verdicts) if verdict in GAVE_UP},
            domains=sum(result.domains for result in ordered),
            trees={result.image: result.tree for result in ordered if result.tree is not None},
            attack=attack,
        )

    def summary(self) -> dict[str, Any]:
        """What goes into a JSON file; errors are fractions."""
        return {
            "eps": self.eps,
            "method": self.method,
            "arithmetic": self.arithmetic,
            "attack": self.attack,
            "images": len(self.correct),
            "natural_error": self.natural_error,
            "pgd_error": self.pgd_error,
            "verified_error": self.verified_error,
            "verdicts": dict(Counter(self.verdicts)),
            "domains": self.domains,
            "stages": [vars(stage) | {"seconds": round(stage.seconds, 3)} for stage in self.stages],
            "seconds": round(self.seconds, 3),
        }


def _margin_type(arithmetic: str | None) -> torch.dtype:
    return torch.float32 if arithmetic is None else torch.float64


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
