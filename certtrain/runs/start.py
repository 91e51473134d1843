"""A run that begins with a trained network: which one that was, and what is taken from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from certtrain.affine_layers import classifier_tensors
from certtrain.config import Config, load_config
from certtrain.config.schema import DataSection, StartSection
from certtrain.errors import CheckpointError, UsageError, shortened, shown
from certtrain.models import all_options, build_model
from certtrain.modules import device_of
from certtrain.runs.checkpoint import (
    Architecture,
    load_architecture,
    load_checkpoint,
    load_weights,
    require_same_shapes,
    restore,
    weights_of,
)
from certtrain.runs.files import ARCHITECTURE, CHECKPOINT, CONFIG, START, WEIGHTS
from certtrain.runs.inheritance import NOTHING, Inheritance, OldData, last_radius
from certtrain.runs.state import check_optimizer, check_state, continue_from, take_optimizer
from certtrain.runs.tensor_file import tensors_digest
from certtrain.runtime.files import read_json, write_json
from certtrain.training.trainer import Trainer

NORMALIZATION = {"mean": "normalize.mean", "std": "normalize.std"}
"""Keys of the section `data`, and the names of these tensors in what `build_model` builds."""


class Errors(BaseModel):
    """On test images; None where the network has too few classes for them, or its last layer is not known."""

    natural_error: float | None = Field(None, ge=0, le=1)
    verified_error: float | None = Field(None, ge=0, le=1)


class Start(BaseModel):
    """What start.json says: enough to continue the run, and to tell what it forgot, without the other run.

    file: the weights that were taken; sha256: of names, types, shapes and values; keep: what else was.
    architecture, config: those of its run, None where only a file was left.
    earlier: configs of the runs that its run began with in turn, the latest first, as far as they are known.
    inherited: what that run itself had from those before it, of its schedules and old images.
    eps: the radius that it was last trained at.
    reinitialized: tensors that were not taken.
    before: errors before training, on the setting of that run ("old") and of this one ("new").
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    file: str
    keep: str
    sha256: str = ""
    architecture: Architecture | None = None
    config: Config | None = None
    earlier: list[Config] = []
    inherited: Inheritance = NOTHING
    eps: float = Field(0.0, ge=0, le=1)
    reinitialized: list[str] = []
    before: dict[str, Errors] = {}

    @property
    def is_recorded(self) -> bool:
        """Whether it comes from start.json: its network has been taken, and need not be there any more."""
        return bool(self.sha256)

    @property
    def told(self) -> str:
        """In a line, how a run begins."""
        kept = {"weights": "", "optimizer": " and the optimizer's state", "step": ", in the middle of its schedules"}
        anew = f"; initialized anew: {', '.join(self.reinitialized)}" if self.reinitialized else ""
        return f"from {self.file}{kept[self.keep]}{anew}"

    def passes_on(self, config: Config) -> Inheritance:
        """What the run of `config`, which begins with it, has from it and from those before.

        With keep step these are the values that the other run was trained with, but for a learning rate that `config`
        sets otherwise.
        """
        section, there = config.start_from, self.config
        assert section is not None
        lr = None if section.peak is None else section.peak * self.run_config.optimizer.lr
        old = None if there is None else OldData.of(there)
        if section.keep != "step":
            initial = self.eps if section.epsilon == "end" else 0.0
            return Inheritance(initial=initial, at_once=section.epsilon == "at-once", lr=lr, old=old)
        found = self.inherited
        if lr is None and there is not None and config.optimizer.lr == there.optimizer.lr:
            lr = found.lr
        if found.old is not None and there is not None and there.replays_from_start:
            old = found.old
        return found.model_copy(update={"lr": lr, "old": old})

    @property
    def run_config(self) -> Config:
        """`config`, where something is asked of it.

        Raises:
            UsageError: it is not known.
        """
        if self.config is None:
            raise UsageError(
                f"start_from: {shortened(self.file)} has no config.yaml beside it, which would tell the data, the "
                "learning rate and the radius it was trained with: name them yourself, or a run directory"
            )
        return self.config


