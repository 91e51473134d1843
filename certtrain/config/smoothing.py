"""Gaussian smoothing of the loss: `training.smoothing` is one of these sections, chosen by its name.

What each computes is in `certtrain.training.smoothing`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from certtrain.config.section import Section, by_name


class NoSmoothingSection(Section):
    """The loss as it is."""

    name: Literal["none"] = "none"


class PGPESection(Section):
    """Gradients from losses at pairs of opposite perturbations of the weights, without going backward."""

    name: Literal["pgpe"] = "pgpe"
    std: float = Field(0.001, gt=0)
    """Of the noise on each weight."""
    pairs: int = Field(16, ge=1)
    """Of opposite perturbations, each step."""


class RGSSection(Section):
    """The mean of gradients at perturbed weights."""

    name: Literal["rgs"] = "rgs"
    std: float = Field(0.001, gt=0)
    """Of the noise on each weight."""
    samples: int = Field(2, ge=1)
    """Perturbed weights, each step."""


SmoothingSection = NoSmoothingSection | PGPESection | RGSSection
SMOOTHINGS = [section.model_fields["name"].default for section in get_args(SmoothingSection)]

ChosenSmoothing = Annotated[SmoothingSection, Field(discriminator="name"), by_name("smoothing", SMOOTHINGS)]
