"""The training methods' own fields: `training.method` is one of these sections, chosen by its name.

What each method computes is in `certtrain.training.methods`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from certtrain.config.section import Section, Share, by_name


def _constant(value: Any) -> Any:
    """One number means that it stays."""
    return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# As epsilon begins to grow, and from warmup's end on; linear in between.
Ramp = Annotated[tuple[Share, Share], Field(strict=False), BeforeValidator(_constant)]


Shrink = Annotated[float, Field(gt=0, le=1)]  # of upper ends behind unstable ReLUs, while training (CTBench)


class StepsSection(Section):
    """Steps along the sign of a gradient."""

    steps: int = Field(8, ge=1)
    """Number of steps."""
    decay: float = Field(0.1, gt=0)
    """Of the step size ..."""
    decay_at: Annotated[tuple[Share, ...], Field(strict=False)] = ()
    """... each time these shares of the steps are done."""
    restarts: int = Field(1, ge=1)
    """Starts; of what they lead to the largest loss is taken."""
    keep: Literal["last", "worst"] = "last"
    """What a start leads to: its last point, or of all it meets, itself included, that of the largest loss."""


class AttackSection(StepsSection):
    """PGD on the cross-entropy of images. (Madry et al. 2018, arXiv 1706.06083.)"""

    step_size: float = Field(0.25, gt=0)
    """As a share ..."""
    step_of: Literal["radius", "box"] = "radius"
    """... of the radius that is attacked, or in each pixel of half the width of the box, which ends at 0 and 1."""
    start: Literal["uniform", "image"] = "uniform"
    """Where the first restart begins; the others begin anywhere."""
    eps_factor: float = Field(1.0, gt=0)
    """The radius that is attacked, as a multiple of epsilon."""
    clamp_to_box: bool = True
    """Move the point found back to within epsilon of the image."""
    statistics: Literal["clean", "running"] = "clean"
    """Of BatchNorm while attacking: of the clean batch, or running."""


class LatentAttackSection(StepsSection):
    """PGD on the margins of a network's tail; its step size is a share of the box's width there."""

    step_size: float | None = Field(None, gt=0)
    """As a share of the box's width; null: 2 / steps, but at least 0.2."""
    decay: float = Field(0.2, gt=0)
    """Of the step size ..."""
    decay_at: Annotated[tuple[Share, ...], Field(strict=False)] = (0.7,)
    """... each time these shares of the steps are done."""


Prover = Literal["bounds", "search", "nothing"]


class MethodSection(Section):
    """A training method by name."""

    name: str
    usual_prover: ClassVar[Prover] = "bounds"  # what settles most images of its networks
    supports_checkpointing: ClassVar[bool] = True  # all it needs of the network is boxes, which backward may repeat
    loss_of_one_box: ClassVar[bool] = False  # its robust loss is a function of the propagated box alone

    @property
    def supports_lirpa(self) -> bool:
        """Whether auto_LiRPA can compute what it needs."""
        return True

    @property
    def needs_no_clean_pass(self) -> bool:
        """Whether its loss, once epsilon is above 0, is a function of one box alone."""
        return False


class NaturalSection(MethodSection):
    """Cross-entropy of clean images, no bounds."""

    name: Literal["natural"] = "natural"
    usual_prover: ClassVar[Prover] = "nothing"
    supports_checkpointing: ClassVar[bool] = False


class RobustSection(MethodSection):
    """What all methods but natural training have: a loss of clean images beside the robust one."""

    w: Share = 1.0
    """Weight of the robust loss, 1 - w that of the clean one (CTBench)."""
    kappa: Ramp = (0.0, 0.0)
    """Weight of the clean loss, along warmup (CROWN-IBP, CTRAIN)."""

    @model_validator(mode="after")
    def _one_weight(self) -> RobustSection:
        if self.w < 1 and any(self.kappa):
            raise ValueError("w and kappa both weigh the clean loss: set one of them")
        return self

    @property
    def needs_no_clean_pass(self) -> bool:
        return self.loss_of_one_box and self.w == 1 and not any(self.kappa)


class AttackingSection(RobustSection):
    """What the methods have that look for bad points first."""

    usual_prover: ClassVar[Prover] = "search"
    attack: AttackSection = AttackSection()

    @property
    def supports_lirpa(self) -> bool:
        return False


class AdversarialSection(AttackingSection):
    """Cross-entropy at attacked points, no bounds. (Madry et al. 2018, arXiv 1706.06083.)"""

    name: Literal["adversarial"] = "adversarial"
    usual_prover: ClassVar[Prover] = "nothing"
    supports_checkpointing: ClassVar[bool] = False


