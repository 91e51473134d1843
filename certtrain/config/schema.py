"""The YAML schema: one section per subsystem, every value checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from certtrain.config.averaging import ChosenAveraging, EMASection, NoAveragingSection, SWASection
from certtrain.config.methods import ChosenMethod, IBPSection
from certtrain.config.names import ARITHMETICS, DATASETS, INITIALIZATIONS, METHODS, MODELS, OPTIMIZERS
from certtrain.config.reading import MOST_DEPTH, write_yaml
from certtrain.config.schedules import ChosenSchedule, ConstantSection
from certtrain.config.section import Section
from certtrain.config.smoothing import ChosenSmoothing, NoSmoothingSection
from certtrain.errors import shown, unknown

MOST = 2**31 - 1  # of a count: what 32 bits hold
MOST_SEED = 2**63 - 1  # what every random generator takes

# ASCII digits, and few: Python reads those of every script, and takes hours over 1e99999999 as a fraction.
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,3})?")
_RATIO = re.compile(r"([-+]?[0-9]{1,40})/([0-9]{1,40})")


def parse_radius(value: Any) -> float:
    """A perturbation radius in pixel units of [0, 1], written as a number or as a fraction like "8/255".

    Raises:
        ValueError: not a number, or outside [0, 1].
    """
    radius = _number(value.replace(" ", "")) if isinstance(value, str) else value
    if isinstance(radius, bool) or not isinstance(radius, Real):
        raise ValueError(f"{shown(value)} is not a radius: write a number or a fraction such as 8/255")
    if not 0 <= radius <= 1:  # type: ignore[operator] # Real's stub has no order
        raise ValueError(f"a radius lies between 0 and 1 (pixels are scaled to [0, 1]), not {shown(value)}")
    return float(radius)


def _number(text: str) -> float | None:
    if ratio := _RATIO.fullmatch(text):
        numerator, denominator = map(int, ratio.groups())
        return numerator / denominator if denominator else None
    return float(text) if _NUMBER.fullmatch(text) else None


def _amount(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        raise ValueError(f"a share of the training set, or a number of images, not {shown(value)}")
    return value


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("an empty list; write null for the default")
    return values


def _plain(value: Any, depth: int = 0) -> Any:
    """What a YAML file can hold, so that a run's config.yaml says the same again; tuples become lists."""
    if depth < MOST_DEPTH - 4:  # a section and its key are around it
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: _plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [_plain(inner, depth + 1) for inner in value]
        if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 2**64):
            return value
    raise ValueError(
        f"{shown(value)} is not plain data: numbers, text, true, false, null, and lists and mappings of it"
    )


T = TypeVar("T")

