"""The YAML schema: one section per subsystem, every value checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from certtrain.bound_methods import STAGES
from certtrain.config.averaging import ChosenAveraging, EMASection, NoAveragingSection, SWASection
from certtrain.config.methods import METHOD_SECTIONS, ChosenMethod, IBPSection
from certtrain.config.names import ARITHMETICS, ATTACKS, DATASETS, INITIALIZATIONS, MODELS, OPTIMIZERS
from certtrain.config.radius import parse_radius
from certtrain.config.reading import MOST_DEPTH, write_yaml
from certtrain.config.schedules import ChosenSchedule, ConstantSection
from certtrain.config.section import Section, Share
from certtrain.config.smoothing import ChosenSmoothing, NoSmoothingSection
from certtrain.errors import shown, unknown
from certtrain.verification.cascade import check_cascade

MOST = 2**31 - 1  # of a count: what 32 bits hold
MOST_SEED = 2**63 - 1  # what every random generator takes


def _amount(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        raise ValueError(f"a share of the training set, or a number of images, not {shown(value)}")
    return value


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("an empty list; write null for the default")
    return values


def _distinct_classes(classes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(classes)) < len(classes):
        raise ValueError("a class is named twice")
    return classes


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


def _by_path(value: Any) -> Any:
    """A bare path means a network of which the weights are kept."""
    return {"path": value} if isinstance(value, str) else value


T = TypeVar("T")

Several = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_not_empty)]
Radius = Annotated[float, BeforeValidator(parse_radius)]
Amount = Annotated[float | int, BeforeValidator(_amount)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Precision = Literal["float32", "tf32", "bf16"]
Plain = Annotated[dict[str, Any], BeforeValidator(_plain)]
Switch = Literal[True, False, "auto"]


V = TypeVar("V", str, tuple[str, ...])


@dataclass(frozen=True)
class OneOf:
    """A validator: a name among `choices`, or several, or an error with the nearest ones."""

    kind: str
    choices: Collection[str]
    own: bool = False  # also module:callable

    def __call__(self, value: V) -> V:
        for name in (value,) if isinstance(value, str) else value:
            if name not in self.choices and not (self.own and ":" in name):
                raise unknown(self.kind, name, self.choices)
        return value


class DataSection(Section):
    """What is trained and tested on."""

    name: Annotated[str, AfterValidator(OneOf("data set", DATASETS))]
    """Data set; npz and folder are one's own."""
    root: str = "data"
    """Folder of the named data sets."""
    path: str | None = None
    """Folder of one's own data: npz, folder."""
    download: bool = False
    """Fetch a named data set that is not in `root` yet."""
    classes: Annotated[Several[Count], AfterValidator(_distinct_classes)] | None = None
    """Only the images of these classes, which are numbered anew in this order; null: all."""
    limit: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """Only the first so many training images."""
    validation: Amount = 0
    """Held out of the training set, of all classes: a share, or a number of images."""
    flip: bool = False
    """Mirror half of the training images, at random."""
    crop: int = Field(0, ge=0, le=1024)
    """Random shifts of the training images, by up to this many pixels."""
    mean: Several[Share] | None = None
    """Input normalisation, one number a channel, of pixels in [0, 1]; null: the data set's own."""
    std: Several[Annotated[float, Field(gt=0)]] | None = None
    """As `mean`."""

    @property
    def source(self) -> tuple[str, Path | None]:
        """Where the images come from that are divided into those that are trained on and those held out."""
        return self.name, None if self.path is None else Path(os.path.expanduser(self.path)).resolve()

    def divided_otherwise(self, seed: int, there: DataSection, seed_there: int) -> str | None:
        """How `there` divides the same images otherwise, so that it trains on some that are held out here, if it does.

        Args:
            seed, seed_there: of the runs, which choose the images that are held out.
        """
        if self.source != there.source or (self.validation, seed) == (there.validation, seed_there):
            return None
        return (
            f"data.validation is {there.validation:g} and seed {seed_there} there, {self.validation:g} and {seed} here"
        )