def find_start(section: StartSection, folder: Path) -> Start:
    """What can be told of the network that `section` names without reading its weights.

    Raises:
        UsageError, CheckpointError: there is none, it lacks what is to be kept, or lies in `folder`, the run's own.
    """
    file = _file_of(section.place, section.keep)
    beside = file.parent
    if beside.resolve() == folder.resolve():
        raise UsageError(f"start_from: {file} lies in the folder of this very run: name another --out")
    architecture = Architecture(**load_architecture(beside)) if (beside / ARCHITECTURE).is_file() else None
    config = _config_in(beside)
    before = _start_in(beside)
    asked = section.keep == "step" or section.epsilon == "end"
    if asked and before is None and config is not None and config.start_from is not None:
        raise CheckpointError(
            f"start_from: the run in {beside} began with another network, and lacks {START}, which says at which "
            "radius and rate: name its whole folder, or keep weights and start at epsilon zero"
        )
    earlier = [] if before is None else [each for each in (before.config, *before.earlier) if each is not None]
    inherited = NOTHING
    if before is not None and config is not None and config.start_from is not None:
        inherited = before.passes_on(config)
    start = Start(
        file=str(file),
        keep=section.keep,
        architecture=architecture,
        config=config,
        earlier=earlier,
        inherited=inherited,
    )
    if section.peak is not None or section.epsilon == "end":
        _ = start.run_config
    return start


def _start_in(folder: Path) -> Start | None:
    """What the run in `folder` began with, if anything is said of that."""
    return stored_start(folder) if (folder / START).is_file() else None


def _config_in(folder: Path) -> Config | None:
    """Of the run in `folder`, where that is one."""
    file = folder / CONFIG
    try:
        return load_config(file) if file.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"start_from: {file} cannot be read: {shortened(error, 160)}") from error


def _file_of(source: Path, keep: str) -> Path:
    """The weights in a run directory, finished or not, or the file that was named."""
    names = (WEIGHTS, CHECKPOINT) if keep == "weights" else (CHECKPOINT,)
    files = [source / name for name in names] if source.is_dir() else [source]
    file = next((file for file in files if file.is_file()), None)
    if file is None and source.is_dir():
        raise CheckpointError(f"start_from: {source} holds no {' or '.join(names)}")
    if file is None:
        raise CheckpointError(f"start_from: there is no run directory or file {source}")
    if keep != "weights" and file.suffix != ".ckpt":
        raise UsageError(f"start_from.keep {keep}: {file} holds weights alone, name a run directory or its last.ckpt")
    return file


def stored_start(folder: Path) -> Start:
    """What start.json of the run in `folder` says.

    Raises:
        CheckpointError: it is missing or corrupt.
    """
    return read_json(folder / START, Start.model_validate)


def save_start(folder: Path, start: Start) -> None:
    write_json(folder / START, start.model_dump(mode="json"))


# --- what is taken ----------------------------------------------------------------------------------------------------