Several = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_not_empty)]
Radius = Annotated[float, BeforeValidator(parse_radius)]
Amount = Annotated[float | int, BeforeValidator(_amount)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Precision = Literal["float32", "tf32", "bf16"]
Plain = Annotated[dict[str, Any], BeforeValidator(_plain)]
Switch = Literal[True, False, "auto"]


def one_of(kind: str, choices: Collection[str]) -> AfterValidator:
    """A name among `choices`, or an error with the nearest ones."""

    def check(name: str) -> str:
        if name not in choices:
            raise unknown(kind, name, choices)
        return name

    return AfterValidator(check)


class DataSection(Section):
    """What is trained and tested on."""

    name: Annotated[str, one_of("data set", DATASETS)]
    root: str = "data"
    path: str | None = None  # of one's own data: npz, folder
    download: bool = False
    limit: Annotated[int, Field(ge=2, le=MOST)] | None = None  # only the first so many training images
    validation: Amount = 0  # held out of the training set: a share, or a number of images
    flip: bool = False
    crop: int = Field(0, ge=0, le=1024)  # random shifts of up to this many pixels
    mean: Several[float] | None = None  # input normalisation; null: the data set's own
    std: Several[Annotated[float, Field(gt=0)]] | None = None


class ModelSection(Section):
    """The architecture: a name of certtrain.models, or "module:callable"."""

    name: str
    path: str | None = None  # where that module lies; null: the config's own folder. The working directory comes next
    options: Plain = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name and name not in MODELS:
            raise unknown("model", name, MODELS)
        return name


class EpsilonSection(Section):
    """The perturbation radius and its warmup: 0 until `start_epoch` (counted from 1) begins, `max` when it ends."""

    max: Radius
    train_factor: float = Field(1.0, gt=0)  # networks are trained at this multiple of `max`, which is tested
    start_epoch: Positive = 1
    warmup_epochs: Count = 0
    mid: float = Field(0.25, ge=0, le=1)
    beta: float = Field(4.0, ge=1)


class RegularizerSection(Section):
    """Bound tightness and ReLU balance during warmup, and an L1 weight penalty throughout."""

    weight: float = Field(0.5, ge=0)
    tolerance: float = Field(0.5, gt=0)
    tightness: bool = True
    relu_balance: bool = True
    l1: float = Field(0.0, ge=0)


class OptimizerSection(Section):
    """Any optimizer of torch.optim, by name, with its arguments, and its learning rate.

    The rate is lr, times warmup or `schedule`, times `factor` for each milestone that has been reached.
    """

    name: Annotated[str, one_of("optimizer", OPTIMIZERS)] = "Adam"
    lr: float = Field(5e-4, gt=0)
    warmup_epochs: float = Field(0.0, ge=0)  # of the learning rate
    schedule: ChosenSchedule = ConstantSection()
    milestones: Annotated[tuple[Count, ...], Field(strict=False)] = ()  # epochs done when `factor` sets in ...
    milestones_from: Literal["start", "ramp"] = "start"  # ... since the start, or since epsilon has stopped growing
    factor: float = Field(0.2, gt=0)
    clip: float | None = Field(10.0, gt=0)  # of the gradient's norm
    decay_vectors: bool = True  # whether weight decay is for BatchNorm's parameters and biases, too
    vector_factor: float = Field(1.0, gt=0)  # of the learning rate of those
    arguments: Plain = Field(default_factory=dict)


class BatchNormSection(Section):
    """Whose statistics BatchNorm has while training.

    `center` takes them from the middle of the box, layer by layer, and needs no clean pass once epsilon is above 0.
    """

    statistics: Literal["clean", "adversarial", "center"] = "clean"
    population: bool = False  # at the end, re-estimate the running statistics over the whole training set


class TrainingSection(Section):
    method: ChosenMethod = IBPSection()  # a name, or a mapping of `name` and the method's own fields
    batch_norm: BatchNormSection = BatchNormSection()
    smoothing: ChosenSmoothing = NoSmoothingSection()
    averaging: ChosenAveraging = NoAveragingSection()
    initialization: Annotated[str, one_of("initialization", INITIALIZATIONS)] = "ibp"
    epochs: Positive
    batch_size: Positive = 128
    accumulation: Positive = 1  # parts a batch is worked through in, to save memory
    activation_checkpointing: bool = False  # compute the boxes again on the way back, to save memory (ibp)
    precision: Precision = "float32"  # of products while training: float32, tf32 or bf16; verification is float32
    compile: Switch = "auto"  # the step as one compiled graph; auto: where a run is long enough to save by it
    channels_last: Switch = "auto"  # layout of images; auto: where that is faster
    checkpoint_seconds: float = Field(60.0, ge=0)  # at least this long between two saves


class VerificationSection(Section):
    """What is measured at the end, and by `certtrain verify`."""

    split: Literal["test", "validation"] = "test"  # of which images; validation: the test set is not looked at
    eps: Several[Radius] | None = None  # null: epsilon.max
    method: Several[str] = ("ibp",)  # a cascade: each sees what those before left unknown
    arithmetic: Annotated[str, one_of("arithmetic", ARITHMETICS)] | None = None  # whose rounding the bounds cover
    limit: Positive | None = None  # only the first so many of these images
    batch_size: Positive = 256
    pgd_steps: Count = 40
    pgd_restarts: Count = 2
    pgd_step_size: float = Field(0.25, gt=0)  # as a share of epsilon

    @field_validator("method", mode="before")
    @classmethod
    def _known_methods(cls, value: Any) -> Any:
        methods = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        for name in methods if isinstance(methods, Sequence) else ():
            if name not in METHODS:
                raise unknown("bound method", name if isinstance(name, str) else shown(name), METHODS)
        return methods

    @field_validator("eps", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value


class Config(Section):
    """A whole training run."""

    seed: int = Field(0, ge=0, le=MOST_SEED)
    data: DataSection
    model: ModelSection
    epsilon: EpsilonSection
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection()
    regularizers: RegularizerSection = RegularizerSection()
    verification: VerificationSection = VerificationSection()
    backend: Literal["native", "lirpa"] = "native"  # who computes bounds; lirpa is auto_LiRPA, where installed

    @model_validator(mode="after")
    def _fits_the_run(self) -> Config:
        epochs, epsilon = self.training.epochs, self.epsilon
        ramp_end = epsilon.start_epoch - 1 + epsilon.warmup_epochs
        first = ramp_end if self.optimizer.milestones_from == "ramp" else 0
        late = [first + milestone for milestone in self.optimizer.milestones if first + milestone >= epochs]
        if late:
            raise ValueError(f"optimizer.milestones: {late[0]} is not before the end of the run, {epochs} epochs")
        method = self.training.method
        saves_memory = self.training.accumulation > 1 or self.training.activation_checkpointing
        if self.training.compile is True and saves_memory:
            raise ValueError("training.compile is for whole steps: not with accumulation or activation_checkpointing")
        if self.training.activation_checkpointing and not method.boxes_only:
            raise ValueError(f"training.activation_checkpointing is not for training.method {method.name}")
        if self.backend == "lirpa" and (saves_memory or self.training.compile is True):
            raise ValueError("backend lirpa supports none of training.accumulation, activation_checkpointing, compile")
        if self.training.smoothing.name == "pgpe" and saves_memory:
            raise ValueError(
                "training.smoothing pgpe never goes backward, and needs none of training.accumulation, "
                "activation_checkpointing"
            )
        averaging = self.training.averaging
        if isinstance(averaging, EMASection | SWASection) and averaging.start_epoch > epochs:
            raise ValueError(f"training.averaging.start_epoch: {averaging.start_epoch} of {epochs} epochs")
        statistics = self.training.batch_norm.statistics
        if statistics == "adversarial" and not hasattr(method, "attack"):
            raise ValueError(f"training.batch_norm.statistics adversarial: method {method.name} attacks no images")
        if statistics == "center" and (saves_memory or not method.trains_on_box_alone):
            raise ValueError(
                "training.batch_norm.statistics center is for methods that need no clean pass (ibp, crown-ibp, sabr, "
                "without w or kappa), and not with accumulation or activation_checkpointing"
            )
        if self.backend == "lirpa" and not (method.on_lirpa and statistics == "clean"):
            raise ValueError(f"backend lirpa does not support training.method {method.name} as configured")
        if self.verification.split == "validation" and not self.data.validation:
            raise ValueError("verification.split validation: data.validation says how many images that are, and is 0")
        if self.optimizer.warmup_epochs > epochs:
            raise ValueError(f"optimizer.warmup_epochs: {self.optimizer.warmup_epochs:g} of {epochs} epochs")
        if epsilon.train_factor * epsilon.max > 1:
            raise ValueError(f"epsilon.train_factor: {epsilon.train_factor:g} times max is above 1, the whole range")
        if method.name != "natural" and ramp_end > epochs:
            raise ValueError(
                f"epsilon: warmup would end after {ramp_end} epochs "
                f"(start_epoch {epsilon.start_epoch}, warmup_epochs {epsilon.warmup_epochs}), the run has {epochs}"
            )
        return self

    @property
    def test_radii(self) -> tuple[float, ...]:
        return self.verification.eps or (self.epsilon.max,)

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump(mode="json"))