class ReplaySection(Section):
    """Old training images in every batch, against forgetting."""

    share: float = Field(gt=0, lt=1)
    """Of each batch."""
    data: DataSection | None = None
    """Where they are; null: those that the network of `start_from` was trained on."""


class StartSection(Section):
    """A trained network to begin with, in the place of the initialization.

    `keep` says what comes from it: `weights` (and BatchNorm's statistics), also the `optimizer`'s state, or also the
    `step`, so that all schedules go on from there, as they were, whatever that run had itself begun with: with nothing
    else changed, that is the run itself, continued.
    """

    path: str
    """A run directory, or a model.safetensors or last.ckpt; in a study, {seed} stands for the run's own seed."""
    keep: Literal["weights", "optimizer", "step"] = "weights"
    """What is taken: weights; also the optimizer's state; also the place in all schedules."""
    reset_classifier: bool = False
    """Initialize the last layer anew; done in any case for another number of classes."""
    peak: float | None = Field(None, gt=0)
    """Learning rate in multiples of that run's; null: optimizer.lr."""
    epsilon: Literal["zero", "end", "at-once"] = "zero"
    """Warmup of the radius from 0, from the radius that these weights were last trained at, or none."""
    evaluate_every: Count | None = 1
    """Epochs between two looks at that run's setting and at this one; 0: before and after; null: never."""

    @property
    def place(self) -> Path:
        """`path`, with the home folder in the place of ~; ~nobody stays as it is."""
        return Path(os.path.expanduser(self.path))


class ModelSection(Section):
    """The architecture: a name of certtrain.models, or "module:callable"."""

    name: Annotated[str, AfterValidator(OneOf("model", MODELS, own=True))]
    """Architecture; or "module:callable" for one's own."""
    path: str | None = None
    """Where that module lies, unless it is installed; null: the config's own folder. The working directory is last."""
    options: Plain = Field(default_factory=dict)
    """Arguments of the architecture, such as width."""


class EpsilonSection(Section):
    """The perturbation radius and its warmup: 0 until `start_epoch` (counted from 1) begins, `max` when it ends."""

    max: Radius
    """Radius that is trained for and tested, in pixel units of [0, 1]: a number, or a fraction such as 8/255."""
    train_factor: float = Field(1.0, gt=0)
    """Networks are trained at this multiple of `max`, which is tested."""
    start_epoch: Positive = 1
    """Epoch, counted from 1, in which the radius begins to grow."""
    warmup_epochs: Count = 0
    """Epochs in which it grows."""
    mid: float = Field(0.25, ge=0, le=1)
    """Share of warmup in which it grows as a power of the step; linearly afterwards."""
    beta: float = Field(4.0, ge=1)
    """That power."""


class RegularizerSection(Section):
    """Bound tightness and ReLU balance during warmup, and an L1 weight penalty throughout."""

    weight: float = Field(0.5, ge=0)
    """Of both, until the radius moves; it falls to 0 on the radius's way, up or down, to its last value."""
    tolerance: float = Field(0.5, gt=0)
    """Below which a layer's tightness and balance cost something."""
    tightness: bool = True
    """Penalise boxes that grow from layer to layer."""
    relu_balance: bool = True
    """Penalise layers in which active and inactive ReLUs are out of balance."""
    l1: float = Field(0.0, ge=0)
    """Weight of the L1 norm of affine layers' weights, throughout."""


class OptimizerSection(Section):
    """An optimizer of torch.optim, any but LBFGS and SparseAdam, by name, with its arguments, and its learning rate.

    The rate is lr, times warmup or `schedule`, times `factor` for each milestone that has been reached.
    """

    name: Annotated[str, AfterValidator(OneOf("optimizer", OPTIMIZERS))] = "Adam"
    """Class of torch.optim."""
    lr: float = Field(5e-4, gt=0)
    """Learning rate."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs in which the learning rate grows ..."""
    warmup_start: Share = 0.0
    """... from this share of it."""
    schedule: ChosenSchedule = ConstantSection()
    """What the learning rate does next: a name, or a mapping of `name` and the schedule's own fields."""
    milestones: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Epochs done when the rate is multiplied by `factor` ..."""
    milestones_from: Literal["start", "ramp"] = "start"
    """... counted from the start, or from the end of the radius's warmup."""
    factor: float = Field(0.2, gt=0)
    """Of the learning rate at each milestone."""
    clip: float | None = Field(10.0, gt=0)
    """Largest norm of the gradient; null: any."""
    decay_vectors: bool = True
    """Whether weight decay is for BatchNorm's parameters and biases, too."""
    vector_factor: float = Field(1.0, gt=0)
    """Of the learning rate of those."""
    arguments: Plain = Field(default_factory=dict)
    """Further arguments of the class, such as weight_decay."""


