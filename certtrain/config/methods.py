"""The training methods' own fields: `training.method` is one of these sections, chosen by its name.

What each method computes is in `certtrain.training.methods`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from certtrain.config.section import Section, Share
from certtrain.errors import unknown


class MethodSection(Section):
    """A training method by name."""

    name: str
    boxes_only: ClassVar[bool] = True  # needs no more of the network than boxes, which backward may compute again

    @property
    def on_lirpa(self) -> bool:
        """Whether auto_LiRPA can compute what it needs."""
        return True


class NaturalSection(MethodSection):
    """Cross-entropy of clean images, no bounds."""

    name: Literal["natural"] = "natural"


class IBPSection(MethodSection):
    """Interval bound propagation. (Gowal et al. 2018, arXiv 1810.12715.)"""

    name: Literal["ibp"] = "ibp"


class CrownIBPSection(MethodSection):
    """Margins β·CROWN-IBP + (1 - β)·IBP. (Zhang et al. 2020, arXiv 1906.06316.)"""

    name: Literal["crown-ibp"] = "crown-ibp"
    loss_fusion: bool = False  # bound the cross-entropy itself: one backward row instead of one for each class
    beta: tuple[Share, Share] = (1.0, 0.0)  # β as epsilon begins to grow, and from the end of warmup on
    beta_along: Literal["epsilon", "steps"] = "epsilon"  # between them β falls with eps / max_eps, or with the steps
    boxes_only: ClassVar[bool] = False

    @property
    def on_lirpa(self) -> bool:
        return not self.loss_fusion


AnyMethod = NaturalSection | IBPSection | CrownIBPSection
METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    section.model_fields["name"].default: section for section in get_args(AnyMethod)
}


def _by_name(value: Any) -> Any:
    """A bare name means a method with its defaults."""
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(name, str) and name not in METHOD_SECTIONS:
        raise unknown("training method", name, METHOD_SECTIONS)
    return {"name": value} if isinstance(value, str) else value


ChosenMethod = Annotated[AnyMethod, Field(discriminator="name"), BeforeValidator(_by_name)]
