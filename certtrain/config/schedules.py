"""The learning rate schedules' own fields: `optimizer.schedule` is one of these sections, chosen by its name.

Each is about the steps from the end of the rate's warmup to the end of the run; `certtrain.schedules` computes.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from certtrain.config.section import Section, Share, by_name


class ConstantSection(Section):
    """The rate stays."""

    name: Literal["constant"] = "constant"


class LinearSection(Section):
    """The rate falls linearly."""

    name: Literal["linear"] = "linear"
    final: Share = 0.0
    """What is left of the rate at the end."""


class CosineSection(Section):
    """The rate falls along half a cosine."""

    name: Literal["cosine"] = "cosine"
    final: Share = 0.0
    """What is left of the rate at the end."""


class InverseRootSection(Section):
    """The rate falls as 1 / √step."""

    name: Literal["inverse-root"] = "inverse-root"
    timescale_epochs: float = Field(1.0, gt=0)
    """Epochs after which it begins to fall."""


class CooldownSection(Section):
    """The rate stays, and falls linearly at the end."""

    name: Literal["cooldown"] = "cooldown"
    length: Share = 0.2
    """Share of the run in which it falls."""
    final: Share = 0.0
    """What is left of the rate at the end."""


class InfiniteSection(Section):
    """The rate falls along half a cosine to a level, stays there however long the run is, and falls at the end.

    Continued later from a network saved while it stayed, it goes on without being warmed up again.
    """

    name: Literal["infinite"] = "infinite"
    decay_epochs: float = Field(1.0, ge=0)
    """Epochs in which it falls to ..."""
    level: Share = 0.5
    """... this share of it."""
    length: Share = 0.2
    """Share of the run in which it falls at the end."""
    final: Share = 0.0
    """What is left of the level then."""


ScheduleSection = (
    ConstantSection | LinearSection | CosineSection | InverseRootSection | CooldownSection | InfiniteSection
)
SCHEDULES = [section.model_fields["name"].default for section in get_args(ScheduleSection)]

ChosenSchedule = Annotated[ScheduleSection, Field(discriminator="name"), by_name("schedule", SCHEDULES)]
