"""Training methods: each a region that is propagated, a bound of the network on it, and a loss of both.

A method is asked once per step, or once per part of a batch, and answers with means over the images it was shown.
`certtrain.config.methods` has the fields of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds import BoundedModel, Bounds, Box, linf_box
from certtrain.bounds.linear import fused_cross_entropy
from certtrain.config.methods import (
    AdversarialSection,
    AttackSection,
    CCIBPSection,
    CrownIBPSection,
    ExpIBPSection,
    IBPSection,
    MethodSection,
    MTLIBPSection,
    NaturalSection,
    RobustSection,
    SABRSection,
)
from certtrain.training.losses import (
    Metrics,
    classification_error,
    geometrically_interpolated,
    interpolated,
    margin_error,
    margins_of_logits,
    robust_cross_entropy,
)
from certtrain.training.regions import small_box, small_linf_box


class Phase(Enum):
    """What is minimised at this point of the schedule; a step is compiled once for each."""

    NATURAL = "natural"  # cross-entropy of the clean logits, no bounds at all
    BEFORE = "before"  # epsilon is 0: natural cross-entropy and the regularizers
    WARMUP = "warmup"  # epsilon grows: the method's loss and the regularizers, which fade
    FULL = "full"  # epsilon has reached its maximum: the method's loss alone


class Scheduled(NamedTuple):
    """What the schedules say at one step: scalar tensors on the device, so that a compiled step need not be rebuilt.

    eps: the radius now; eps_ratio: eps / max_eps; ramp: the share of warmup's steps that are done.
    key: int64, of the step's random numbers (`noise.uniform`).
    """

    eps: Tensor
    eps_ratio: Tensor
    ramp: Tensor
    key: Tensor


@dataclass(frozen=True)
class Part:
    """A batch, or a part of one, and what the network makes of it: all that a method's losses are functions of.

    labels: (B,); bounds: of the method's region, where it has one.
    adversarial: logits (B, K) at the attacked points, where the method asks for them.
    """

    net: BoundedModel
    labels: Tensor
    bounds: Bounds | None
    adversarial: Tensor | None = None

    def ibp_margins(self) -> Tensor:
        return self.net.margins_of(self.bounds, self.labels)


class Losses(NamedTuple):
    """Means over a part: the losses that make up the robust one, and errors, both by the names they are shown under.

    A `verified_error` is always that of a bound on the whole epsilon box.
    """

    losses: Metrics
    errors: Metrics


Options = TypeVar("Options", bound=MethodSection)


class Method(Generic[Options]):
    """What every method answers; its options come as a section, or as keyword arguments.

    is_robust: has a loss for epsilon > 0.
    has_region: propagates a set.
    asks_for_logits: its losses look at the logits at attacked points.

    Raises:
        pydantic.ValidationError: an option outside its range.
    """

    Section: ClassVar[type[MethodSection]]
    is_robust: ClassVar[bool] = True
    has_region: ClassVar[bool] = True
    asks_for_logits: ClassVar[bool] = False

    def __init__(self, options: Options | None = None, **fields: Any) -> None:
        self.options: Options = options or self.Section(**fields)

    @property
    def attack(self) -> AttackSection | None:
        """How points are attacked before each step, where they are."""
        return getattr(self.options, "attack", None)

    @property
    def is_of_batch_means(self) -> bool:
        """Whether `robust_loss` must be given means over the whole batch; otherwise the mean of parts' will do."""
        return False

    def region(self, images: Tensor, eps: Tensor, points: Tensor | None) -> Box:
        """The set that is propagated: for images (B, C, H, W), and the points attacked around them."""
        return linf_box(images, eps)

    def uses_relaxations(self, phase: Phase) -> bool:
        """Whether the propagated boxes are kept for backward passes through linear relaxations."""
        return False

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        """The losses that `robust_loss` combines."""
        raise NotImplementedError

    def robust_loss(self, losses: Metrics) -> Tensor:
        return losses["robust_loss"]

    def natural_weight(self, at: Scheduled) -> Tensor | float:
        """Of the cross-entropy of the clean logits, beside 1 minus it of the robust loss."""
        options = self.options
        if not isinstance(options, RobustSection):
            return 0.0
        return along(options.kappa, at.ramp) if any(options.kappa) else 1 - options.w


class Natural(Method[NaturalSection]):
    """Cross-entropy of the clean logits, whatever epsilon is."""

    Section = NaturalSection
    is_robust = has_region = False


class IBP(Method[IBPSection]):
    """Cross-entropy of the IBP margins of the epsilon box."""

    Section = IBPSection

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        loss = robust_cross_entropy(margins, part.labels).mean()
        return Losses({"robust_loss": loss}, {"verified_error": margin_error(margins)})