class BatchNormSection(Section):
    """Whose statistics BatchNorm has while training.

    `center` takes them from the middle of the box, layer by layer, and needs no clean pass once epsilon is above 0: as
    good as the others where it was measured, and faster (docs/results/training_methods.md).
    """

    statistics: Literal["clean", "adversarial", "center"] = "clean"
    """Of the clean images, of the attacked ones (the running ones of both), or of the box's centre."""
    population: bool = False
    """Re-estimate the running statistics over the whole training set, once, at the end: before, no loss is of them,
    and of the attacks only those that say running."""


class MetricsSection(Section):
    """What metrics.jsonl has of the optimizer, besides. (Liu et al. 2019, arXiv 1908.03265.)"""

    optimizer: bool = False
    """Adaptive rates, effective step size, rectification and dead ReLUs after each epoch."""
    first_steps: Count = 0
    """The same after each of the first so many steps, in steps.jsonl."""


class TrainingSection(Section):
    """What is minimised, and how."""

    method: ChosenMethod = IBPSection()
    """What is minimised: a name, or a mapping of `name` and the method's own fields."""
    batch_norm: BatchNormSection = BatchNormSection()
    smoothing: ChosenSmoothing = NoSmoothingSection()
    """Of the loss over perturbed weights."""
    averaging: ChosenAveraging = NoAveragingSection()
    """Of the weights over steps or epochs."""
    initialization: Annotated[str, AfterValidator(OneOf("initialization", INITIALIZATIONS))] = "ibp"
    """Of the weights."""
    epochs: Positive
    """Length of the run."""
    batch_size: Positive = 128
    """Images of a step, over all processes."""
    accumulation: Positive = 1
    """Parts a batch is worked through in, to save memory."""
    activation_checkpointing: bool = False
    """Compute the boxes again on the way back, to save memory: methods of boxes and attacked points alone."""
    precision: Precision = "float32"
    """Of products while training; verification is float32."""
    compile: Switch = "auto"
    """The step as one compiled graph; auto: where a run is long enough to save by it."""
    channels_last: Switch = "auto"
    """Layout of images; auto: where that is faster."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Longest time between two saves, which is what a killed run loses; 0: one after each epoch."""

    @property
    def saves_memory(self) -> bool:
        """Whether a batch is not worked through in one go, forward and back."""
        return self.accumulation > 1 or self.activation_checkpointing


class SearchSection(Section):
    """Of branch and bound, the last method of a cascade."""

    timeout: float = Field(100.0, ge=0)
    """Seconds for each image."""
    images: Positive = 8
    """Searched at once."""
    domains: Positive = 32
    """Bounded together."""
    candidates: Positive = 3
    """Neurons of which a split is tried before one is chosen."""
    steps: Count = 10
    """In which slopes and multipliers of a domain are optimised."""
    max_memory: float = Field(2048, gt=0)
    """MiB that waiting domains may take."""


