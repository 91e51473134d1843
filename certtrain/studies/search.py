"""Tuning files: what is searched, and how much; read without torch or Optuna."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from certtrain.config import Config, load_config
from certtrain.config.loading import leaves
from certtrain.config.reading import NotPlainYaml, parse_yaml
from certtrain.config.schema import Amount, OneOf, Plain, Positive
from certtrain.config.section import Section
from certtrain.errors import UsageError, lines_of, shown
from certtrain.studies.design import Bases, Seeds, value_name
from certtrain.studies.reading import list_or_mapping, read_section

OBJECTIVES = ("natural_error", "pgd_error", "verified_error", "train_seconds", "verify_seconds")
RADII = "verification.eps"  # or what it is where it is null
JUDGED = "the radius of the errors"  # of `Config.judged_radius`
OF_TUNING = {  # keys that the search itself sets, and how it is told
    "data.validation": "the file's validation says what is held out for trials",
    "verification.split": "trials are judged by validation images, what is chosen by test images",
}
OF_TRAINING = ("data.flip", "data.crop", "data.mean", "data.std")
Objective = Annotated[str, AfterValidator(OneOf("objective", OBJECTIVES))]


class Range(Section):
    """Numbers between two ends, both included; whole ones where both ends are."""

    low: int | float
    high: int | float
    log: bool = False  # uniform in the logarithm
    step: int | float | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, high {self.high}: nothing lies between")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log is for ranges above 0, without step")
        if self.step is not None and (self.step <= 0 or (self.whole and not isinstance(self.step, int))):
            raise ValueError(f"step {self.step} does not fit the range from {self.low} to {self.high}")
        if not self.holds(self.high):
            raise ValueError(f"steps of {self.step} from {self.low} do not end at {self.high}: change high, or step")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: int | float) -> bool:
        """Whether it is one of the numbers, as written in decimal."""
        step = self.step or (1 if self.whole else None)
        beyond_low = Fraction(str(value)) - Fraction(str(self.low))
        return self.low <= value <= self.high and (step is None or beyond_low % Fraction(str(step)) == 0)


class Pruning(Section):
    """Trials whose verified error by IBP on validation images is above the median at that epoch are ended.

    The median is that of the trials that were trained to their end.
    """

    warmup_epochs: Annotated[int, Field(ge=0)] | None = None  # before which none is; null: until its epsilon has grown
    startup_trials: Annotated[int, Field(ge=1)] = 5  # that are finished before one is ended


class Final(Section):
    """What is trained anew on the whole training set, and tested."""

    seeds: Seeds = (0, 1, 2)
    most: Positive = 3  # configurations of a Pareto front


Space: TypeAlias = list_or_mapping(list[Any], Range)  # type: ignore[valid-type]


class TuningFile(Section):
    """A search over any keys of a configuration. The test set is looked at once, when it is over."""

    base: Bases
    overrides: Plain = Field(default_factory=dict)  # of every trial and of what is tested
    search: dict[str, Space] = Field(min_length=1)  # key -> range or choices
    objectives: Annotated[tuple[Objective, ...], Field(strict=False)] = ("verified_error",)  # all are minimised
    trials: Positive
    validation: Amount = 0.1  # images held out of the training set: a share, or a number
    sampler: Literal["tpe", "random"] = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the sampler
    pruning: Pruning | None = None
    storage: str | None = None  # URL of a database; null: a file in the study's folder
    final: Final = Final()

    @model_validator(mode="after")
    def _can_be_done(self) -> TuningFile:
        if not 1 <= len(set(self.objectives)) == len(self.objectives):
            raise ValueError("objectives: name one or several, none twice")
        if self.pruning is not None and self.objectives != ("verified_error",):
            raise ValueError("pruning is by verified_error: it must be the objective, and the only one")
        if not self.validation:
            raise ValueError("validation is 0: there would be nothing to choose by but the test set")
        if isinstance(self.validation, float) and self.validation >= 1:
            raise ValueError(f"validation is {self.validation}: a share is below 1, and a number of images whole")
        empty = [key for key, space in self.search.items() if isinstance(space, list) and len(space) < 2]
        if empty:
            raise ValueError(f"search.{empty[0]}: name at least two choices")
        return self


@dataclass(frozen=True)
class Tuning:
    """A tuning file and where it lies; its configurations are checked."""

    file: TuningFile
    folder: Path
    overrides: Sequence[str]

    def trial_config(self, changes: Mapping[str, Any]) -> Config:
        """Of a trial: verified on validation images, the test set out of reach.

        Raises:
            UsageError: the changes do not go together.
        """
        return self._config(changes, self._held_out)

    def final_config(self, changes: Mapping[str, Any]) -> Config:
        """Trained on all training images, and tested."""
        return self._config(changes, {"data.validation": 0, "verification.split": "test"})

    def asked_by(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What a configuration with these changes is asked, which must be the same of all that are compared.

        That is the images, the seed, the radii and how and by whom they are verified, each under its key; and at which
        of the radii the errors are that are compared.
        """
        config = self._config(self._held_out, changes)  # which would have the last word
        values = dict(leaves(config.model_dump(mode="json")))
        asked = {
            key: value
            for key, value in values.items()
            if key in ("seed", "backend") or (key.startswith(("data.", "verification.")) and key not in OF_TRAINING)
        }
        return asked | {RADII: config.test_radii, JUDGED: config.judged_radius}

    def checked_changes(self) -> Iterator[dict[str, Any]]:
        """None, and each end and choice of the search alone; of epsilon.max, each radius within that is verified, too.

        At the latter a trial is judged, and at the largest elsewhere: the ends alone do not say whether all are alike.
        """
        yield {}
        for key, space in self.file.search.items():
            values = [space.low, space.high] if isinstance(space, Range) else space
            if isinstance(space, Range) and key == "epsilon.max":
                values += [radius for radius in self.trial_config({}).test_radii if space.holds(radius)]
            yield from ({key: value} for value in values)

    def base_settings(self) -> dict[str, Any] | None:
        """What `base` has at the keys that are searched, as Optuna knows it; None where that is not in the search."""
        base = self.trial_config({})
        values = dict(leaves(base.model_dump(mode="json")))
        settings: dict[str, Any] = {}
        for key, space in self.file.search.items():
            if isinstance(space, Range):
                value = values.get(key)
                if not isinstance(value, int | float) or not space.holds(value):
                    return None
                settings[key] = int(value) if space.whole else value
            else:
                same = [name for name, choice in self.choices(key).items() if self.trial_config({key: choice}) == base]
                if not same:
                    return None
                settings[key] = same[0]
        return settings

    @property
    def _held_out(self) -> dict[str, Any]:
        return {"data.validation": self.file.validation, "verification.split": "validation"}

    def _config(self, changes: Mapping[str, Any], last: Mapping[str, Any]) -> Config:
        source = {"base": list(self.file.base)}
        return load_config(source, [dict(self.file.overrides), *self.overrides, dict(changes), dict(last)], self.folder)

    def choices(self, key: str) -> dict[str, Any]:
        """The choices of a key by the names that Optuna knows them under."""
        space = self.file.search[key]
        assert isinstance(space, list)
        return {value_name(value): value for value in space}


