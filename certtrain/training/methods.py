"""The training methods. `certtrain.config.methods` has the fields of each.

A method is asked once per step, or once per part of a batch, and answers with means over the images it was shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor

from certtrain.bounds import Bounder, Box, linf_box
from certtrain.bounds.linear import fused_cross_entropy
from certtrain.config.methods import (
    AdversarialSection,
    CCIBPSection,
    CrownIBPSection,
    ExpIBPSection,
    IBPSection,
    MethodSection,
    MTLIBPSection,
    NaturalSection,
    SABRSection,
    STAPSSection,
    TailSection,
    TAPSSection,
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
from certtrain.training.method import Losses, Method, Part, Phase, Scheduled, along
from certtrain.training.noise import uniform
from certtrain.training.regions import small_box, small_linf_box
from certtrain.training.taps import latent_points, linked, pairwise_margins, with_gradient_scaled


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

    @property
    def differs_in_warmup(self) -> bool:
        return self.options.beta[1] == 0

    def keeps_boxes(self, phase: Phase) -> bool:
        return phase is Phase.WARMUP or (phase is Phase.FULL and not self.differs_in_warmup)

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        errors = {"verified_error": margin_error(margins)}
        if self.keeps_boxes(phase):
            beta = along(self.options.beta, at.eps_ratio if self.options.beta_along == "epsilon" else at.ramp)
            if self.options.loss_fusion:
                loss = fused_cross_entropy(part.region_bounds, part.labels, share=beta).mean()
                return Losses({"robust_loss": loss}, errors)
            margins = interpolated(part.net.margins_of(part.region_bounds, part.labels, "crown-ibp"), margins, beta)
            errors["robust_error"] = margin_error(margins)
        return Losses({"robust_loss": robust_cross_entropy(margins, part.labels).mean()}, errors)


class Adversarial(Method[AdversarialSection]):
    """Cross-entropy at attacked points."""

    Section = AdversarialSection
    has_region, asks_for_logits = False, True

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        logits = part.adversarial_logits
        loss = F.cross_entropy(logits, part.labels)
        return Losses({"robust_loss": loss}, {"adversarial_error": classification_error(logits, part.labels)})


class SABR(Method[SABRSection]):
    """Cross-entropy of the IBP margins of small boxes around attacked points."""

    Section = SABRSection

    def region(self, images: Tensor, eps: Tensor, points: Tensor | None) -> Box:
        return small_region(self.options, images, eps, points)

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        loss = robust_cross_entropy(margins, part.labels).mean()
        return Losses({"robust_loss": loss}, {"robust_error": margin_error(margins)})


class CCIBP(Method[CCIBPSection]):
    """Cross-entropy of margins α·IBP + (1 - α)·attacked."""

    Section = CCIBPSection
    asks_for_logits = True

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        verified, attacked = part.ibp_margins(), margins_of_logits(part.adversarial_logits, part.labels)
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

    def robust_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
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

    def robust_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
        if self.options.product == "image":
            return losses["robust_loss"]
        return geometrically_interpolated(losses["ibp_loss"], losses["adversarial_loss"], self.options.alpha)


Tail = TypeVar("Tail", bound=TailSection)


class TAPS(Method[Tail]):
    """L_IBP·L_TAPS at full epsilon, until then L_IBP.

    L_TAPS is the cross-entropy of margins found by attacks on the network's tail inside the box that IBP gives at its
    head's end; these attacks link the two, so that gradients reach the head.
    """

    Section: ClassVar[type[MethodSection]] = TAPSSection
    asks_for_coefficients = True

    @property
    def is_of_batch_means(self) -> bool:
        return self.options.product == "batch"

    @property
    def differs_in_warmup(self) -> bool:
        return True

    def require(self, net: Bounder) -> None:
        super().require(net)
        net.split(self.options.tail)

    def keeps_boxes(self, phase: Phase) -> bool:
        return phase is Phase.FULL

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        margins = part.ibp_margins()
        ibp = robust_cross_entropy(margins, part.labels)
        errors = self._box_errors(margins)
        if phase is not Phase.FULL:
            return Losses({"ibp_loss": ibp.mean()}, errors)
        found = self._tail_margins(part, at)
        taps = robust_cross_entropy(found, part.labels)
        losses = {"ibp_loss": ibp.mean(), "taps_loss": taps.mean()}
        if self.options.product == "image":
            losses["robust_loss"] = (ibp * with_gradient_scaled(taps, self.options.gradient_scale)).mean()
        return Losses(losses, {**errors, "robust_error": margin_error(found)})

    def robust_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
        if "taps_loss" not in losses:
            return losses["ibp_loss"]
        if self.options.product == "image":
            return losses["robust_loss"]
        return losses["ibp_loss"] * with_gradient_scaled(losses["taps_loss"], self.options.gradient_scale)

    def _box_errors(self, margins: Tensor) -> Metrics:
        return {"verified_error" if self.shrink is None else "robust_error": margin_error(margins)}

    def _tail_margins(self, part: Part, at: Scheduled) -> Tensor:
        """(B, K): z_y - z_t at the point where the attack on class t ended."""
        split, classes = part.net.split(self.options.tail), part.net.classes
        coefficients = part.coefficients
        assert coefficients is not None
        box = part.region_bounds.recorded.boxes[split.cut.at]
        shape = (classes, *box.shape[1:])

        def tail(x: Tensor) -> Tensor:
            """(B, K, ...) -> (B, K, K): one point for each class."""
            return split.tail(x.flatten(0, 1), coefficients).unflatten(0, x.shape[:2])

        def draw(number: int) -> Tensor:
            return uniform(at.key, part.positions, shape, box.like, LATENT_DRAWS + number)

        points = latent_points(self.options.latent, tail, box, part.labels, draw)
        return pairwise_margins(tail(linked(points, box, self.options.link)), part.labels)


class STAPS(TAPS[STAPSSection]):
    """TAPS of SABR's small boxes: until epsilon is full, SABR."""

    Section = STAPSSection

    def region(self, images: Tensor, eps: Tensor, points: Tensor | None) -> Box:
        return small_region(self.options, images, eps, points)

    def _box_errors(self, margins: Tensor) -> Metrics:
        return {"robust_error": margin_error(margins)}


def small_region(options: SABRSection | STAPSSection, images: Tensor, eps: Tensor, points: Tensor | None) -> Box:
    """The small box around each attacked point, by either convention of its radius."""
    assert points is not None
    if options.radius == "epsilon":
        return small_linf_box(images, points, eps, options.lambda_)
    return small_box(linf_box(images, eps), points, options.lambda_)


def _both_losses(part: Part, margins: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) each: of the margins, and at the attacked points."""
    attacked = F.cross_entropy(part.adversarial_logits, part.labels, reduction="none")
    return robust_cross_entropy(margins, part.labels), attacked


def _both_errors(part: Part, margins: Tensor) -> Metrics:
    return {
        "adversarial_error": classification_error(part.adversarial_logits, part.labels),
        "verified_error": margin_error(margins),
    }


LATENT_DRAWS = 1000  # numbers of draws apart from those of the attack on images
METHODS: dict[str, type[Method]] = {
    method.Section.model_fields["name"].default: method
    for method in (Natural, Adversarial, IBP, CrownIBP, SABR, CCIBP, MTLIBP, ExpIBP, TAPS, STAPS)
}


def build_method(section: MethodSection) -> Method:
    return METHODS[section.name](section)