class VerificationSection(Section):
    """What is measured at the end, and by `certtrain verify`."""

    split: Literal["test", "validation"] = "test"
    """Of which images; validation: the test set is not looked at."""
    eps: Several[Radius] | None = None
    """Radii, one or several; null: epsilon.max."""
    method: Annotated[Several[str], AfterValidator(OneOf("bound method", STAGES))] = ("ibp",)
    """Bounds, a cascade: each sees what those before left unknown."""
    search: SearchSection = SearchSection()
    """How branch and bound searches, where it is the last of them."""
    attack: Annotated[Several[str], AfterValidator(OneOf("attack", ATTACKS))] = ("pgd",)
    """Attacks on images that are right and not proved: each on those that withstood the ones before."""
    arithmetic: Annotated[str, AfterValidator(OneOf("arithmetic", ARITHMETICS))] | None = None
    """Whose rounding the bounds cover; null: real mathematics, computed in float32."""
    limit: Positive | None = None
    """Only the first so many of these images."""
    batch_size: Positive = 256
    """Images that are verified at once."""
    pgd_steps: Count = 40
    """Steps of pgd."""
    pgd_restarts: Count = 2
    """Its attempts, the first from the image itself, the others from random points; 0: pgd is left out."""
    pgd_step_size: float = Field(0.25, gt=0)
    """As a share of the radius."""
    apgd_steps: Positive = 100
    """Steps of apgd-ce, apgd-dlr and apgd-t."""
    apgd_restarts: Positive = 1
    """How often each of them starts at a random point."""
    apgd_targets: Positive = 9
    """How many wrong classes apgd-t tries, from the most likely one on."""

    @field_validator("method", "attack", mode="before")
    @classmethod
    def _one_name_or_several(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("eps", mode="before")
    @classmethod
    def _one_radius_or_several(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value


class Config(Section):
    """A whole training run."""

    seed: int = Field(0, ge=0, le=MOST_SEED)
    """Of weights, shuffles, augmentations and attacks."""
    data: DataSection
    model: ModelSection
    epsilon: EpsilonSection
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection()
    regularizers: RegularizerSection = RegularizerSection()
    verification: VerificationSection = VerificationSection()
    start_from: Annotated[StartSection | None, BeforeValidator(_by_path)] = None
    """A trained network to begin with: a path, or a mapping of `path` and what is taken."""
    replay: ReplaySection | None = None
    """Old images in every batch."""
    metrics: MetricsSection = MetricsSection()
    backend: Literal["native", "lirpa"] = "native"
    """Who computes bounds; lirpa is auto_LiRPA, where installed."""

    # One rule each of how sections go together; the first that is broken is told.

    @model_validator(mode="after")
    def _warmup_leaves_time(self) -> Config:
        if self.start_from is None or self.start_from.keep != "step":  # or else it may be the other run's
            self.require_time_after(self.ramp_epochs[1])
        return self

    @model_validator(mode="after")
    def _steps_can_be_divided(self) -> Config:
        training, method = self.training, self.training.method
        if training.compile is True and training.saves_memory:
            raise ValueError("training.compile is for whole steps: not with accumulation or activation_checkpointing")
        if training.activation_checkpointing and not method.supports_checkpointing:
            raise ValueError(f"training.activation_checkpointing is not for training.method {method.name}")
        return self

    @model_validator(mode="after")
    def _backend_can_do_it(self) -> Config:
        check_cascade(self.verification.method, self.backend)
        if self.backend == "lirpa" and (self.training.saves_memory or self.training.compile is True):
            raise ValueError("backend lirpa supports none of training.accumulation, activation_checkpointing, compile")
        return self

    @model_validator(mode="after")
    def _smoothing_saves_memory_itself(self) -> Config:
        if self.training.smoothing.name == "pgpe" and self.training.saves_memory:
            raise ValueError(
                "training.smoothing pgpe never goes backward, and needs none of training.accumulation, "
                "activation_checkpointing"
            )
        return self

    @model_validator(mode="after")
    def _averaging_begins(self) -> Config:
        averaging, epochs = self.training.averaging, self.training.epochs
        if isinstance(averaging, EMASection | SWASection) and averaging.start_epoch > epochs:
            raise ValueError(f"training.averaging.start_epoch: {averaging.start_epoch} of {epochs} epochs")
        return self

    @model_validator(mode="after")
    def _method_fits_statistics_and_backend(self) -> Config:
        method, statistics = self.training.method, self.training.batch_norm.statistics
        if statistics == "adversarial" and not hasattr(method, "attack"):
            raise ValueError(f"training.batch_norm.statistics adversarial: method {method.name} attacks no images")
        if statistics == "center" and (self.training.saves_memory or not method.needs_no_clean_pass):
            names = [name for name, section in METHOD_SECTIONS.items() if section.loss_of_one_box]
            raise ValueError(
                f"training.batch_norm.statistics center is for methods that need no clean pass ({', '.join(names)}, "
                "without w or kappa), and not with accumulation or activation_checkpointing"
            )
        if self.backend == "lirpa" and not (method.supports_lirpa and statistics == "clean"):
            raise ValueError(f"backend lirpa does not support training.method {method.name} as configured")
        return self

    @model_validator(mode="after")
    def _validation_images_are_there(self) -> Config:
        if self.verification.split == "validation" and not self.data.validation:
            raise ValueError("verification.split validation: data.validation says how many images that are, and is 0")
        return self

    @model_validator(mode="after")
    def _warmups_end(self) -> Config:
        epochs, epsilon = self.training.epochs, self.epsilon
        if self.optimizer.warmup_epochs > epochs:
            raise ValueError(f"optimizer.warmup_epochs: {self.optimizer.warmup_epochs:g} of {epochs} epochs")
        if epsilon.train_factor * epsilon.max > 1:
            raise ValueError(f"epsilon.train_factor: {epsilon.train_factor:g} times max is above 1, the whole range")
        return self

    @model_validator(mode="after")
    def _start_and_replay_have_what_they_take(self) -> Config:
        start = self.start_from
        if start is not None and start.keep == "step" and (start.epsilon != "zero" or start.reset_classifier):
            raise ValueError("start_from.keep step goes on with all that was: without epsilon and reset_classifier")
        if start is not None and start.epsilon == "end" and self.epsilon.warmup_epochs == 0:
            raise ValueError("start_from.epsilon end is where warmup begins: set epsilon.warmup_epochs, or say at-once")
        if self.replays_from_start and start is None:
            raise ValueError("replay: there is no old data: name a run in start_from, or the data in replay.data")
        return self

    @property
    def ramp_epochs(self) -> tuple[int, int]:
        """Epochs done when epsilon begins to move, and when it has reached its end; with start_from.keep step it may be
        that of the run that is continued (`certtrain.runs.inheritance`)."""
        if self.start_from is not None and self.start_from.epsilon == "at-once":
            return 0, 0
        start = self.epsilon.start_epoch - 1
        return start, start + self.epsilon.warmup_epochs

    @property
    def replays_from_start(self) -> bool:
        """Whether the old images are those of the network that it begins with."""
        return self.replay is not None and self.replay.data is None

    def require_time_after(self, ramp_end: int) -> None:
        """Raises ValueError if warmup ends, or what is counted from its end comes, after the run's last epoch.

        Args:
            ramp_end: epochs done when epsilon has reached its end.
        """
        first = ramp_end if self.optimizer.milestones_from == "ramp" else 0
        epochs, epsilon = self.training.epochs, self.epsilon
        late = [first + milestone for milestone in self.optimizer.milestones if first + milestone >= epochs]
        if late:
            raise ValueError(f"optimizer.milestones: {late[0]} is not before the end of the run, {epochs} epochs")
        if self.training.method.name != "natural" and ramp_end > epochs:
            raise ValueError(
                f"epsilon: warmup would end after {ramp_end} epochs "
                f"(start_epoch {epsilon.start_epoch}, warmup_epochs {epsilon.warmup_epochs}), the run has {epochs}"
            )

    @property
    def test_radii(self) -> tuple[float, ...]:
        """The radii that are verified."""
        return self.verification.eps or (self.epsilon.max,)

    @property
    def judged_radius(self) -> float:
        """That of them whose errors are the run's: epsilon.max, where it is verified, or else the largest."""
        return self.epsilon.max if self.epsilon.max in self.test_radii else max(self.test_radii)

    def to_yaml(self) -> str:
        """All values, as YAML that `load_config` reads back as the same."""
        return write_yaml(self.model_dump(mode="json"))
