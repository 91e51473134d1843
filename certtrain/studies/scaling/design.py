"""A scaling plan: widths times budgets, each budget twice the one before, and the runs that follow from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from certtrain.config import Config, load_config
from certtrain.config.loading import override_keys
from certtrain.config.schema import Amount, Plain, Positive, Several
from certtrain.config.section import Section
from certtrain.errors import UsageError, lines_of, shown
from certtrain.runs.directory import differences
from certtrain.studies.design import Bases, Cell, PlannedRun, Seeds, planned
from certtrain.studies.reading import read_section

SETTLED = (  # keys that the plan sets, of which a cell's may differ from another's, besides those of the network's size
    "training.epochs",
    "epsilon.start_epoch",
    "epsilon.warmup_epochs",
    "optimizer.milestones",
    "optimizer.warmup_epochs",
    "optimizer.schedule.timescale_epochs",
    "optimizer.schedule.decay_epochs",
)
TUNED = ("optimizer.lr", "training.batch_size", "optimizer.arguments.betas")
TUNING = "tuning"  # in the name of that stage's cells, instead of a protocol; and their folder
MOST_BUDGETS = 60


def _ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("the values must ascend")
    return values


Operations = Annotated[float, Field(ge=1, le=1e30)]  # floating-point, two for each multiply-accumulate
Rate = Annotated[float, Field(gt=0)]
Widths = Annotated[Several[Positive], AfterValidator(_ascending)]


class ProtocolSection(Section):
    """How runs of different length are made alike, and what counts as their cost.

    The defaults are those that remove the discrepancy (Porian et al. 2024); Kaplan et al. 2020 had the other ones.
    """

    warmup_epochs: Positive | None = None  # of epsilon, in all runs; null: the base's share of the run, as for the rate
    last_layer: bool = True  # whether its multiply-accumulates count
    tuned: bool = True  # learning rate, batch size and β2 of each width, by the rule that the tuning finds


class TuningSection(Section):
    """Runs that find the best learning rate, batch size and β2 of some widths; power laws say those of the others.

    The rule: at each of these widths the combination with the least error on validation images; through these, of
    learning rate, batch size and 1 - β2, a power law of the width each. Batch sizes and β2 are then the nearest ones
    that were tried.
    """

    widths: Widths
    budget: Operations
    lr: Annotated[Several[Rate], AfterValidator(_ascending)]
    batch_size: Widths
    beta2: Several[Annotated[float, Field(gt=0, lt=1)]]


class ScalingFile(Section):
    """A run for each protocol, budget, width and seed, and what is fitted to them."""

    base: Bases  # configs, whose schedule is that of every run, stretched to its length
    overrides: Plain = Field(default_factory=dict)
    width: str = "model.options.width"  # the key of the width
    widths: Annotated[Widths, Field(min_length=3)]
    per_width: dict[str, Rate] = Field(default_factory=dict)  # other sizes of the network, in multiples of the width
    first_budget: Operations
    budgets: int = Field(ge=1, le=MOST_BUDGETS)  # so many, each twice the one before
    least_epochs: Positive = 4  # of a run: an epoch more or less must not matter
    most_epochs: Positive | None = None  # of a run: a width that a budget would train for longer is far from its best
    seeds: Seeds = (0,)
    validation: Amount = 0.1  # held out of the training set; all errors are on these images
    protocols: dict[str, ProtocolSection] = Field(min_length=1)
    tuning: TuningSection | None = None
    forecast: Operations = 21.6e15  # compute for which the error is foretold: that of the published CIFAR-10 run
    resamples: int = Field(1000, ge=1, le=100_000)

    @field_validator("width", "per_width")
    @classmethod
    def _sizes_alone(cls, value: str | dict[str, float]) -> Any:
        for key in [value] if isinstance(value, str) else value:
            if not key.startswith("model.options."):
                raise ValueError(f"{shown(key)}: runs may differ in model.options alone, or no law fits them")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ScalingFile:
        wanting = [name for name, protocol in self.protocols.items() if protocol.tuned]
        if wanting and self.tuning is None:
            raise ValueError(f"protocols.{wanting[0]} is tuned: say how under tuning, or tuned: false")
        if self.most_epochs is not None and self.most_epochs < self.least_epochs:
            raise ValueError(f"most_epochs: {self.most_epochs} is less than least_epochs, {self.least_epochs}")
        if not self.validation:
            raise ValueError("validation: some images must be held out, since the test set is not for choosing")
        return self

    @property
    def all_budgets(self) -> list[float]:
        return [self.first_budget * 2**doublings for doublings in range(self.budgets)]


@dataclass(frozen=True)
class Settings:
    """What is tuned for a width."""

    lr: float
    batch_size: int
    beta2: float


Count = Callable[[Config, bool], float]  # (configuration, whether the last layer counts) -> operations of the whole run
SettingsOfWidth = Callable[[int], Settings]


@dataclass(frozen=True)
class Planned:
    """A cell of the grid: what it is, and its configuration but for the seed."""

    protocol: str
    budget: float
    width: int
    compute: float
    config: Config
    tried: Settings | None = None  # of the tuning

    @property
    def name(self) -> str:
        tried = self.tried
        extra = f"_lr={tried.lr:g}_b={tried.batch_size}_b2={tried.beta2:g}" if tried else ""
        return f"{self.protocol}_{self.budget:.2e}_w{self.width}{extra}"

    def runs(self, seeds: Sequence[int]) -> list[PlannedRun]:
        return [planned(Cell(self.name, self.config), seed) for seed in seeds]


@dataclass(frozen=True)
class Grid:
    """The cells that are trained, and why others are not."""

    cells: tuple[Planned, ...]
    left_out: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Plan:
    """A plan that was read and checked."""

    file: ScalingFile
    base: Config
    folder: Path  # that of the plan, to which it may refer

    def config(self, width: int, epochs: int, warmup: int | None = None, settings: Settings | None = None) -> Config:
        """The configuration of a run.

        Args:
            warmup: epochs in which epsilon grows; None: the base's share of the run.
        """
        file, base = self.file, self.base
        sizes = {file.width: width, **{key: max(1, round(times * width)) for key, times in file.per_width.items()}}
        held_out = {"data.validation": file.validation, "verification.split": "validation"}
        changes: list[str | Mapping[str, Any]] = [sizes, held_out, stretched(base, epochs, warmup)]
        if settings is not None:
            beta1 = base.optimizer.arguments.get("betas", [0.9])[0]
            tuned = settings.lr, settings.batch_size, [beta1, settings.beta2]
            changes.append(dict(zip(TUNED, tuned, strict=True)))
        return load_config(base, changes)

    def tuning_cells(self, count: Count) -> Grid:
        """The runs that the rule follows from; none where nothing is tuned."""
        tuning = self.file.tuning
        if tuning is None or not any(protocol.tuned for protocol in self.file.protocols.values()):
            return Grid(())
        cells = []
        self._require_an_epoch("tuning.budget", tuning.budget, [ProtocolSection()], count, max(tuning.widths))
        for width, lr, batch_size, beta2 in itertools.product(
            tuning.widths, tuning.lr, tuning.batch_size, tuning.beta2
        ):
            settings = Settings(lr, batch_size, beta2)
            of = Length(self, width, ProtocolSection(), settings, count)
            epochs = of.epochs(tuning.budget)
            config = of.config(epochs)
            cells.append(Planned(TUNING, tuning.budget, width, of.compute(epochs), config, settings))
        return Grid(tuple(cells))

    def grid(self, count: Count, rule: SettingsOfWidth | None) -> Grid:
        """The runs that laws are fitted to, of the protocols that can be trained by now: `rule` is for those tuned.

        Raises:
            UsageError: a budget is less than one epoch of the smallest network.
        """
        cells, left_out = [], []
        self._require_an_epoch("first_budget", self.file.first_budget, self.file.protocols.values(), count)
        for (name, protocol), budget in itertools.product(self.file.protocols.items(), self.file.all_budgets):
            if protocol.tuned and rule is None:
                continue
            for width in self.file.widths:
                settings = rule(width) if protocol.tuned and rule is not None else None
                of = Length(self, width, protocol, settings, count)
                epochs = of.epochs(budget)
                least, most = max(self.file.least_epochs, of.shortest), self.file.most_epochs or math.inf
                if not least <= epochs <= most:
                    why = f"less than {least}" if epochs < least else f"more than {most}"
                    left_out.append(f"{name}, {budget:.3g} FLOP, width {width}: {epochs} epochs, {why}")
                else:
                    cells.append(Planned(name, budget, width, of.compute(epochs), of.config(epochs)))
        return Grid(tuple(cells), tuple(left_out))

    def _require_an_epoch(
        self, key: str, budget: float, protocols: Iterable[ProtocolSection], count: Count, width: int | None = None
    ) -> None:
        """Raises UsageError if a budget is less than an epoch of a width, by default the smallest; says the least."""
        width = width or self.file.widths[0]
        least = max(Length(self, width, protocol, None, count).compute(1) for protocol in protocols)
        if budget < least:
            digit = 10.0 ** (math.floor(math.log10(least)) - 3)
            raise UsageError(
                f"{key}: {budget:.4g} FLOP are less than an epoch of width {width}: "
                f"at least {math.ceil(least / digit) * digit:.4g}"
            )


@dataclass(frozen=True)
class Length:
    """How long a network of a width can be trained for a budget, by a protocol."""

    plan: Plan
    width: int
    protocol: ProtocolSection
    settings: Settings | None
    count: Count

    def config(self, epochs: int) -> Config:
        return self.plan.config(self.width, epochs, self.protocol.warmup_epochs, self.settings)

    @property
    def shortest(self) -> int:
        """Epochs that the warmup takes, where it is the same for all, and one more."""
        fixed = self.protocol.warmup_epochs
        return 1 if fixed is None else self.plan.base.epsilon.start_epoch + fixed

    def compute(self, epochs: int) -> float:
        """Operations of so many epochs, by those of runs that can be trained: each epoch of a phase costs the same."""
        return self.count(self.config(max(epochs, self.shortest)), self.protocol.last_layer) * (
            epochs / max(epochs, self.shortest)
        )

    def epochs(self, budget: float) -> int:
        """The number of epochs whose compute is nearest to the budget in proportion."""
        guess = max(1, round(budget / self.compute(1)))
        for _ in range(3):  # epochs of several phases cost differently
            guess = max(1, round(guess * budget / self.compute(guess)))
        least = self.compute(1)
        return guess if budget >= least else 0


def stretched(base: Config, epochs: int, warmup: int | None = None) -> dict[str, Any]:
    """The schedules of `base` in a run of so many epochs, as overrides.

    Args:
        warmup: epochs in which epsilon grows, and in proportion the learning rate; None: the base's shares of the run.
    """
    ratio = epochs / base.training.epochs
    epsilon, optimizer = base.epsilon, base.optimizer
    ramp = round(epsilon.warmup_epochs * ratio) if warmup is None else warmup
    before = epsilon.start_epoch - 1
    begins = min(round(before * ratio), epochs - ramp) if warmup is None else before
    rate_ratio = ratio if warmup is None else warmup / max(1, epsilon.warmup_epochs)
    milestones = sorted({max(1, round(milestone * ratio)) for milestone in optimizer.milestones})
    changes: dict[str, Any] = {
        "training.epochs": epochs,
        "epsilon.start_epoch": 1 + max(0, begins),
        "epsilon.warmup_epochs": ramp,
        "optimizer.milestones": [milestone for milestone in milestones if milestone < epochs],
        "optimizer.warmup_epochs": min(optimizer.warmup_epochs * rate_ratio, float(epochs)),
    }
    for name in ("timescale_epochs", "decay_epochs"):
        if hasattr(optimizer.schedule, name):
            changes[f"optimizer.schedule.{name}"] = getattr(optimizer.schedule, name) * ratio
    return changes


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a plan.

    Args:
        overrides: "section.key=value", of every run, over all that the file says.

    Raises:
        UsageError: one line per thing that is wrong.
    """
    file = read_section(ScalingFile, path)
    all_overrides: list[str | Mapping[str, Any]] = [dict(file.overrides), *overrides]
    try:
        _require_left_open(file, override_keys(all_overrides))
        base = load_config({"base": list(file.base)}, all_overrides, path.parent)
        plan = Plan(file, base, path.parent)
        plan.config(file.widths[0], base.training.epochs)
    except UsageError as error:
        raise UsageError(lines_of("\n".join(f"{path}: {line}" for line in str(error).splitlines()))) from error
    return plan


def _require_left_open(file: ScalingFile, overridden: Sequence[str]) -> None:
    """Raises UsageError if an override is of what each run has from elsewhere in the plan: it would change nothing."""
    said_elsewhere = {
        "seed": "stands under seeds",
        "training.epochs": "follows from budget and width",
        "data.validation": "stands under validation",
        "verification.split": "is validation, since the test set is not for choosing",
        file.width: "stands under widths",
        **dict.fromkeys(file.per_width, "stands under per_width"),
    }
    for key in overridden:
        if key in said_elsewhere:
            raise UsageError(f"{key} {said_elsewhere[key]}: drop it from the overrides")


def require_comparable(plan: Plan, configs: Mapping[str, Config]) -> None:
    """Runs that laws are fitted to may differ in what the plan sets, and in nothing else.

    Raises:
        UsageError: names the run and the value.
    """
    free = {*SETTLED, *TUNED, plan.file.width, *plan.file.per_width, "seed"}
    first: tuple[str, Config] | None = None
    for name, config in configs.items():
        first = first or (name, config)
        wrong = [text for key, text in differences(first[1], config).items() if key not in free]
        if wrong:
            raise UsageError(f"{name} and {first[0]} differ in more than a law allows: {wrong[0]}")
