"""Training methods: each a region that is propagated, a bound of the network on it, and a loss of both.

A method is asked once per step, or once per part of a batch, and answers with means over the images it was shown.
`certtrain.config.methods` has the fields of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from certtrain.bounds import BoundedModel, Bounds, Box, linf_box
from certtrain.bounds.linear import fused_cross_entropy
from certtrain.config.methods import CrownIBPSection, IBPSection, MethodSection, NaturalSection
from certtrain.training.losses import Metrics, interpolated, margin_error, robust_cross_entropy


class Phase(Enum):
    """What is minimised at this point of the schedule; a step is compiled once for each."""

    NATURAL = "natural"  # cross-entropy of the clean logits, no bounds at all
    BEFORE = "before"  # epsilon is 0: natural cross-entropy and the regularizers
    WARMUP = "warmup"  # epsilon grows: the method's loss and the regularizers, which fade
    FULL = "full"  # epsilon has reached its maximum: the method's loss alone


class Scheduled(NamedTuple):
    """What the schedules say at one step: scalar tensors on the device, so that a compiled step need not be rebuilt.

    eps: the radius now; eps_ratio: eps / max_eps; ramp: the share of warmup's steps that are done.
    """

    eps: Tensor
    eps_ratio: Tensor
    ramp: Tensor


@dataclass(frozen=True)
class Part:
    """A batch, or a part of one, and what the network makes of it: all that a method's losses are functions of.

    labels: (B,); bounds: of the method's region.
    """

    net: BoundedModel
    labels: Tensor
    bounds: Bounds


class Losses(NamedTuple):
    """Means over a part: what is minimised, by name, and the errors of what is minimised, under names of their own."""

    losses: Metrics
    errors: Metrics


Options = TypeVar("Options", bound=MethodSection)


class Method(Generic[Options]):
    """What every method answers; its options come as a section, or as keyword arguments.

    Raises:
        pydantic.ValidationError: an option outside its range.
    """

    Section: ClassVar[type[MethodSection]]
    is_robust: ClassVar[bool] = True  # has a loss for epsilon > 0

    def __init__(self, options: Options | None = None, **fields: Any) -> None:
        self.options: Options = options or self.Section(**fields)

    def region(self, images: Tensor, eps: Tensor) -> Box:
        """The set around `images` (B, C, H, W) that is propagated."""
        return linf_box(images, eps)

    def uses_relaxations(self, phase: Phase) -> bool:
        """Whether the propagated boxes are kept for backward passes through linear relaxations."""
        return False

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        """The losses that `robust_loss` combines."""
        raise NotImplementedError

    def robust_loss(self, losses: Metrics) -> Tensor:
        return losses["robust_loss"]


class Natural(Method[NaturalSection]):
    """Cross-entropy of the clean logits, whatever epsilon is."""

    Section = NaturalSection
    is_robust = False


class IBP(Method[IBPSection]):
    """Cross-entropy of the IBP margins of the epsilon box."""

    Section = IBPSection

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.net.margins_of(part.bounds, part.labels)
        return Losses(
            {"robust_loss": robust_cross_entropy(margins, part.labels)}, {"verified_error": margin_error(margins)}
        )


class CrownIBP(Method[CrownIBPSection]):
    """Cross-entropy of margins β·CROWN-IBP + (1 - β)·IBP, or the fused bound of the cross-entropy itself."""

    Section = CrownIBPSection

    def uses_relaxations(self, phase: Phase) -> bool:
        return phase is Phase.WARMUP or (phase is Phase.FULL and self.options.beta[1] > 0)

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.net.margins_of(part.bounds, part.labels)
        errors = {"verified_error": margin_error(margins)}
        if self.uses_relaxations(phase):
            first, last = self.options.beta
            beta = first + (last - first) * (at.eps_ratio if self.options.beta_along == "epsilon" else at.ramp)
            if self.options.loss_fusion:
                return Losses({"robust_loss": fused_cross_entropy(part.bounds, part.labels, share=beta).mean()}, errors)
            margins = interpolated(part.net.margins_of(part.bounds, part.labels, "crown-ibp"), margins, beta)
            errors["robust_error"] = margin_error(margins)
        return Losses({"robust_loss": robust_cross_entropy(margins, part.labels)}, errors)


METHODS: dict[str, type[Method]] = {
    method.Section.model_fields["name"].default: method for method in (Natural, IBP, CrownIBP)
}


def build_method(section: MethodSection) -> Method:
    return METHODS[section.name](section)


def scheduled(eps: float, eps_ratio: float = 1.0, ramp: float | None = None, like: Tensor | None = None) -> Scheduled:
    """One step's `Scheduled`, of `like`'s type and on its device; ramp: by default eps_ratio."""
    like = torch.empty(()) if like is None else like
    values = (eps, eps_ratio, eps_ratio if ramp is None else ramp)
    return Scheduled(*like.new_tensor(values).unbind())
