"""Averaging of weights: `training.averaging` is one of these sections, chosen by its name.

`certtrain.training.averaging` computes.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from certtrain.config.section import Section, by_name


class NoAveragingSection(Section):
    """The weights after the last step are the network's."""

    name: Literal["none"] = "none"


class EMASection(Section):
    """An exponential moving average of the weights after steps. (Polyak and Juditsky 1992; Tarvainen 2017.)"""

    name: Literal["ema"] = "ema"
    start_epoch: int = Field(1, ge=1)
    """From 1; the first weights taken are those after its first `every_steps` steps."""
    every_steps: int = Field(1, ge=1)
    """Steps from one taking of the weights to the next."""
    decay: float = Field(0.999, ge=0, lt=1)
    """What is kept of the average each time."""


class SWASection(Section):
    """The mean of the weights at the ends of epochs, or after steps. (Izmailov et al. 2018, arXiv 1803.05407.)"""

    name: Literal["swa"] = "swa"
    start_epoch: int = Field(ge=1)
    """From 1; the first weights taken are those at its end, or those after its first `every_steps` steps."""
    every_epochs: int = Field(1, ge=1)
    """Epochs from one taking of the weights to the next."""
    every_steps: int | None = Field(None, ge=1)
    """Steps from one taking to the next, in the place of epochs."""

    @model_validator(mode="after")
    def _one_cadence(self) -> SWASection:
        if self.every_steps is not None and self.every_epochs != 1:
            raise ValueError("every_epochs and every_steps both say how often: set one of them")
        return self


AveragingSection = NoAveragingSection | EMASection | SWASection
AVERAGINGS = [section.model_fields["name"].default for section in get_args(AveragingSection)]

ChosenAveraging = Annotated[AveragingSection, Field(discriminator="name"), by_name("averaging", AVERAGINGS)]