class CrownIBP(Method[CrownIBPSection]):
    """Cross-entropy of margins β·CROWN-IBP + (1 - β)·IBP, or the fused bound of the cross-entropy itself."""

    Section = CrownIBPSection

    def uses_relaxations(self, phase: Phase) -> bool:
        return phase is Phase.WARMUP or (phase is Phase.FULL and self.options.beta[1] > 0)

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        errors = {"verified_error": margin_error(margins)}
        if self.uses_relaxations(phase):
            beta = along(self.options.beta, at.eps_ratio if self.options.beta_along == "epsilon" else at.ramp)
            if self.options.loss_fusion:
                return Losses({"robust_loss": fused_cross_entropy(part.bounds, part.labels, share=beta).mean()}, errors)
            margins = interpolated(part.net.margins_of(part.bounds, part.labels, "crown-ibp"), margins, beta)
            errors["robust_error"] = margin_error(margins)
        return Losses({"robust_loss": robust_cross_entropy(margins, part.labels).mean()}, errors)


class Adversarial(Method[AdversarialSection]):
    """Cross-entropy at attacked points."""

    Section = AdversarialSection
    has_region, asks_for_logits = False, True

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        loss = F.cross_entropy(part.adversarial, part.labels)
        return Losses({"robust_loss": loss}, {"adversarial_error": classification_error(part.adversarial, part.labels)})


class SABR(Method[SABRSection]):
    """Cross-entropy of the IBP margins of small boxes around attacked points."""

    Section = SABRSection

    def region(self, images: Tensor, eps: Tensor, points: Tensor | None) -> Box:
        if self.options.radius == "epsilon":
            return small_linf_box(images, points, eps, self.options.lambda_)
        return small_box(linf_box(images, eps), points, self.options.lambda_)

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        loss = robust_cross_entropy(margins, part.labels).mean()
        return Losses({"robust_loss": loss}, {"robust_error": margin_error(margins)})


class CCIBP(Method[CCIBPSection]):
    """Cross-entropy of margins α·IBP + (1 - α)·attacked."""

    Section = CCIBPSection
    asks_for_logits = True

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        verified, attacked = part.ibp_margins(), margins_of_logits(part.adversarial, part.labels)
        margins = interpolated(verified, attacked, self.options.alpha)
        loss = robust_cross_entropy(margins, part.labels).mean()
        return Losses({"robust_loss": loss}, {**_both_errors(part, verified), "robust_error": margin_error(margins)})


class MTLIBP(Method[MTLIBPSection]):
    """α·L_IBP + (1 - α)·L_adv."""

    Section = MTLIBPSection
    asks_for_logits = True

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        verified, attacked = _both_losses(part, margins)
        return Losses({"ibp_loss": verified.mean(), "adversarial_loss": attacked.mean()}, _both_errors(part, margins))

    def robust_loss(self, losses: Metrics) -> Tensor:
        return interpolated(losses["ibp_loss"], losses["adversarial_loss"], self.options.alpha)


class ExpIBP(Method[ExpIBPSection]):
    """L_IBP^α · L_adv^(1 - α), of the means over the batch as in the authors' code, or image by image."""

    Section = ExpIBPSection
    asks_for_logits = True

    @property
    def is_of_batch_means(self) -> bool:
        return self.options.product == "batch"

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        verified, attacked = _both_losses(part, margins)
        losses = {"ibp_loss": verified.mean(), "adversarial_loss": attacked.mean()}
        if self.options.product == "image":
            losses["robust_loss"] = geometrically_interpolated(verified, attacked, self.options.alpha).mean()
        return Losses(losses, _both_errors(part, margins))

    def robust_loss(self, losses: Metrics) -> Tensor:
        if self.options.product == "image":
            return losses["robust_loss"]
        return geometrically_interpolated(losses["ibp_loss"], losses["adversarial_loss"], self.options.alpha)


def _both_losses(part: Part, margins: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) each: of the margins, and at the attacked points."""
    return robust_cross_entropy(margins, part.labels), F.cross_entropy(part.adversarial, part.labels, reduction="none")


def _both_errors(part: Part, margins: Tensor) -> Metrics:
    return {
        "adversarial_error": classification_error(part.adversarial, part.labels),
        "verified_error": margin_error(margins),
    }


METHODS: dict[str, type[Method]] = {
    method.Section.model_fields["name"].default: method
    for method in (Natural, Adversarial, IBP, CrownIBP, SABR, CCIBP, MTLIBP, ExpIBP)
}


def build_method(section: MethodSection) -> Method:
    return METHODS[section.name](section)


def along(ends: tuple[float, float], share: Tensor) -> Tensor:
    """The first of `ends` where `share` is 0, the second where it is 1, linear between."""
    return ends[0] + (ends[1] - ends[0]) * share


def scheduled(
    eps: float, eps_ratio: float = 1.0, ramp: float | None = None, like: Tensor | None = None, key: int = 0
) -> Scheduled:
    """One step's `Scheduled`, of `like`'s type and on its device; ramp: by default eps_ratio."""
    like = torch.empty(()) if like is None else like
    values = like.new_tensor((eps, eps_ratio, eps_ratio if ramp is None else ramp))
    return Scheduled(*values.unbind(), torch.tensor(key, device=like.device))
