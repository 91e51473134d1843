"""The JSON files of runs, read again and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from certtrain.errors import CheckpointError, first_problem

MOST_LAYERS = 1000
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # NaN is neither
Radius = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """Of a mapping the keys that are needed; others may be there."""

    model_config = ConfigDict(strict=True)


class Stage(Record):
    method: str
    images: Count
    proved: Count
    seconds: FiniteFloat


class ErrorsAt(Record):
    eps: Radius
    natural_error: Share
    pgd_error: Share
    verified_error: Share


class Result(ErrorsAt):
    images: Count
    stages: list[Stage] = []


class Setting(Record):
    """Test images and a radius that a run which began with another network was measured on."""

    data: str
    images: Count
    eps: Radius


class Measured(Record):
    """Errors then; None where the network had no answer."""

    natural_error: Share | None
    verified_error: Share | None


class BySetting(Record):
    """`old` is missing where nothing told what the other network was trained for."""

    old: Measured | None = None
    new: Measured


class AtEpoch(BySetting):
    epoch: Count


class StartInSummary(Record):
    """What a run began with, and where that was asked for, what became of it."""

    file: str
    settings: dict[Literal["old", "new"], Setting] = {}
    before: BySetting | None = None
    along: list[AtEpoch] = []
    after: BySetting | None = None

    @model_validator(mode="after")
    def _errors_in_every_setting(self) -> StartInSummary:
        for errors in (self.before, self.after, *self.along):
            if self.settings and (errors is None or any(getattr(errors, name) is None for name in self.settings)):
                raise ValueError("a setting has no errors")
        return self


class Subject(Record):
    """What a file of results says they are about: all images of a split, or the first of them."""

    weights_sha256: str | None = None
    split_sha256: str | None = None
    images: Count | None = None
    arithmetic: str | None = None


class Summary(Result, Subject):
    """Of summary.json."""

    start: StartInSummary | None = None

    split: str | None = None
    images: Count
    method: str
    radii: list[Result] = Field(min_length=1)
    versions: dict[str, str] = {}
    train_seconds: FiniteFloat
    images_per_second: FiniteFloat


class Verified(Subject):
    """Of verify.json."""

    method: str | None = None
    radii: list[ErrorsAt] = Field(min_length=1)


class Radii(Subject):
    """Of radius.json: errors over epsilon."""

    method: str = "ibp"
    natural_error: Share
    eps: list[Radius] = Field(min_length=1)
    verified_error: list[Share]
    pgd_eps: list[Radius]
    pgd_error: list[Share]

    @model_validator(mode="after")
    def _one_error_for_each_radius(self) -> Radii:
        if (len(self.verified_error), len(self.pgd_error)) != (len(self.eps), len(self.pgd_eps)):
            raise ValueError("there are not as many errors as epsilons")
        return self


class Layer(Record):
    """Of a line of metrics.jsonl, one for each ReLU."""

    tightness: float
    active: Share
    inactive: Share
    unstable: float  # what the others leave of 1, which rounding may bring below 0


EpochNumber = Annotated[int, Field(ge=1, le=10**7)]


class CurvePoint(Record):
    """Of a line of metrics.jsonl: the mean of a share over batches, which rounding may bring out of [0, 1]."""

    epoch: EpochNumber
    verified_error: Annotated[float, Field(ge=-0.001, le=1.001)]


class Epoch(Record):
    """A line of metrics.jsonl; every other number is a metric's mean over the epoch."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float]

    epoch: EpochNumber
    layers: list[Layer] = Field(max_length=MOST_LAYERS)
    old: Measured | None = None
    new: Measured | None = None
    optimizer: dict[str, float | None] = {}


R = TypeVar("R", bound=Record)


def checked(kind: type[R], content: Any, file: Path) -> dict[str, Any]:
    """`content` of `file` as a mapping of what `kind` needs.

    Raises:
        CheckpointError: something is missing, or of another type; which one is said.
    """
    return parsed(kind, content, file).model_dump()


def parsed(kind: type[R], content: Any, file: Path) -> R:
    """As `checked`, as it is."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{file} was written by another version, or edited: {first_problem(error)}") from error