def require_same_architecture(start: Start, architecture: Mapping[str, Any], trust: bool) -> None:
    """The network of `start` must be that of this run but for the number of classes, as far as model.json tells.

    Args:
        architecture: of this run, which can be built.

    Raises:
        CheckpointError: names the first thing that differs.
    """
    if start.architecture is None:
        return
    there, here = start.architecture.model_dump(), dict(architecture)
    sizes = ["×".join(map(str, each["image_shape"])) for each in (there, here)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"start_from: {start.file} takes {sizes[0]} images, the data has {sizes[1]}")
    values = [{"name": there["name"]}, {"name": here["name"]}]
    if there["name"] == here["name"]:
        values = [_plain(all_options(each["name"], each["options"], trust)) for each in (there, here)]
    for key in dict.fromkeys((*values[0], *values[1])):
        found, expected = (shown(each.get(key)) for each in values)
        if found != expected:
            raise CheckpointError(
                f"start_from: {start.file} is of another architecture: model.{key} is {found} there, {expected} here"
            )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would have them."""
    return {f"options.{key}": list(value) if isinstance(value, tuple) else value for key, value in options.items()}


@dataclass(frozen=True)
class Taken:
    """What is taken from the network in `file`: its weights, and where more is kept the state of that last.ckpt.

    reinitialized: names of those that are not: the classifier's, where the number of classes is another one or where
    that was asked for, or else none.
    settled: names of those that are not, as the configuration sets other values: the input normalisation's, or none.
    eps: the radius that they were last trained at.
    """

    file: Path
    keep: str
    weights: Mapping[str, Tensor]
    reinitialized: list[str]
    settled: list[str]
    eps: float
    state: dict[str, Any] = field(default_factory=dict)

    def adopt(self, model: nn.Module) -> None:
        """Load the weights into `model`."""
        weights = _without(self.weights, [*self.reinitialized, *self.settled])
        restore(model, {**model.state_dict(), **weights}, self.file)

    def continue_in(self, trainer: Trainer) -> None:
        """Load what is kept besides.

        Raises:
            CheckpointError: it does not fit.
        """
        if self.keep == "step":
            check_state(self.state, trainer, self.file)
            weights = {**self.weights, **{name: trainer.model.state_dict()[name] for name in self.settled}}
            state = {**self.state, "trainer": {**self.state["trainer"], "model": weights}}
            continue_from(state, trainer, self.file)
        elif self.keep == "optimizer":
            check_optimizer(self.state, trainer, self.reinitialized, self.file)
            take_optimizer(self.state, trainer, self.reinitialized)

    def recorded_in(self, start: Start) -> Start:
        """`start` with what was taken."""
        found = {"sha256": tensors_digest(self.weights), "reinitialized": self.reinitialized, "eps": self.eps}
        return start.model_copy(update=found)


def take(start: Start, section: StartSection, data: DataSection, model: nn.Module) -> Taken:
    """Read the network of `start`; what of it does not fit `model` is told before any weight is read.

    Args:
        model: of this run, normalising its input as `data` says where that says anything.

    Raises:
        CheckpointError: corrupt, or of another architecture; names the first tensor that differs.
    """
    file, own, classifier = Path(start.file), model.state_dict(), classifier_tensors(model)
    reinitialized: list[str] = []

    def check(outline: Mapping[str, Tensor]) -> None:
        resized = any(name in outline and outline[name].shape[:1] != own[name].shape[:1] for name in classifier)
        if section.reset_classifier or (resized and section.keep != "step"):
            reinitialized.extend(name for name in classifier if _same_inputs(outline.get(name), own[name]))
        require_same_shapes(_without(own, reinitialized), _without(outline, reinitialized), file)

    state: dict[str, Any] | None = None
    if file.suffix == ".ckpt":
        state = load_checkpoint(file, lambda outline: check(weights_of(outline, file)))
        weights = weights_of(state, file)
    else:
        weights = load_weights(file, check)
    eps = 0.0 if start.config is None else last_radius(file, state, start.config, start.inherited)
    settled = [
        name for key, name in NORMALIZATION.items() if getattr(data, key) and not torch.equal(weights[name], own[name])
    ]
    kept = {} if section.keep == "weights" or state is None else state
    return Taken(file, section.keep, weights, reinitialized, settled, eps, kept)


def normalizing_as(model: nn.Module, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """`architecture` with the input normalisation that `model` has, whatever it was built with."""
    state, found = model.state_dict(), dict(architecture)
    for key, name in NORMALIZATION.items():
        values = state[name].flatten().cpu()
        if not torch.equal(values, torch.tensor(found[key], dtype=values.dtype)):
            found[key] = [float(str(value)) for value in values.numpy()]  # the shortest that float32 rounds to it
    return found


def _same_inputs(there: Tensor | None, here: Tensor) -> bool:
    return there is None or (there.dtype == here.dtype and there.shape[1:] == here.shape[1:])


def _without(tensors: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def original_network(start: Start, taken: Taken, model: nn.Module, trust: bool) -> nn.Module | None:
    """The network as it was in its own run: `model`, or with what was not taken; None where nothing tells it."""
    if not taken.reinitialized and not taken.settled:
        return model
    if start.architecture is None:
        return None
    network = build_model(**start.architecture.model_dump(), trust=trust)
    restore(network, taken.weights, start.file)
    return network.eval().to(device_of(model))