class IBPSection(RobustSection):
    """Interval bound propagation. (Gowal et al. 2018, arXiv 1810.12715.)"""

    name: Literal["ibp"] = "ibp"
    loss_of_one_box: ClassVar[bool] = True


class CrownIBPSection(RobustSection):
    """Margins β·CROWN-IBP + (1 - β)·IBP. (Zhang et al. 2020, arXiv 1906.06316.)"""

    name: Literal["crown-ibp"] = "crown-ibp"
    loss_of_one_box: ClassVar[bool] = True
    loss_fusion: bool = False
    """Bound the cross-entropy itself: one backward row instead of one for each class."""
    beta: Ramp = (1.0, 0.0)
    """Weight of CROWN-IBP, along warmup."""
    beta_along: Literal["epsilon", "steps"] = "epsilon"
    """What β is linear in: epsilon on its way to its maximum, from 0 or wherever it begins, or the steps of warmup."""
    supports_checkpointing: ClassVar[bool] = False

    @property
    def supports_lirpa(self) -> bool:
        return not self.loss_fusion


class SABRSection(AttackingSection):
    """IBP of small boxes around attacked points. (Müller et al. 2023, arXiv 2210.04871.)"""

    name: Literal["sabr"] = "sabr"
    loss_of_one_box: ClassVar[bool] = True
    lambda_: Share = Field(0.4, alias="lambda")
    """The small box's radius ..."""
    radius: Literal["box", "epsilon"] = "box"
    """... as a share of the cut box's, pixel by pixel, or of epsilon."""
    shrink: Shrink = 1.0
    """What upper ends behind unstable ReLUs are multiplied by while training; 1: nothing."""


class CCIBPSection(AttackingSection):
    """Convex combination of IBP's margins and attacked ones. (De Palma et al. 2024, arXiv 2305.13991.)"""

    name: Literal["cc-ibp"] = "cc-ibp"
    alpha: Share = 0.5
    """Weight of the margins of IBP."""


class MTLIBPSection(AttackingSection):
    """Convex combination of the IBP loss and the attacked one. (De Palma et al. 2024, arXiv 2305.13991.)"""

    name: Literal["mtl-ibp"] = "mtl-ibp"
    alpha: Share = 0.5
    """Weight of the IBP loss."""


class ExpIBPSection(AttackingSection):
    """Product of powers of the IBP loss and the attacked one. (De Palma et al. 2024, arXiv 2305.13991.)"""

    name: Literal["exp-ibp"] = "exp-ibp"
    alpha: Share = 0.5
    """Exponent of the IBP loss."""
    product: Literal["batch", "image"] = "batch"
    """Of the losses' means over the batch, or of each image's."""


class TailSection(RobustSection):
    """What the methods have that bound a network's head by IBP and attack its tail."""

    tail: int = Field(1, ge=1)
    """Activations in the part that is attacked: of a transformer, one in each block."""
    latent: LatentAttackSection = LatentAttackSection()
    link: float = Field(0.5, gt=0, le=1)
    """Share of the box's width, from each end, in which points move that end."""
    gradient_scale: float = Field(4.0, gt=0)
    """Of the gradient through the tail's loss."""
    product: Literal["batch", "image"] = "batch"
    """Of the losses' means over the batch, or of each image's."""
    shrink: Shrink = 1.0
    """What upper ends behind unstable ReLUs are multiplied by while training; 1: nothing."""
    usual_prover: ClassVar[Prover] = "search"
    supports_checkpointing: ClassVar[bool] = False

    @property
    def supports_lirpa(self) -> bool:
        return False


class TAPSSection(TailSection):
    """IBP of the head, attacks on the tail. (Mao et al. 2023, arXiv 2305.04574.)"""

    name: Literal["taps"] = "taps"


class STAPSSection(TailSection):
    """TAPS of small boxes around attacked points. (Mao et al. 2023, arXiv 2305.04574.)"""

    name: Literal["staps"] = "staps"
    lambda_: Share = Field(0.4, alias="lambda")
    """The small box's radius ..."""
    radius: Literal["box", "epsilon"] = "box"
    """... as a share of the cut box's, pixel by pixel, or of epsilon."""
    attack: AttackSection = AttackSection()


AnyMethod = (
    NaturalSection
    | AdversarialSection
    | IBPSection
    | CrownIBPSection
    | SABRSection
    | CCIBPSection
    | MTLIBPSection
    | ExpIBPSection
    | TAPSSection
    | STAPSSection
)
METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    section.model_fields["name"].default: section for section in get_args(AnyMethod)
}

ChosenMethod = Annotated[AnyMethod, Field(discriminator="name"), by_name("training method", METHOD_SECTIONS)]
