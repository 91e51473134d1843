"""What a network that is trained further forgets: its errors on the setting it comes from, and on the present one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from certtrain.config import Config
from certtrain.config.schema import DataSection
from certtrain.data import Dataset, Split
from certtrain.errors import DataError, UsageError
from certtrain.runs.build import load_data, load_splits
from certtrain.runs.inheritance import OldData
from certtrain.runs.meters import Meter
from certtrain.runs.start import Errors, Start
from certtrain.training.layer_statistics import LayerStatistics
from certtrain.training.trainer import EpochReport, Trainer
from certtrain.verification.verify import verify


@dataclass(frozen=True)
class Setting:
    """Test images of the data set `data`, labelled by its `classes`, and the radius that is to be proved for them."""

    data: str
    images: Split
    classes: tuple[str, ...]
    eps: float

    def errors(self, model: nn.Module, classes: Sequence[str], batch_size: int, backend: str) -> Errors:
        """Natural error, and verified error by IBP, of a network of `classes`; none where it lacks one."""
        try:
            images = self.images.renumbered(self.classes, classes)
        except DataError:
            return Errors()
        (found,) = verify(model, images, self.eps, batch_size=batch_size, backend=backend)
        return Errors(natural_error=found.natural_error, verified_error=found.verified_error)


@dataclass(frozen=True)
class Forgetting(Meter):
    """Measures a run that began with the network of another.

    settings: "old", that of the other run, where it is known; "new", this run's.
    classes: of the network that is trained.
    every: so many epochs; 0 for before and after training alone.
    """

    settings: Mapping[str, Setting]
    classes: tuple[str, ...]
    every: int
    batch_size: int
    backend: str

    def errors(self, model: nn.Module) -> dict[str, Errors]:
        """By setting, of the network that is trained."""
        asked = (self.classes, self.batch_size, self.backend)
        return {name: setting.errors(model, *asked) for name, setting in self.settings.items()}

    def before(self, model: nn.Module, original: nn.Module | None) -> dict[str, Errors]:
        """Before training; on the old setting those of the `original` network, which is None if it is not known."""
        networks = {"old": original, "new": model}
        return {
            name: setting.errors(network, setting.classes, self.batch_size, self.backend)
            if (network := networks[name]) is not None
            else Errors()
            for name, setting in self.settings.items()
        }

    def after_epoch(self, trainer: Trainer, report: EpochReport, layers: Sequence[LayerStatistics]) -> dict[str, Any]:
        """What is added to the record of an epoch whose turn has come."""
        if not self.every or report.epoch % self.every:
            return {}
        return {name: errors.model_dump() for name, errors in self.errors(trainer.model).items()}

    def summary(self, start: Start, epochs: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, Any]:
        """Of summary.json: errors before, along the way (records of metrics.jsonl), and after; and how they moved.

        forgetting: error after minus error before on the old setting; learned: before minus after on the new one.
        """
        before, after = start.before, self.errors(model)
        measured = (epoch for epoch in epochs if all(name in epoch for name in after))
        return {
            "settings": {
                name: {"data": setting.data, "images": len(setting.images), "eps": setting.eps}
                for name, setting in self.settings.items()
            },
            "before": {name: errors.model_dump() for name, errors in before.items()},
            "along": [{"epoch": epoch["epoch"], **{name: epoch[name] for name in after}} for epoch in measured],
            "after": {name: errors.model_dump() for name, errors in after.items()},
            "forgetting": _difference(after.get("old"), before.get("old")),
            "learned": _difference(before.get("new"), after.get("new")),
        }


def _difference(minuend: Errors | None, subtrahend: Errors | None) -> dict[str, float | None]:
    one, other = ({} if errors is None else errors.model_dump() for errors in (minuend, subtrahend))
    return {
        name: None if one.get(name) is None or other.get(name) is None else one[name] - other[name]
        for name in Errors.model_fields
    }


# --- which settings these are -----------------------------------------------------------------------------------------


def load_with_old_data(config: Config, start: Start | None) -> tuple[Dataset, Dataset | None]:
    """The data, with the old images that are replayed; and what the network of `start` comes from, if that is needed.

    Raises:
        UsageError: old images are needed, and nobody says where they are; or what is held out is trained on elsewhere.
        DataError: they are not there, or of a class that the data has not.
    """
    _require_held_out(config, start)
    dataset, section = load_data(config), config.start_from
    loaded, old = [(OldData.of(config), dataset)], None
    if start is not None and start.config is not None and section is not None and section.evaluate_every is not None:
        run = _asked_as(start.config, config)
        try:
            old = dataset if run.data == config.data else load_data(run)  # the same data holds the same images out
        except DataError as error:
            raise DataError(f"start_from: old data: {error}; without it: start_from.evaluate_every=null") from error
        loaded.append((OldData.of(run), old))
    asked = _old_data(config, start)
    if asked is None:
        return dataset, old
    again = next((found for data, found in loaded if data == asked), None) or load_splits(asked.data, asked.seed)
    try:
        replayed_images = again.train.renumbered(again.classes, dataset.classes)
    except DataError as error:
        raise DataError(f"replay: {error} of this run's data: choose old data by replay.data") from error
    return replace(dataset, old=replayed_images), old


def _require_held_out(config: Config, start: Start | None) -> None:
    """What this run holds out must not be trained on: as old images, or by the runs that it begins with.

    Raises:
        UsageError: the same images are divided otherwise there.
    """
    there = {"replay.data": (_named_by(config), config.seed)}
    name = "start_from"
    for run in () if start is None else (start.config, *start.earlier):
        if run is not None:
            there |= {name: (run.data, run.seed), f"replay.data of {name}": (_named_by(run), run.seed)}
        name = f"start_from of {name}"
    for name, (data, seed) in there.items():
        otherwise = None if data is None else config.data.divided_otherwise(config.seed, data, seed)
        if config.data.validation and otherwise:
            raise UsageError(f"{name}: trained on images that this run would hold out: {otherwise}; make them the same")


def _old_data(config: Config, start: Start | None) -> OldData | None:
    """Whose training images are replayed, if any are.

    Raises:
        UsageError: that is not known.
    """
    if start is not None and config.replays_from_start:
        return start.passes_on(config).old or OldData.of(start.run_config)
    named = _named_by(config)
    return None if named is None else OldData(data=named, seed=config.seed)


def _named_by(config: Config) -> DataSection | None:
    """The old images that the configuration itself names, if any."""
    return None if config.replay is None else config.replay.data


def _asked_as(run: Config, config: Config) -> Config:
    """The configuration of an earlier run, verified on the split that `config` is verified on."""
    split = config.verification.split
    if split == "validation" and not run.data.validation:
        raise UsageError("start_from: that run held out no validation images: start_from.evaluate_every=null")
    return run.model_copy(update={"verification": run.verification.model_copy(update={"split": split})})


def forgetting_of(config: Config, start: Start | None, dataset: Dataset, old: Dataset | None) -> Forgetting | None:
    """What is measured of a run, if anything."""
    section = config.start_from
    if start is None or section is None or section.evaluate_every is None:
        return None
    limit, settings = slice(config.verification.limit), {}
    if old is not None:
        run = start.run_config
        settings["old"] = Setting(run.data.name, old.test.take(limit), old.classes, run.epsilon.max)
    settings["new"] = Setting(config.data.name, dataset.test.take(limit), dataset.classes, config.epsilon.max)
    size, backend = config.verification.batch_size, config.backend
    return Forgetting(settings, dataset.classes, section.evaluate_every, size, backend)