def load_tuning(path: Path, overrides: Sequence[str] = ()) -> Tuning:
    """Read a tuning file, and check every end and every choice of its search alone.

    Raises:
        UsageError: one line per thing that is wrong; among these are keys that decide what trials are judged by.
    """
    file = read_section(TuningFile, path)
    if own := [key for text in overrides for key in _said(text) if key in OF_TUNING]:
        raise UsageError(f"{own[0]} is set by the search: {OF_TUNING[own[0]]}; leave it out")
    tuning = Tuning(file, path.parent, overrides)
    wrong: list[str] = []
    asked: dict[str, Any] = {}
    for changes in tuning.checked_changes():
        key, value = next(iter(changes.items()), ("", None))
        try:
            tuning.trial_config(changes)
            tuning.final_config(changes)
            question = tuning.asked_by(changes)
            asked = asked or question
            if changed := [name for name in (*asked, *question) if question.get(name) != asked.get(name)]:
                wrong.append(f"{path}: search.{key}: {_not_to_be_chosen(key, changed[0])}")
        except UsageError as error:
            wrong += [f"{path}: {key and f'search {key}={shown(value)}: '}{line}" for line in str(error).splitlines()]
            if not key:
                break
    for key, space in file.search.items():
        if isinstance(space, list) and len(tuning.choices(key)) < len(space):
            wrong.append(f"{path}: search.{key}: two choices have the same name")
    if wrong:
        raise UsageError(lines_of("\n".join(dict.fromkeys(wrong))))
    return tuning


def _said(override: str) -> list[str]:
    """The keys, each as "section.key", that a text of the command line gives a value."""
    key, _, text = override.partition("=")
    try:
        value = parse_yaml(text)
    except NotPlainYaml:  # which is said where it is applied
        return []
    return [name for name, _ in leaves({key.strip(): value})]


def _not_to_be_chosen(key: str, asked: str) -> str:
    reason = f"{asked} is part of what all trials are asked, and must be the same for all"
    if asked == RADII and key.startswith("epsilon"):
        return f"{reason}; not set, it is epsilon.max: set it, or search epsilon.train_factor"
    if asked == JUDGED:
        return (
            f"{reason}; it is epsilon.max where {RADII} has it, and else the largest of these: "
            "name one radius there, or search epsilon.train_factor"
        )
    return reason
